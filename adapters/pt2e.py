"""A plan in PyTorch 2 export quantization (PT2E, from torchao): a quantizer for `prepare_pt2e` and `convert_pt2e`.

    exported = torch.export.export(model, example_inputs).module()
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    prepared(*batch)                              # with 8-bit activations: calibrate
    quantized = convert_pt2e(prepared)            # runs as it is, or under torch.compile
    pt2e.verify(quantized, plan, model)

A plan with float activations keeps them: only weights are quantized, and the result is to the bit what `apply` makes
of the folded model. Where PT2E folds a norm that torch.fx does not show (a functional one, or in a model that it cannot
trace), codes per channel stay and scales follow, as long as the graph still computes what the model does.

With 8-bit activations, X86InductorQuantizer's rules quantize the inputs of planned linear and two-dimensional
convolution layers, whose weights must be symmetric. The converted state dict still holds the float weights beside the
int8 ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SourceError, VerifyError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import Capabilities, require_legal
from mpq_plugins.plans.names import weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight

from .folded import (
    biases_of,
    check_folding,
    check_max_norm,
    check_model,
    integers_of,
    planned_by_name,
    planned_layers,
    refuse_wrong_pairs,
)
from .outputs import output_problems
from .pt2e_fold import (
    attribute,
    computed_weights,
    folding_factors,
    graph_problem,
    traced_fold,
    weight_names,
    wrong_pairs,
)

CAPABILITIES = Capabilities(
    backend="pt2e",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "embedding"),
    parts=True,
    activation_bits=(None, 8),
    # torch.compile's frozen int8 kernels drop the zero points of weights without a word.
    activation_kinds=("linear", "conv2d"),
    activation_symmetric=(True,),
)
LAYER, FACTOR = "mpq_plugins_layer", "mpq_plugins_factor"
ANNOTATION = "quantization_annotation"


class PlanPerChannelObserver(ObserverBase):  # type: ignore[misc]
    """Returns a layer's stored scales and zero points. PT2E looks for "PerChannel" in the name."""

    def __init__(self, integers: IntegerWeight, **_: Any) -> None:  # the rest of the spec, which is fixed here
        super().__init__(dtype=torch.int8)
        self.integers = integers
        self.ch_axis = integers.channel_axis
        self.qscheme = torch.per_channel_affine
        self.quant_min, self.quant_max = -128, 127

    def forward(self, x: Tensor) -> Tensor:
        """The weight is the plan's already."""
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (channels,) each."""
        return self.integers.scale[:, 0], self.integers.zero_point[:, 0]


class PlanQuantizer(X86InductorQuantizer):  # type: ignore[misc]
    """Quantizes what the plan says, at its integers, and nothing else.

    model: the float model that is exported. Raises SettingError for a plan that PT2E cannot run, MismatchError for
    another model's. While preparing, MismatchError for a layer that the exported graph lacks or that has other weights
    there, for inputs that are to be quantized and cannot be, and where PT2E's folding has made another function.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        super().__init__()
        _check(plan, model)
        self.plan, self.model, self.folded = plan, model, traced_fold(model)
        self.integers, self.factors = integers_of(plan, self.folded), dict[str, Tensor]()
        if plan.activation_bits is not None:
            for layer in planned_layers(plan):
                for name in layer.names:
                    self.set_module_name_qconfig(name, get_default_x86_inductor_quantization_config())

    def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Set every planned weight of the exported graph, BatchNorm folded by now, to what its integers mean."""
        found = {layer.name: node for node, layer in self._weights(model)}
        problems = [f"{name!r} is not in the exported graph: skip it" for name in self.integers if name not in found]
        self.factors, others = folding_factors(model, self.folded)
        problems += [
            f"{name!r} has other weights there than in {type(self.model).__name__}: export that model"
            for name in others
            if name in self.integers
        ]
        problems += [
            f"{name!r} was measured unfolded, and PT2E folds a norm into it, which changes the scale of a whole "
            "tensor: measure per_channel"
            for name in self.factors
            if name in self.integers and self.plan.by_name[name].scheme.granularity == "per_tensor"
        ]
        if not problems and (self.factors or self.folded is self.model):
            problem = graph_problem(model, self.model)
            problems += [f"{_listed(self.factors)}{problem}"] if problem else []
        if problems:
            raise MismatchError(f"pt2e cannot run this plan: {first_few(problems)}")
        for name, node in found.items():
            if name in self.factors:
                self.integers[name] = self.integers[name].rescaled(self.factors[name])
            _replace(model, str(node.target), self.integers[name].dequantized())
        return model

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Mark the weights of planned layers, and with 8-bit activations their inputs."""
        if self.plan.activation_bits is not None:
            super().annotate(model)
        untaken: list[str] = []
        for node, layer in self._weights(model):
            spec = QuantizationSpec(
                dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_affine,
                ch_axis=self.integers[layer.name].channel_axis,
                observer_or_fake_quant_ctr=PlanPerChannelObserver.with_args(integers=self.integers[layer.name]),
            )  # fmt: skip
            for user in node.users:
                annotation = user.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True))
                if self.plan.activation_bits is not None and not annotation.input_qspec_map.keys() - {node}:
                    untaken.append(repr(layer.name))
                annotation.input_qspec_map[node] = spec
                user.meta[LAYER] = layer.name
        if untaken:
            raise MismatchError(
                f"pt2e cannot run this plan: X86InductorQuantizer quantizes no inputs of {first_few(untaken, ', ')}, "
                "for other code than the layer's own computes with the weight, as in MultiheadAttention: skip it, or "
                "plan.with_activation_bits(None)"
            )
        self._note_factors(model)
        return model

    def _note_factors(self, model: torch.fx.GraphModule) -> None:
        """On the nodes that use a rescaled weight, for `verify`."""
        names = weight_names(self.folded)
        for node in model.graph.nodes:
            name = names.get(str(node.target)) if node.op == "get_attr" else None
            for user in node.users if name in self.factors else ():
                user.meta[FACTOR] = self.factors[str(name)]

    def validate(self, model: torch.fx.GraphModule) -> None:
        """Nothing to add: transform_for_annotation has refused what is wrong."""

    def _weights(self, model: torch.fx.GraphModule) -> list[tuple[torch.fx.Node, LayerChoice]]:
        """The planned weights' nodes: their targets are the parameters' names, of tied ones any."""
        planned = {weight_name(name): layer for name, layer in planned_by_name(self.plan).items()}
        nodes = [node for node in model.graph.nodes if node.op == "get_attr" and str(node.target) in planned]
        return [(node, planned[str(node.target)]) for node in nodes if node.users]


