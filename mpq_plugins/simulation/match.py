"""Does a plan fit a source: the same layers, the same shapes, the same weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..checkpoints.checkpoint import Checkpoint, read_checkpoint
from ..common.files import unchanged
from ..common.text import first_few
from ..errors import MismatchError, WeightError
from ..measurement.error import weights_fingerprint
from ..models.tracing import Traced
from ..models.wrappers import renaming
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from ..weights.find import checkpoint_weights, could_be_layers, known_by, weights_of_module
from ..weights.from_checkpoint import Known, KnownLayer
from ..weights.handles import Weight, Weights

CHUNK = 1 << 20  # weights compared at a time


@dataclass(frozen=True)
class Match:
    """problems: why the plan cannot be used here; notes: what a careful user wants to know all the same.

    plan: with the names that its layers have here; present: all layers that are here; checkpoint: what the source
    holds, where it is one.
    """

    layers: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    plan: Plan
    present: Weights
    checkpoint: Checkpoint | None = None

    def require(self, where: str) -> Plan:
        """The plan, as it is called here. Raises MismatchError where there are problems."""
        if self.problems:
            raise MismatchError(f"{where}: the plan was made for another model. {' '.join(self.problems)}")
        return self.plan


def match(  # noqa: PLR0913  # each option is what one caller knows
    plan: Plan,
    source: nn.Module | str | Path,
    *,
    weights: bool = False,
    rewrapped: bool = False,
    key: str | None = None,
    model: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    traced: Traced | None = None,
) -> Match:
    """Compare a plan with the layers of a module or checkpoint, and on request with its weights (read once).

    rewrapped: whether a module may be wrapped otherwise than the plan's was (DataParallel, torch.compile), so that the
    plan to use is the match's; of a checkpoint that is always so. key: of a torch checkpoint, the weights that are
    meant, where they are not those the plan was made from. model: the module whose checkpoint the source is;
    checkpoint: the source's own, where it has been read. traced: the source, a module, as torch.fx sees it, where that
    is known. Raises SourceError where the source cannot be read.
    """
    with unchanged(source):
        if checkpoint is None and not isinstance(source, nn.Module):
            checkpoint = read_checkpoint(Path(source), key, prefer=plan.weights)
        return _compared(plan, source, weights, rewrapped, checkpoint, model, traced)


def _compared(
    plan: Plan,
    source: nn.Module | str | Path,
    weights: bool,
    rewrapped: bool,
    checkpoint: Checkpoint | None,
    model: nn.Module | None,
    traced: Traced | None,
) -> Match:
    if isinstance(source, nn.Module):
        present = weights_of_module(traced or Traced(source), fold_bn=plan.fold_bn, refuse=False)
        everything = [name for name, _ in source.named_modules(remove_duplicate=False)]
        named = as_called(plan, [name for weight in present for name in weight.names]) if rewrapped else plan
        remedy = ""
    else:
        assert checkpoint is not None, "a file that was not read"
        named = as_called(plan, could_be_layers(checkpoint))
        known = _known(named)
        if model is not None:
            told = known_by(model, checkpoint)
            known = replace(told, layers={**known.layers, **told.layers}, none=known.none, tied=known.tied + told.tied)
        present = checkpoint_weights(checkpoint, Path(source), known, refuse=False, already_quantized=True)
        everything = list(checkpoint.tensors)
        remedy = "" if model is not None else _REMEDY
    _refuse(named, present)
    problems = _problems(named, present, everything, remedy)
    if plan.fold_bn and not isinstance(source, nn.Module):
        problems.append(
            "It was measured with BatchNorm folded in, and a checkpoint file cannot be folded: use the module, "
            "measure the file itself, or plan with fold_bn=False (--fold-bn no)."
        )
    notes = _notes(plan, named, present) if weights and not problems else []
    return Match(len(plan.layers), tuple(problems), tuple(notes), named, present, checkpoint)


_REMEDY = (
    " A bare file does not say what is no layer: name the model that it is of (--model package.module:factory, "
    "model=), or measure again."
)


def as_called(plan: Plan, present: Iterable[str]) -> Plan:
    """The plan with the names that its layers have in a model that may be wrapped otherwise."""
    others = [*plan.skipped, *(parameter.removesuffix(".weight") for parameter in plan.left_alone)]
    return plan.renamed(renaming([layer.names for layer in plan.layers], others, present))


def _known(plan: Plan) -> Known:
    """What a plan says of its model's checkpoint."""
    layers = {name: KnownLayer(layer.kind, layer.channel_axis, layer.shape) for name, layer in plan.by_any_name.items()}
    return Known(layers, frozenset(plan.left_alone), tuple(layer.names for layer in plan.layers if layer.tied))


