"""From words on the command line to calibration inputs, and to the model that runs them."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.outsiders import outsiders
from ..common.text import what_it_said
from ..errors import SettingError, SourceError
from ..report.progress import progress_bar
from .functions import named_function

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoints.readers import StoredTensor
    from ..common.store import Store
    from ..measurement.sensitivity import AnyTable

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


def check_sensitivities(model: "nn.Module | Path", names: Sequence[str]) -> None:
    """Refuse, before the work, a file, and kinds that are not installed. Raises SettingError or PluginError."""
    from ..common import registry

    if isinstance(model, Path):
        raise SettingError(f"sensitivity: {model} is a file, and only a module can be run: package.module:factory")
    for name in names:
        registry.load("sensitivities", name)


def with_sensitivities(
    table: "AnyTable",
    model: Any,
    names: Sequence[str],
    calibration: str,
    output_function: str | None,
    store: "Store | None",
) -> "AnyTable":
    """The table with these sensitivities; finished layers are kept in the store. Raises as `sensitivity`."""
    from ..measurement.sensitivity import sensitivity

    batches = calibration_batches(calibration)
    function = named_function(output_function) if output_function is not None else None
    for name in names:
        with progress_bar(name) as progress, redirect_stdout(sys.stderr):
            table = sensitivity(model, table, name, batches, output=function, store=store, progress=progress)
    return table


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
