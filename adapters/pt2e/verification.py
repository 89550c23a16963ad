"""Proof that a converted PT2E model holds the plan: its integer codes, read back and compared."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SourceError, VerifyError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight

from ..contract import LayerCheck
from ..shared.folded import biases_of, check_model, integers_of
from ..shared.input_ranges import same_range, taken_ranges
from ..shared.outputs import output_problems
from .folded import attribute, folding_factors, rounded_fold, weight_names
from .graph import is_operator
from .quantizer import FACTOR, LAYER


def verify(
    quantized: torch.fx.GraphModule, plan: Plan, model: nn.Module, *, batch: Any = None
) -> tuple[LayerCheck, ...]:
    """Read the integer codes back from what `convert_pt2e` made, and compare them, scales and zero points too.

    Every planned layer must be there in each of its calls, with its own bias, its inputs quantized to 8 bits if and
    only if the plan says so, and nothing else may be quantized. Ranges of inputs must be those that the model carries;
    where it carries none they are the calibration's. Not judged are biases into which a norm was folded that torch.fx
    does not show.

    Args:
        quantized: The converted model.
        plan: The plan.
        model: The float model.
        batch: Inputs on which the outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their
            norm), or with 8-bit activations within 5 %.

    Returns:
        A check for each planned layer.

    Raises:
        VerifyError: The model does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SettingError: The float model does not run on the batch.
        SourceError: The converted model is no GraphModule.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import pt2e
        >>> net, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(2, 8)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> pt2e.verify(pt2e.apply(net, plan, [inputs]), plan, net, batch=inputs)[0].layer
        '0'
    """
    check_module(quantized, "quantized")
    if not isinstance(quantized, torch.fx.GraphModule):
        raise SourceError(f"{type(quantized).__name__}: no GraphModule; give what convert_pt2e made")
    model, ranges = taken_ranges(plan, model)
    traced = Traced(model)
    check_model(plan, model, traced)
    fold = rounded_fold(traced, plan)
    folded = fold.model
    expected, biases = integers_of(plan, fold), biases_of(folded)
    problems: list[str] = []
    checks: dict[str, LayerCheck] = {}
    for node in quantized.graph.nodes:
        name = _layer_of(node, plan)
        weight = next(
            (source for source in _weight_sources(node) if is_operator(source, "dequantize_per_channel")), None
        )
        if node.meta.get(LAYER) is not None and name in expected and weight is None:
            problems.append(f"{name!r} is in float in one of its calls")
        if weight is None:
            continue
        if name not in expected:
            problems.append(f"{name!r} is quantized and the plan leaves it in float")
            continue
        inputs = [source for source in node.all_input_nodes if is_operator(source, "dequantize_per_tensor")]
        problem = (
            _problem(quantized, weight, _rescaled(expected[name], node))
            or _input_problem(inputs, plan.by_name[name].activations is not None)
            or _range_problem(inputs, ranges.get(_module_of(node) or name))
            or (None if FACTOR in node.meta else _bias_problem(quantized, node, biases.get(_module_of(node) or name)))
        )
        if problem:
            problems.append(f"{name!r} {problem}")
        bits = plan.by_name[name].activation_bits if inputs else None
        checks[name] = LayerCheck.of(
            plan.by_name[name], "int8", bits, input_range=_range(inputs[0]) if inputs else None
        )
    problems += _changed_weights(quantized, folded, set(expected))
    problems += [
        f"{str(node.args[0])!r} is quantized in the graph and the plan does not say so"
        for node in quantized.graph.nodes
        if is_operator(node, "quantize_per_tensor") and (not plan.quantizes_inputs or _of_a_weight(node))
    ]
    problems += [f"{name!r} was left in float" for name in expected if name not in checks]
    problems = problems or output_problems(quantized, plan, model, batch)
    if problems:
        raise VerifyError(f"{type(quantized).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(checks[name] for name in expected)


def _rescaled(expected: IntegerWeight, node: torch.fx.Node) -> IntegerWeight:
    return expected.rescaled(node.meta[FACTOR]) if FACTOR in node.meta else expected


def _weight_sources(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What a node takes, seen through the views that an operator puts before its weight."""
    if node.op != "call_function" or is_operator(node, ""):
        return []
    if LAYER not in node.meta and len(node.all_input_nodes) == 1:
        return []  # a view itself
    sources: list[torch.fx.Node] = []
    for source in node.all_input_nodes:
        while (
            LAYER not in source.meta
            and source.op == "call_function"
            and not is_operator(source, "")
            and len(source.all_input_nodes) == 1
        ):
            (source,) = source.all_input_nodes
        sources.append(source)
    return sources