def _refuse(plan: Plan, present: Weights) -> None:
    """All layers but the skipped must be such as can be quantized."""
    refused = next((w for w in present if w.refusal and w.name not in plan.skipped), None)
    if refused is not None:
        raise WeightError(f"layer {refused.name!r}: {refused.refusal}, or skip the layer.")


def _problems(plan: Plan, weights: Weights, everything: list[str], remedy: str) -> list[str]:
    present = {name: weight for weight in weights for name in weight.names}
    planned = set(plan.by_any_name)
    missing = [layer.name for layer in plan.layers if present.keys().isdisjoint(layer.names)]
    missing += [name for name in plan.skipped if name not in present and not _is_there(name, everything)]
    extra = [w.name for w in weights if not planned.intersection(w.names) and w.name not in plan.skipped]
    pairs = [(name, layer, present[name]) for name, layer in plan.by_any_name.items() if name in present]
    shapes = [
        f"{name!r} {list(layer.shape)} in the plan, {list(weight.shape)} here"
        for name, layer, weight in pairs
        if layer.shape != weight.shape
    ]
    axes = [name for name, layer, weight in pairs if not _same_axis(layer, weight)]
    problems = []
    if missing:
        problems.append(f"Missing here: {first_few([repr(name) for name in missing], ', ')}.")
    if extra:
        problems.append(f"Here but not in the plan: {first_few([repr(name) for name in extra], ', ')}.{remedy}")
    if shapes:
        problems.append(f"Other shapes: {first_few(shapes, ', ')}.")
    if axes:
        problems.append(
            f"Planned along another channel axis: {first_few([repr(name) for name in axes], ', ')}; a bare file does "
            "not say that a convolution is transposed, so measure the module."
        )
    return problems + _tie_problems(plan, present)


def _is_there(name: str, everything: list[str]) -> bool:
    """Whether a skipped layer has anything here: what cannot be quantized need not be a weight."""
    return any(
        module_name == name or module_name.startswith(f"{name}.") or (not name and module_name)
        for module_name in everything
    )


def _tie_problems(plan: Plan, present: Mapping[str, Weight]) -> list[str]:
    """Names that are one weight in the plan and differ here, or the other way round with different widths."""
    problems = []
    for layer in plan.layers:
        names = [name for name in layer.names if name in present]
        other = next((name for name in names if not _equal(present[names[0]], present[name])), None)
        if other is not None:
            problems.append(f"One weight in the plan, and with different values here: {names[0]!r} and {other!r}.")
    seen: dict[str, LayerChoice] = {}
    for layer in plan.layers:
        stored_name = next((present[name].name for name in layer.names if name in present), layer.name)
        first = seen.setdefault(stored_name, layer)
        if first is not layer and not _same_choice(first, layer):
            problems.append(
                f"One weight here, and planned apart with different widths: {first.name!r}, {layer.name!r}; measure "
                "again, or pin both to one width."
            )
    return problems


def _same_choice(one: LayerChoice, other: LayerChoice) -> bool:
    return (one.bits, one.parts, one.scheme) == (other.bits, other.parts, other.scheme)


def _equal(one: Weight, other: Weight) -> bool:
    """Whether two weights have the same values, read a few rows at a time; of two shapes they do not."""
    if one is other:
        return True
    if (one.shape, one.dtype, one.channel_axis) != (other.shape, other.dtype, other.channel_axis):
        return False
    step = max(1, CHUNK // max(1, one.numel // max(1, one.channels)))
    starts = range(0, one.channels, step)
    ends = [(start, min(start + step, one.channels)) for start in starts]
    return all(one.rows(start, stop).clone().equal(other.rows(start, stop)) for start, stop in ends)


def _same_axis(layer: LayerChoice, weight: Weight) -> bool:
    if layer.channel_axis == weight.channel_axis or layer.shape != weight.shape:
        return True  # another shape is reported as such
    return layer.scheme.granularity == "per_tensor" and layer.parts is None


def _notes(plan: Plan, named: Plan, present: Weights) -> list[str]:
    """named: the plan with the names that are here; fingerprints are of the plan's."""
    planned = {name: first.name for first, here in zip(plan.layers, named.layers, strict=True) for name in here.names}
    here = (replace(weight, name=planned[weight.name]) for weight in present if weight.name in planned)
    if weights_fingerprint(here) == plan.model:
        return []
    return [
        "The layers are the plan's, their weights are not those it was made from: trained further, quantized, or "
        "folded (or a transposed convolution was planned from a bare file)."
    ]
