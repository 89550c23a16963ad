"""Proof that a converted FX model holds the plan: its integer codes, read back and compared."""

from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError, SourceError, VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.folding import Folded
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight
from mpq_plugins.simulation.model import simulated

from ..contract import LayerCheck, class_name
from ..shared.folded import biases_of, check_model, integers_of, planned_layers
from ..shared.input_ranges import reduced, same_range, taken_ranges
from ..shared.outputs import output_problem
from .inputs import REDUCED, input_range

TOLERANCE = 0.1
"""Of an output's norm. One tensor of 8 bits is off by 0.5 to 1 % of its norm, and what a net's layers are off by adds
up: 3 % was measured on a trained ResNet-20, 3 to 6 % on nets of random weights as deep as ResNet-18."""


def verify(
    quantized: nn.Module,
    plan: Plan,
    model: nn.Module,
    integers: dict[str, IntegerWeight] | None = None,
    *,
    batch: Any = None,
    tolerance: float = TOLERANCE,
) -> tuple[LayerCheck, ...]:
    """Read the integer codes back from what `convert_fx` or `convert_to_reference_fx` made, and compare them.

    Every planned layer must be a quantized module, fed by quantized activations, whose codes, scales and zero points
    are the plan's of the float model, and whose bias is its own; every other layer must be in float. Ranges of inputs
    must be those that the model carries; where it carries none they are the calibration's.

    Args:
        quantized: The converted model.
        plan: The plan.
        model: The float model.
        integers: After QAT, what finish_qat returned.
        batch: Inputs, a tensor or a tuple or mapping of arguments, on which the converted model must also run, and give
            what `mpq_plugins.apply(model, plan)` gives. That is where ranges are judged: give inputs like those that it
            was calibrated on.
        tolerance: For every output, |converted - applied| <= tolerance |applied|.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The model does not run on the batch; or a batch is given after QAT, which trained more than the
            weights.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import fx
        >>> net, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(32, 8)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net)).with_activation_bits(8)
        >>> fx.verify(fx.apply(net, plan, [inputs]), plan, net, batch=inputs)[0].layer
        '0'
    """
    check_module(quantized, "quantized")
    model, ranges = taken_ranges(plan, model)
    traced = Traced(model)
    check_model(plan, model, traced)
    if integers is not None and batch is not None:
        raise SettingError(
            "batch: after QAT biases and norms are trained too, so there is no float model to compare outputs with; "
            "verify the integers alone, and judge the outputs by their accuracy"
        )
    folded = Folded.of(traced, plan.skipped)
    expected = integers_of(plan, folded) if integers is None else integers
    biases = biases_of(folded.model)
    problems: list[str] = []
    checks: list[LayerCheck] = []
    inputs = _inputs(quantized)
    for layer in planned_layers(plan):
        module = _stored(quantized, layer.name)
        problem = _problem(module, expected[layer.name]) or _input_problem(module, inputs.get(layer.name))
        found = input_range(quantized, inputs.get(layer.name))
        problem = problem or _range_problem(found, ranges.get(layer.name))
        if integers is None:
            problem = problem or _bias_problem(module, biases[layer.name])
        if problem:
            problems.append(f"{layer.name!r} {problem}")
            continue
        checks.append(LayerCheck.of(layer, class_name(module), layer.activation_bits, input_range=found))
    planned = {layer.name for layer in planned_layers(plan)}
    extra = [
        name
        for name in quantizable_weights(model)
        if name not in planned and _codes(_stored(quantized, name)) is not None
    ]
    problems += [f"{name!r} is quantized and the plan leaves it in float" for name in extra]
    if batch is not None and not problems:
        problem = output_problem(quantized, simulated(model, plan), batch, tolerance)
        problems += [f"on the batch, beside mpq_plugins.apply's, {problem}"] if problem else []
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks)


def _stored(converted: nn.Module, name: str) -> nn.Module | None:
    """The module under a layer's name; of a fused one, the layer inside."""
    try:
        module = converted.get_submodule(name)
    except AttributeError:
        return None
    return module[0] if isinstance(module, nn.Sequential) else module


def _codes(module: nn.Module | None) -> Tensor | None:
    """The quantized weight of a converted or reference module."""
    if module is None:
        return None
    read = getattr(module, "get_quantized_weight", None) or getattr(module, "weight", None)
    weight = read() if callable(read) else None
    return weight if isinstance(weight, Tensor) and weight.is_quantized else None


def _problem(module: nn.Module | None, expected: IntegerWeight) -> str | None:
    if module is None:
        return "is missing"
    weight = _codes(module)
    if weight is None:
        return f"was left in float ({type(module).__name__})"
    problem = expected.code_problem(weight.int_repr())
    if problem is not None:
        return problem
    reached = weight.dequantize()
    if not torch.allclose(reached, expected.dequantized(), rtol=1e-6, atol=0):
        return "has other scales or zero points than the plan's"
    return None


def _inputs(converted: nn.Module) -> dict[str, torch.fx.Node]:
    """The node that feeds each module."""
    if not isinstance(converted, torch.fx.GraphModule):
        raise SourceError(
            f"{type(converted).__name__}: no GraphModule; give what convert_fx or convert_to_reference_fx made"
        )
    calls = [node for node in converted.graph.nodes if node.op == "call_module" and node.args]
    return {str(node.target): cast(torch.fx.Node, node.args[0]) for node in calls}


def _input_problem(module: nn.Module | None, source: torch.fx.Node | None) -> str | None:
    """A quantized module takes nothing but quantized inputs; a reference one must come after a dequantize."""
    if hasattr(module, "get_quantized_weight"):
        return None if source is not None and source.target == "dequantize" else "takes its input in float"
    if getattr(module, "scale", None) == 1.0 and getattr(module, "zero_point", None) == 0:
        return "was not calibrated: run batches through the prepared model before converting"
    return None


def _range_problem(found: InputRange | None, carried: InputRange | None) -> str | None:
    """A range that the model carries is there as it is, or where the processor needs that in steps twice as large."""
    if carried is None:
        return None
    symmetric = carried.zero_point == 2 ** (carried.bits - 1)
    allowed = [carried, *(reduced(carried, REDUCED, symmetric=own) for own in {False, symmetric})]
    if found is not None and any(same_range(found, own) for own in allowed):
        return None
    return f"has its input in another range than the model carries: {found}, {carried}"


def _bias_problem(module: nn.Module | None, expected: Tensor | None) -> str | None:
    bias = getattr(module, "bias", None)
    bias = bias() if callable(bias) else bias
    if (bias is None) != (expected is None):
        return None if bias is not None and not bias.any() else "has a bias that is not the folded model's"
    if isinstance(bias, Tensor) and isinstance(expected, Tensor) and not bias.equal(expected):
        return "has a bias that is not the folded model's"
    return None