@dataclass(frozen=True)
class LayerCheck:
    """One layer as it lies in the converted graph: its bits by channel count; whether its inputs are quantized."""

    layer: str
    bits: tuple[tuple[int, int], ...]
    activations: bool


def verify(
    converted: torch.fx.GraphModule, plan: Plan, model: nn.Module, *, batch: Any = None
) -> tuple[LayerCheck, ...]:
    """Read the integer codes back from what `convert_pt2e` made, and compare them, scales and zero points too.

    Every planned layer must be there in each of its calls, with its own bias, its inputs quantized to 8 bits if and
    only if the plan says so, and nothing else may be quantized. Ranges of activations are the calibration's, and are
    not judged, nor are biases into which a norm was folded that torch.fx does not show. batch: inputs on which the
    outputs must be those of `mpq_plugins.apply`, within float rounding (1e-4 of their norm), or with 8-bit activations
    within 5 %. Raises VerifyError listing what is wrong, MismatchError for another model, SettingError where the float
    model does not run on the batch.
    """
    if not isinstance(converted, torch.fx.GraphModule):
        raise SourceError(f"{type(converted).__name__}: no GraphModule; give what convert_pt2e made")
    check_model(plan, model)
    folded = traced_fold(model)
    expected, biases = integers_of(plan, folded), biases_of(folded)
    problems: list[str] = []
    found: dict[str, LayerCheck] = {}
    for node in converted.graph.nodes:
        name = _layer_of(node, plan)
        weight = next((source for source in _weight_sources(node) if _is(source, "dequantize_per_channel")), None)
        if node.meta.get(LAYER) is not None and name in expected and weight is None:
            problems.append(f"{name!r} is in float in one of its calls")
        if weight is None:
            continue
        if name not in expected:
            problems.append(f"{name!r} is quantized and the plan leaves it in float")
            continue
        inputs = [source for source in node.all_input_nodes if _is(source, "dequantize_per_tensor")]
        problem = (
            _problem(converted, weight, _rescaled(expected[name], node))
            or _input_problem(inputs, plan.activation_bits is not None)
            or (None if FACTOR in node.meta else _bias_problem(converted, node, biases.get(_module_of(node) or name)))
        )
        if problem:
            problems.append(f"{name!r} {problem}")
        found[name] = LayerCheck(name, plan.by_name[name].widths, bool(inputs))
    problems += _changed_weights(converted, folded, set(expected))
    problems += [
        f"{str(node.args[0])!r} is quantized in the graph and the plan does not say so"
        for node in converted.graph.nodes
        if _is(node, "quantize_per_tensor") and (plan.activation_bits is None or _of_a_weight(node))
    ]
    problems += [f"{name!r} was left in float" for name in expected if name not in found]
    problems = problems or output_problems(converted, plan, model, batch)
    if problems:
        raise VerifyError(f"{type(converted).__name__} does not hold the plan: {first_few(problems)}")
    return tuple(found[name] for name in expected)