def _input_problem(inputs: list[torch.fx.Node], wanted: bool) -> str | None:
    """Whether the inputs are quantized as the plan says: to 8 bits, the same way in and out, and calibrated."""
    if bool(inputs) != wanted:
        return f"takes its input {'quantized' if inputs else 'in float'}"
    for node in inputs:
        scale, zero_point, low, high = node.args[1:5]
        source = cast(torch.fx.Node, node.args[0])
        if (
            not is_operator(source, "quantize_per_tensor")
            or source.args[1:5] != node.args[1:5]
            or cast(int, high) - cast(int, low) != 255
        ):
            return "takes an input that is not quantized to 8 bits"
        if scale == 1.0 and zero_point == 0:
            return "was not calibrated: run batches through the prepared model before converting"
    return None


def _range(node: torch.fx.Node) -> InputRange:
    scale, zero_point, low, high = cast("tuple[float, int, int, int]", node.args[1:5])
    return InputRange((high - low).bit_length(), scale, zero_point)


def _range_problem(inputs: list[torch.fx.Node], carried: InputRange | None) -> str | None:
    for node in inputs:
        if carried is not None and not same_range(_range(node), carried):
            return f"has its input in another range than the model carries: {_range(node)}, {carried}"
    return None


def _bias_problem(converted: torch.fx.GraphModule, node: torch.fx.Node, expected: Tensor | None) -> str | None:
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, torch.fx.Node) or bias.op != "get_attr":
        return None if expected is None or not expected.any() else "has no bias, and the folded model one"
    stored = attribute(converted, str(bias.target))
    same = stored.equal(expected) if expected is not None else not stored.any()
    return None if same else "has a bias that is not the folded model's"


def _changed_weights(converted: torch.fx.GraphModule, folded: nn.Module, planned: set[str]) -> list[str]:
    """Layers left in float whose weights are not the folded model's, but for what PT2E folded besides."""
    factors, others = folding_factors(converted, folded)
    names = weight_names(folded)
    nodes = [node for node in converted.graph.nodes if node.op == "get_attr" and str(node.target) in names]
    noted = {names[str(node.target)] for node in nodes if any(FACTOR in user.meta for user in node.users)}
    return [
        f"{name!r} has other weights than the folded model's, and the plan leaves it in float"
        for name in (*others, *(factors.keys() - noted))
        if name not in planned
    ]


def _of_a_weight(node: torch.fx.Node) -> bool:
    return cast(torch.fx.Node, node.args[0]).op == "get_attr"


def _module_of(node: torch.fx.Node) -> str | None:
    """The name of the module that called a node."""
    names = [str(path[0]) for path in (node.meta.get("nn_module_stack") or {}).values()]
    return names[-1] if names else None


def _layer_of(node: torch.fx.Node, plan: Plan) -> str:
    """The layer a node computes: as it was marked, else by the module it came from."""
    if LAYER in node.meta:
        return str(node.meta[LAYER])
    last = _module_of(node) or str(node.name)
    return plan.by_any_name[last].name if last in plan.by_any_name else last


def _problem(converted: torch.fx.GraphModule, node: torch.fx.Node, expected: IntegerWeight) -> str | None:
    sources = [cast(torch.fx.Node, argument) for argument in node.args[:3]]
    codes, scale, zero_point = (attribute(converted, str(source.target)) for source in sources)
    problem = expected.code_problem(codes)
    if problem is not None:
        return problem
    if not (scale.equal(expected.scale[:, 0]) and zero_point.equal(expected.zero_point[:, 0])):
        return "has other scales or zero points than the plan's"
    return None
