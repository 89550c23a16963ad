"""From words on the command line to calibration inputs, and to the model that runs them."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.outsiders import outsiders
from ..common.text import what_it_said
from ..errors import SettingError, SourceError
from ..report.progress import progress_bar
from .functions import named_function

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from torch import nn

    from ..checkpoints.readers import StoredTensor
    from ..common.store import Store
    from ..plans.activations import Activations
    from ..plans.table import LayerTable
    from ..plans.type_table import TypeTable

MOST_BATCHES = 10_000


def calibration_batches(text: str) -> list[Any]:
    """What `package.module:function` returns, as a list of batches. Raises SourceError or SettingError."""
    from ..models.running import checked_batches

    function = named_function(text)
    with outsiders(lambda said: SourceError(f"{text}: the function cannot be called ({said})")):
        given = function()
        # A generator that never ends should not fill the memory.
        batches = given if not hasattr(given, "__next__") else list(itertools.islice(given, MOST_BATCHES))
    return checked_batches(batches, text)


def synthetic_inputs(model: "nn.Module", shape: Sequence[int]) -> list[Any]:
    """Batches of this shape made of the model alone, with a progress bar. Raises SettingError."""
    from ..simulation.synthetic import synthetic_batches

    with progress_bar("making inputs") as progress:
        return list(synthetic_batches(model, list(shape), progress=progress))


def loaded_module(source: str, factory: str | None, key: str | None) -> "nn.Module":
    """The module that a source is, or the factory's with the weights of the checkpoint that it is.

    Raises SettingError where a checkpoint has no factory or a module has one, and SourceError.
    """
    from ..checkpoints.checkpoint import read_checkpoint
    from .sources import make_module, resolve_source

    given = resolve_source(source)
    if given.module is not None:
        if factory is not None or key is not None:
            raise SettingError("model: --model and --weights say what a checkpoint holds, and SOURCE is a module")
        return given.module
    if given.is_table or factory is None:
        raise SettingError(
            f"{source}: is a file, and only a module can be run; add --model package.module:factory, which makes it"
        )
    model = make_module(factory)
    load_tensors(model, given.path, read_checkpoint(given.path, key, whole=True).tensors, factory)
    return model


def check_sensitivities(model: "nn.Module | Path", names: Sequence[str], activations: bool) -> None:
    """Refuse, before the work, a file, and kinds that are not installed. Raises SettingError or PluginError."""
    from ..common import registry

    if isinstance(model, Path):
        what = "activations" if activations else "sensitivity"
        raise SettingError(f"{what}: {model} is a file, and only a module can be run: package.module:factory")
    for name in names:
        registry.load("sensitivities", name)


@dataclass(frozen=True)
class OnInputs:
    """What is measured of a model by running it: sensitivities of its weights, and its layers' inputs.

    activations: how inputs are quantized, None where they are not measured; input_bits: their widths, None for the
    usual ones; function: what names the function that gives an output.
    """

    sensitivities: tuple[str, ...]
    activations: "Activations | None"
    input_bits: tuple[int, ...] | None
    calibration: str
    function: str | None

    def added(
        self, table: "LayerTable | TypeTable", model: Any, store: "Store | None", executor: "Executor | None"
    ) -> "LayerTable | TypeTable":
        """The table with these; finished layers are kept in the store. Raises as what measures them."""
        from ..measurement.sensitivity import sensitivity

        batches = calibration_batches(self.calibration)
        output = named_function(self.function) if self.function is not None else None
        for name in self.sensitivities:
            with progress_bar(name) as progress, redirect_stdout(sys.stderr):
                table = sensitivity(  # type: ignore[type-var]  # either kind gives its own
                    model, table, name, batches, output=output, executor=executor, store=store, progress=progress
                )
        if self.activations is None:
            return table
        return self._with_inputs(self.activations, table, model, batches, output, store, executor)

    def _with_inputs(
        self, how: "Activations", table: Any, model: Any, batches: list[Any], output: Any, store: "Store | None",
        executor: "Executor | None",
    ) -> "LayerTable":  # fmt: skip
        """The sensitivities that inputs have too are measured of them; output_mse where none is given."""
        from ..measurement.activations import INPUT_BITS, INPUT_SENSITIVITIES, measure_activations

        names = [name for name in self.sensitivities if name in INPUT_SENSITIVITIES] or ["output_mse"]
        with progress_bar("inputs") as progress, redirect_stdout(sys.stderr):
            return measure_activations(
                model, table, batches, self.input_bits or INPUT_BITS, activations=how, sensitivities=names,
                output=output, executor=executor, store=store, progress=progress,
            )  # fmt: skip


def load_tensors(
    model: "nn.Module", checkpoint: Path, stored: "Mapping[str, StoredTensor]", factory: str
) -> Mapping[str, str]:
    """Put the checkpoint's tensors into the model; what its tensors are called there.

    stored: what the checkpoint holds. Raises SourceError for another model's.
    """
    from ..models.wrappers import renaming

    state = model.state_dict()
    groups = _tied(model)
    names = renaming(groups, (), stored) or {name: name for name in chain(*groups)}
    missing = [group[0] for group in groups if not any(names.get(name) in stored for name in group)]
    if missing:
        raise SourceError(f"{factory}: has {missing[0]!r}, which {checkpoint} lacks; name the checkpoint's own model")
    given = {name: stored[names[name]].tensor() for name in chain(*groups) if names.get(name) in stored}
    try:
        model.load_state_dict({**state, **given})
    except RuntimeError as error:
        raise SourceError(f"{factory}: does not take {checkpoint} ({what_it_said(error)})") from error
    return names


def _tied(model: "nn.Module") -> list[list[str]]:
    """The names of each of a model's tensors; a tied one has several, of which a file may have but one.

    Scalars are left out: counts of batches, which files leave out, too.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    groups: dict[object, list[str]] = {}
    for name, value in model.state_dict().items():
        if value.dim():
            holder, _, own = name.rpartition(".")
            groups.setdefault(id(getattr(modules.get(holder), own, name)), []).append(name)
    return list(groups.values())
