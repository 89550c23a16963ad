"""The proof that a model holds what a plan says."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..common.public import public
from ..common.text import first_few
from ..errors import VerifyError
from ..models.arguments import check_module
from ..models.kinds import quantizable_weights
from ..models.wrappers import renaming
from ..plans.arguments import check_plan
from ..plans.layers import LayerChoice, Part
from ..plans.plan import Plan
from .calibrate import input_problems
from .layer import most_distinct_values
from .match import as_called
from .model import simulated


@public
@dataclass(frozen=True)
class PartCheck:
    """One part of one layer, as it was found.

    Attributes:
        layer: The layer's name.
        bits: The part's width.
        channels: How many output channels have it.
        values: The most different values that any of its groups holds.
        allowed: How many a group may hold.
        activation_bits: Bits of the layer's input; None for floating point.
    """

    layer: str
    bits: int
    channels: int
    values: int
    allowed: int
    activation_bits: int | None = None


def verify(model: nn.Module, plan: Plan, original: nn.Module | None = None) -> tuple[PartCheck, ...]:
    """Prove that a model holds what the plan says: right layers, none missing, none extra, few enough values.

    Every group that shares a scale may hold at most as many different values as its scheme has levels: 2^b (2^b - 1
    symmetric, 2 at one bit), or 2^(b+1) - 3 with two intervals of b bits. The inputs that the plan quantizes must be,
    at its widths, and no others; to verify weights alone, give without_input_ranges(model) and
    plan.with_activation_bits(None).

    Args:
        model: The quantized model.
        plan: The plan.
        original: The float model. With it, every weight must also equal, to the bit, what `apply` makes of it, and
            skipped layers must be untouched.

    Returns:
        One check per part.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> plan = mpq.Uniform(bits=2)(mpq.measure(net))
        >>> mpq.verify(mpq.apply(net, plan), plan, net)
        (PartCheck(layer='0', bits=2, channels=8, values=4, allowed=4, activation_bits=None),)
    """
    check_module(model)
    check_plan(plan)
    if original is not None:
        check_module(original, "original")
    weights = quantizable_weights(model)
    plan = as_called(plan, weights)
    choices = plan.by_any_name
    present = {choices[name].name for name in weights if name in choices}
    problems = [f"{layer.name!r} is missing" for layer in plan.layers if layer.name not in present]
    expected = _expected(original, plan, weights) if original is not None else {}
    checks: list[PartCheck] = []
    for name, weight in weights.items():
        if name not in choices:
            if name not in plan.skipped:
                problems.append(f"{name!r} is not in the plan")
        elif tuple(weight.shape) != choices[name].shape:
            problems.append(f"{name!r} has shape {list(weight.shape)}, the plan {list(choices[name].shape)}")
        else:
            if not weight.isfinite().all():
                problems.append(f"{name!r} holds NaN or infinite weights")
            part_checks = [
                _check_part(weight, choices[name], part) for part in choices[name].all_parts if part.bits <= 8
            ]
            problems += [_too_many(check) for check in part_checks if check.values > check.allowed]
            checks += part_checks
        if original is not None and not (name in expected and expected[name].equal(weight)):
            problems.append(f"{name!r} differs from what the plan makes of the original")
    problems += input_problems(model, plan)
    if problems:
        raise VerifyError(f"{type(model).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


def _expected(original: nn.Module, plan: Plan, present: Iterable[str]) -> dict[str, Tensor]:
    """What the plan makes of the float model's weights, by the names that the model in hand has for them."""
    weights = quantizable_weights(simulated(original, plan))
    names = renaming([(name,) for name in weights], (), present)
    return {names.get(name, name): weight for name, weight in weights.items()}


def _check_part(weight: Tensor, choice: LayerChoice, part: Part) -> PartCheck:
    values = most_distinct_values(weight, choice, part.runs)
    return PartCheck(
        choice.name, part.bits, len(part.channels), values, choice.scheme.levels(part.bits), choice.activation_bits
    )


def _too_many(check: PartCheck) -> str:
    return f"{check.layer!r} has {check.values} values where {check.bits} bits allow {check.allowed}"
