"""What rounding on calibration inputs changes in a checkpoint: weights, biases and statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError
from .calibration import load_tensors
from .fitting import Fitting

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from concurrent.futures import Executor

    from torch import Tensor, nn

    from ..checkpoints.readers import StoredTensor
    from ..plans.plan import Plan

IN_PYTHON = "Use mpq_plugins.apply(model, plan, calibrate=batches) and save the module"


def fitted_tensors(
    checkpoint: Path,
    stored: "Mapping[str, StoredTensor]",
    plan: "Plan",
    model: "nn.Module",
    factory: str,
    fitting: Fitting,
    executor: "Executor | None" = None,
) -> Mapping[str, "Tensor"]:
    """Weights, biases and statistics that calibration changes, by the names that they have in the checkpoint.

    stored: what the checkpoint holds. factory: what made the model, whose weights become the checkpoint's. fitting: has
    inputs. executor: whose workers round. Raises as `apply`, SourceError, and SettingError for what the checkpoint has
    no place for.
    """
    from ..simulation.match import match

    names = load_tensors(model, checkpoint, stored, factory)
    named = match(plan, model, rewrapped=True).require(factory)
    fitted = fitting.fitted(model, named, executor, new_biases=False)  # for which the checkpoint has no place
    before, after = model.state_dict(), fitted.state_dict()
    added, gone = ([name for name in one if name not in other] for one, other in ((after, before), (before, after)))
    if added:
        why = (
            "the layer has no bias and no BatchNorm to take the correction"
            if added[0].endswith("bias")
            else "learning adds the ranges of inputs, which `mpq reconstruct` writes"
        )
        raise SettingError(
            f"calibrate: {added[0]!r}{_and_more(added)} would be new: {why}, and the checkpoint has no place for it. "
            f"{IN_PYTHON}"
        )
    if gone:
        raise SettingError(
            f"calibrate: {gone[0]!r}{_and_more(gone)} would be gone, for the plan folds BatchNorm in, and the "
            f"checkpoint has it. Plan with --fold-bn no. {IN_PYTHON}"
        )
    return {names.get(name, name): value for name, value in after.items() if not value.equal(before[name])}


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