def _check(plan: Plan, model: nn.Module) -> None:
    check_model(plan, model)
    require_legal(plan, CAPABILITIES)
    check_max_norm(plan, model)
    computing = [repr(name) if name else type(model).__name__ for name in computed_weights(model)]
    if computing:
        raise MismatchError(
            f"{first_few(computing, ', ')}: works with a weight that is no parameter, before a norm, which PT2E fails "
            "to fold into it: use mpq_plugins.apply or the inc adapter"
        )
    try:
        check_folding(plan, model, "PT2E")
    except SourceError:  # torch.fx cannot trace it all; the exported graph says what was folded
        if plan.fold_bn:
            raise
        refuse_wrong_pairs(wrong_pairs(model), "PT2E")


def _is(node: torch.fx.Node, operator: str) -> bool:
    return str(node.target).startswith(f"quantized_decomposed.{operator}")


def _listed(factors: Mapping[str, Tensor]) -> str:
    return f"{first_few([repr(name) for name in factors], ', ')}: " if factors else ""


def _rescaled(expected: IntegerWeight, node: torch.fx.Node) -> IntegerWeight:
    return expected.rescaled(node.meta[FACTOR]) if FACTOR in node.meta else expected


def _replace(model: torch.fx.GraphModule, target: str, weight: Tensor) -> None:
    """Another tensor under the name: the exported module shares its parameters with the user's model."""
    parent, _, own = target.rpartition(".")
    is_parameter = isinstance(attribute(model, target), nn.Parameter)
    weight = weight.to(attribute(model, target))
    setattr(model.get_submodule(parent), own, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)


def _weight_sources(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What a node takes, seen through the views that an operator puts before its weight."""
    if node.op != "call_function" or _is(node, ""):
        return []
    if LAYER not in node.meta and len(node.all_input_nodes) == 1:
        return []  # a view itself
    found: list[torch.fx.Node] = []
    for source in node.all_input_nodes:
        while (
            LAYER not in source.meta
            and source.op == "call_function"
            and not _is(source, "")
            and len(source.all_input_nodes) == 1
        ):
            (source,) = source.all_input_nodes
        found.append(source)
    return found


def _input_problem(inputs: list[torch.fx.Node], wanted: bool) -> str | None:
    """Whether the inputs are quantized as the plan says: to 8 bits, the same way in and out, and calibrated."""
    if bool(inputs) != wanted:
        return f"takes its input {'quantized' if inputs else 'in float'}"
    for node in inputs:
        scale, zero_point, low, high = node.args[1:5]
        source = cast(torch.fx.Node, node.args[0])
        if not _is(source, "quantize_per_tensor") or source.args[1:5] != node.args[1:5] or int(high) - int(low) != 255:  # type: ignore[arg-type]
            return "takes an input that is not quantized to 8 bits"
        if scale == 1.0 and zero_point == 0:
            return "was not calibrated: run batches through the prepared model before converting"
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
