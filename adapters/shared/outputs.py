"""Whether a quantized model computes what the plan's simulation computes, on a batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mpq_plugins.errors import SettingError
from mpq_plugins.models.running import call_model, run_model, seeded
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.model import simulated

FLOAT_ROUNDING = 1e-4
"""What the same weights may come to in another order of additions, as a part of the outputs' norm."""
HALF_ROUNDING = 1e-2
"""The same in a network that computes in half precision, or with scales in it."""
INPUT_ROUNDING = 0.05
"""What inputs of 8 bits may come to over a network, as a part of the outputs' norm; twice that for each bit less."""


def output_problems(
    quantized: nn.Module, plan: Plan, model: nn.Module, batch: Any, *, packed: bool = False
) -> list[str]:
    """How a quantized model's outputs on a batch differ from those of `mpq_plugins.apply(model, plan)`, if they do.

    batch: None compares nothing. packed: the backend keeps scales in half precision. Raises SettingError where the
    float model does not run on the batch, and what `apply` raises.
    """
    if batch is None:
        return []
    simulation = simulated(model, plan)
    tolerance = HALF_ROUNDING if packed or not _is_single(model) else FLOAT_ROUNDING
    widths = [layer.activation_bits for layer in plan.layers if layer.activation_bits is not None]
    if widths:
        tolerance = INPUT_ROUNDING * 2.0 ** max(0, 8 - min(widths))
    problem = output_problem(quantized, simulation, batch, tolerance)
    return [] if problem is None else [f"on the batch, beside mpq_plugins.apply's, {problem}"]


def output_problem(quantized: nn.Module, reference: nn.Module, batch: Any, tolerance: float) -> str | None:
    """How the outputs of two models on a batch differ, in words; None where they agree.

    Every tensor of the outputs must have the reference's shape, and differ by no more than `tolerance` of its norm;
    whole numbers and truth values are not compared, for an argmax may go either way. Raises SettingError where the
    reference itself does not run.
    """
    expected = _run(reference, batch)
    try:
        outputs = _run(quantized, batch)
    except SettingError as error:
        return f"it does not run: {error}"
    return difference(outputs, expected, tolerance)


def difference(outputs: Any, reference: Any, tolerance: float) -> str | None:
    """How outputs differ from others of the same structure, in words, as in output_problem; None where they agree."""
    given, expected = [*_tensors(outputs)], [*_tensors(reference)]
    if len(given) != len(expected):
        return f"it gives {len(given)} tensors, not {len(expected)}"
    for number, (output, other) in enumerate(zip(given, expected, strict=True), 1):
        which = "its output" if len(expected) == 1 else f"output {number} of {len(expected)}"
        if output.shape != other.shape:
            return f"{which} has shape {list(output.shape)}, not {list(other.shape)}"
        if other.is_floating_point() or other.is_complex():
            problem = _distance(output, other, tolerance)
            if problem is not None:
                return f"{which} {problem}"
    return None


def _run(model: nn.Module, batch: Any) -> Any:
    """A model that draws numbers draws the same each time."""
    with seeded(0), torch.no_grad():
        if isinstance(model, torch.fx.GraphModule):  # an exported one has its mode in it, and refuses another
            return call_model(model, batch)
        return run_model(model, batch)


def _distance(output: Tensor, other: Tensor, tolerance: float) -> str | None:
    output, other = output.cpu(), other.cpu()
    finite = other.isfinite()
    if not output.isfinite().equal(finite):
        return "is NaN or infinite where it is not to be"
    off, norm = (output - other)[finite].double().norm(), other[finite].double().norm()
    if off <= tolerance * norm:
        return None
    return f"is off by {float(off / norm):.1%} of its norm, and may be by {tolerance:.2%}"


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Every tensor of an output, of any structure."""
    plain = dict(outputs) if isinstance(outputs, Mapping) else outputs
    for leaf in tree_leaves(plain):
        if isinstance(leaf, Tensor):
            yield leaf
        elif leaf is not plain and isinstance(leaf, Mapping):
            yield from _tensors(leaf)


def _is_single(model: nn.Module) -> bool:
    return all(
        parameter.dtype in (torch.float32, torch.float64)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    )
