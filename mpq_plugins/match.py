"""Does a plan fit a source: the same layers, the same shapes, the same weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .errors import MismatchError, WeightError, first_few
from .files import unchanged
from .measure.error import weights_fingerprint
from .plan import LayerChoice, Plan
from .weights import Weight, Weights, find_weights

CHUNK = 1 << 20  # weights compared at a time


@dataclass(frozen=True)
class Match:
    """problems: why the plan cannot be used here; notes: what a careful user wants to know all the same."""

    layers: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def require(self, where: str) -> None:
        """Raise MismatchError where there are problems."""
        if self.problems:
            raise MismatchError(f"{where}: the plan was made for another model. {' '.join(self.problems)}")


def match(plan: Plan, source: nn.Module | str | Path, *, weights: bool = False) -> Match:
    """Compare a plan with the layers of a module or checkpoint, and on request with its weights (read once).

    Raises SourceError where the source cannot be read.
    """
    module = isinstance(source, nn.Module)
    with unchanged(source):
        found = _found(plan, source, plan.fold_bn and module)
        problems = _problems(plan, found)
        notes = _notes(plan, found) if weights and not problems else []
    if plan.fold_bn and not module:
        problems.append(
            "It was measured with BatchNorm folded in, and a checkpoint file cannot be folded: use the module, "
            "or measure the file itself."
        )
    return Match(len(plan.layers), tuple(problems), tuple(notes if not problems else ()))


def _found(plan: Plan, source: nn.Module | str | Path, fold_bn: bool) -> Weights:
    """All layers but the skipped: those may hold what cannot be quantized."""
    everything = find_weights(source, fold_bn=fold_bn, refuse=False)
    refused = next((w for w in everything if w.refusal and w.name not in plan.skipped), None)
    if refused is not None:
        raise WeightError(f"layer {refused.name!r}: {refused.refusal}, or skip the layer.")
    return everything


def _problems(plan: Plan, found: Weights) -> list[str]:
    present = {name: weight for weight in found for name in weight.names}
    planned = plan.by_any_name
    missing = [name for name in (*plan.by_name, *plan.skipped) if name not in present]
    extra = [w.name for w in found if planned.keys().isdisjoint(w.names) and w.name not in plan.skipped]
    here = {name: layer for name, layer in planned.items() if name in present}
    shapes = [
        f"{name!r} {list(layer.shape)} in the plan, {list(present[name].shape)} here"
        for name, layer in here.items()
        if layer.shape != present[name].shape
    ]
    axes = [name for name, layer in here.items() if not _same_axis(layer, present[name])]
    apart = [] if shapes else [pair for layer in plan.layers if (pair := _apart(layer, present)) is not None]
    problems = []
    if missing:
        problems.append(f"Missing here: {first_few([repr(name) for name in missing], ', ')}.")
    if extra:
        problems.append(f"Here but not in the plan: {first_few([repr(name) for name in extra], ', ')}.")
    if shapes:
        problems.append(f"Other shapes: {first_few(shapes, ', ')}.")
    if axes:
        problems.append(
            f"Planned along another channel axis: {first_few([repr(name) for name in axes], ', ')}; a bare file does "
            "not say that a convolution is transposed, so measure the module."
        )
    if apart:
        problems.append(f"One weight in the plan, and with different values here: {first_few(apart, ', ')}.")
    return problems


def _apart(layer: LayerChoice, present: Mapping[str, Weight]) -> str | None:
    """Two of a tied layer's names, in quotes, that have different values here."""
    first, *others = [name for name in layer.names if name in present] or [layer.name]
    for name in others:
        if not _equal(present[first], present[name]):
            return f"{first!r} and {name!r}"
    return None


def _equal(one: Weight, other: Weight) -> bool:
    """Whether two weights of one shape have the same values, read a few rows at a time."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.channel_axis != other.channel_axis:
        return False
    step = max(1, CHUNK // max(1, one.numel // max(1, one.channels)))
    starts = range(0, one.channels, step)
    ends = [(start, min(start + step, one.channels)) for start in starts]
    return all(one.rows(start, stop).equal(other.rows(start, stop)) for start, stop in ends)


def _same_axis(layer: LayerChoice, weight: Weight) -> bool:
    if layer.channel_axis == weight.channel_axis or layer.shape != weight.shape:
        return True  # another shape is reported as such
    return layer.scheme.granularity == "per_tensor" and layer.parts is None


def _notes(plan: Plan, found: Weights) -> list[str]:
    present = {name: weight for weight in found for name in weight.names}
    if weights_fingerprint(present[layer.name] for layer in plan.layers) == plan.model:
        return []
    return [
        "The layers are the plan's, their weights are not those it was made from: trained further, quantized, or "
        "folded (or a transposed convolution was planned from a bare file)."
    ]
