"""From words on the command line to calibration inputs, and to what they correct in a checkpoint."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.outsiders import outsiders
from ..common.text import what_it_said
from ..errors import SettingError, SourceError
from ..report.progress import progress_bar
from .functions import named_function

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..checkpoints.readers import StoredTensor
    from ..common.store import Store
    from ..plans.plan import Plan
    from ..plans.table import LayerTable

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


def synthetic(model: "nn.Module", shape: Sequence[int]) -> list[Any]:
    """Batches of this shape made of the model alone, with a progress bar. Raises SettingError."""
    from ..simulation.synthetic import synthetic_batches

    with progress_bar("making inputs") as progress:
        return list(synthetic_batches(model, shape, progress=progress))


def batches_of(model: "nn.Module", calibration: str | None, shape: Sequence[int] | None) -> list[Any] | None:
    """The batches that --calibrate or --synthetic asks for; None for neither. Raises SettingError for both."""
    if calibration is not None and shape is not None:
        raise SettingError("calibrate: --calibrate and --synthetic both say what to correct on; give one")
    if shape is not None:
        return synthetic(model, list(shape))
    return calibration_batches(calibration) if calibration is not None else None


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
    _load(model, given.path, read_checkpoint(given.path, key, whole=True).tensors, factory)
    return model


def corrected_tensors(
    checkpoint: Path,
    stored: "Mapping[str, StoredTensor]",
    plan: "Plan",
    model: "nn.Module",
    factory: str,
    calibration: str | Sequence[int],
) -> Mapping[str, "Tensor"]:
    """Biases and statistics that calibration changes, by the names that they have in the checkpoint.

    stored: what the checkpoint holds. calibration: a function that returns batches, or the shape of synthetic ones.
    factory: what made the model, whose weights become the checkpoint's. Raises as `correct`, or SourceError.
    """
    from ..simulation.correct import correct
    from ..simulation.match import match

    names = _load(model, checkpoint, stored, factory)
    plan = match(plan, model, rewrapped=True).require(factory)
    named = isinstance(calibration, str)
    batches = calibration_batches(str(calibration)) if named else synthetic(model, [int(n) for n in calibration])
    with progress_bar("correcting") as progress, redirect_stdout(sys.stderr):
        corrected = correct(model, plan, batches, progress=progress)
    before, after = model.state_dict(), corrected.state_dict()
    added = [name for name in after if name not in before]
    if added:
        raise SettingError(
            f"calibrate: {added[0]!r}{f' and {len(added) - 1} more' if len(added) > 1 else ''} would be new: the layer "
            "has no bias and no BatchNorm to take the correction, and the checkpoint no place for it. Use "
            "mpq_plugins.apply(model, plan, calibrate=batches) and save the module"
        )
    return {names.get(name, name): value for name, value in after.items() if not value.equal(before[name])}


def check_sensitivities(model: "nn.Module | Path", names: Sequence[str]) -> None:
    """Refuse, before the work, a file, and kinds that are not installed. Raises SettingError or PluginError."""
    from ..common import registry

    if isinstance(model, Path):
        raise SettingError(f"sensitivity: {model} is a file, and only a module can be run: package.module:factory")
    for name in names:
        registry.load("sensitivities", name)


def with_sensitivities(
    table: "LayerTable",
    model: Any,
    names: Sequence[str],
    calibration: str,
    output_function: str | None,
    store: "Store | None",
) -> "LayerTable":
    """The table with these sensitivities; finished layers are kept in the store. Raises as `sensitivity`."""
    from ..measurement.sensitivity import sensitivity

    batches = calibration_batches(calibration)
    function = named_function(output_function) if output_function is not None else None
    for name in names:
        with progress_bar(name) as progress, redirect_stdout(sys.stderr):
            table = sensitivity(model, table, name, batches, output=function, store=store, progress=progress)
    return table


def _load(
    model: "nn.Module", checkpoint: Path, stored: "Mapping[str, StoredTensor]", factory: str
) -> Mapping[str, str]:
    """Put the checkpoint's tensors into the model; what its tensors are called there."""
    from ..models.wrappers import renaming

    state = model.state_dict()
    wanted = [name for name, value in state.items() if value.dim()]
    names = renaming([(name,) for name in wanted], (), stored) or {name: name for name in wanted}
    missing = [name for name in wanted if names[name] not in stored]
    if missing:
        raise SourceError(f"{factory}: has {missing[0]!r}, which {checkpoint} lacks; name the checkpoint's own model")
    given = {name: stored[names[name]].tensor() for name in wanted}
    try:
        model.load_state_dict({**state, **given})
    except RuntimeError as error:
        raise SourceError(f"{factory}: does not take {checkpoint} ({what_it_said(error)})") from error
    return names
