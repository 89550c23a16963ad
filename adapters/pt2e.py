"""A plan in PyTorch 2 export quantization (PT2E, from torchao): a quantizer for `prepare_pt2e` and `convert_pt2e`.

    exported = torch.export.export(model, example_inputs).module()
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    prepared(*batch)                              # with 8-bit activations: calibrate
    quantized = convert_pt2e(prepared)            # runs as it is, or under torch.compile
    pt2e.verify(quantized, plan, model)

A plan with float activations keeps them: only weights are quantized, and the result is to the bit what `apply` makes
of the folded model. With 8-bit activations, X86InductorQuantizer's rules quantize the inputs of planned linear and
two-dimensional convolution layers, whose weights must be symmetric. The converted state dict still holds the float
weights beside the int8 ones.
"""

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

from mpq_plugins.errors import MismatchError, SettingError, VerifyError
from mpq_plugins.legalise import Capabilities, require_legal
from mpq_plugins.lower import IntegerWeight
from mpq_plugins.match import match
from mpq_plugins.plan import LayerChoice, Plan
from mpq_plugins.scheme import Affine

from .folded import check_folding, folded_integers, folded_weights, planned_layers

CAPABILITIES = Capabilities(
    backend="pt2e",
    bits=tuple(range(1, 9)),
    kinds=("linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "embedding"),
    parts=True,
    activation_bits=(None, 8),
)
WITH_ACTIVATIONS = ("linear", "conv2d")
LAYER = "mpq_plugins_layer"
ANNOTATION = "quantization_annotation"
SHOWN = 5


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
    another model's; and while preparing, MismatchError for a layer that the exported graph lacks or in which it folded
    another BatchNorm than its own.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        super().__init__()
        _check(plan, model)
        self.plan, self.integers, self.float_weights = plan, folded_integers(plan, model), folded_weights(model)
        if plan.activation_bits is not None:
            for layer in planned_layers(plan):
                for name in layer.names:
                    self.set_module_name_qconfig(name, get_default_x86_inductor_quantization_config())

    def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Set every planned weight of the exported graph, BatchNorm folded by now, to what its integers mean."""
        found = {layer.name: node for node, layer in self._weights(model)}
        problems = [f"{name!r} is not in the exported graph: skip it" for name in self.integers if name not in found]
        for name, node in found.items():
            weight = _attribute(model, str(node.target))
            own = self.float_weights[name]
            if weight.shape != own.shape or not torch.allclose(weight, own, rtol=1e-4, atol=1e-6):
                problems.append(
                    f"{name!r} has other weights there than with its own BatchNorm folded in (does it feed two?): "
                    "skip it"
                )
        if problems:
            raise MismatchError(f"pt2e cannot run this plan: {_some(problems)}")
        for name, node in found.items():
            _replace(model, str(node.target), self.integers[name].dequantized())
        return model

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Mark the weights of planned layers, and with 8-bit activations their inputs."""
        if self.plan.activation_bits is not None:
            super().annotate(model)
        for node, layer in self._weights(model):
            spec = QuantizationSpec(
                dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_affine,
                ch_axis=self.integers[layer.name].channel_axis,
                observer_or_fake_quant_ctr=PlanPerChannelObserver.with_args(integers=self.integers[layer.name]),
            )  # fmt: skip
            for user in node.users:
                annotation = user.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True))
                annotation.input_qspec_map[node] = spec
                user.meta[LAYER] = layer.name
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        """Nothing to add: transform_for_annotation has refused what is wrong."""

    def _weights(self, model: torch.fx.GraphModule) -> list[tuple[torch.fx.Node, LayerChoice]]:
        """The planned weights' nodes: their targets are the parameters' names, of tied ones any."""
        planned = {f"{name}.weight": layer for layer in planned_layers(self.plan) for name in layer.names}
        nodes = [node for node in model.graph.nodes if node.op == "get_attr" and str(node.target) in planned]
        return [(node, planned[str(node.target)]) for node in nodes if node.users]


@dataclass(frozen=True)
class LayerCheck:
    """One layer as it lies in the converted graph: its bits by channel count; whether its inputs are quantized."""

    layer: str
    bits: tuple[tuple[int, int], ...]
    activations: bool


def verify(converted: torch.fx.GraphModule, plan: Plan, model: nn.Module) -> tuple[LayerCheck, ...]:
    """Read the integer codes back from what `convert_pt2e` made, and compare them, scales and zero points too.

    Every planned layer must be there, its inputs quantized if and only if the plan says so, and nothing else may be
    quantized. Raises VerifyError listing what is wrong.
    """
    expected = folded_integers(plan, model)
    problems: list[str] = []
    found: dict[str, LayerCheck] = {}
    for node in converted.graph.nodes:
        if not _is(node, "dequantize_per_channel"):
            continue
        for user in _consumers(node):
            name = _layer_of(user, plan)
            if name not in expected:
                problems.append(f"{name!r} is quantized and the plan leaves it in float")
                continue
            problem = _problem(converted, node, expected[name])
            activations = any(_is(source, "dequantize_per_tensor") for source in user.all_input_nodes)
            if activations != (plan.activation_bits is not None):
                problem = problem or f"takes its input {'quantized' if activations else 'in float'}"
            if problem:
                problems.append(f"{name!r} {problem}")
            bits = tuple((part.bits, len(part.channels)) for part in plan.by_name[name].groups)
            found[name] = LayerCheck(name, bits, activations)
    problems += [f"{name!r} was left in float" for name in expected if name not in found]
    if problems:
        raise VerifyError(f"{type(converted).__name__} does not hold the plan: {_some(problems)}")
    return tuple(found[name] for name in expected)


def _check(plan: Plan, model: nn.Module) -> None:
    match(plan, model).require(type(model).__name__)
    require_legal(plan, CAPABILITIES)
    check_folding(plan, model, "PT2E")
    if plan.activation_bits is None:
        return
    offset = [f"{layer.name!r}" for layer in planned_layers(plan) if not cast(Affine, layer.scheme).symmetric]
    if offset:
        raise SettingError(
            f"pt2e: {_some(offset)}: asymmetric weights with quantized activations come out wrong under torch.compile, "
            "whose frozen int8 kernels take no zero points of weights. Measure with Affine(symmetric=True), or plan "
            "with float activations."
        )
    other = [f"{layer.name!r} ({layer.kind})" for layer in planned_layers(plan) if layer.kind not in WITH_ACTIVATIONS]
    if other:
        raise SettingError(
            f"pt2e: quantized activations are for {' and '.join(WITH_ACTIVATIONS)} layers, not for {_some(other)}. "
            "Plan with float activations, or skip these layers."
        )


def _is(node: torch.fx.Node, operator: str) -> bool:
    return str(node.target).startswith(f"quantized_decomposed.{operator}")


def _attribute(model: torch.fx.GraphModule, target: str) -> Tensor:
    parent, _, own = target.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(parent), own))


def _replace(model: torch.fx.GraphModule, target: str, weight: Tensor) -> None:
    """Another tensor under the name: the exported module shares its parameters with the user's model."""
    parent, _, own = target.rpartition(".")
    is_parameter = isinstance(_attribute(model, target), nn.Parameter)
    setattr(model.get_submodule(parent), own, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)


def _consumers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Who uses a weight, seen through the views an operator puts before it."""
    users: list[torch.fx.Node] = []
    for user in node.users:
        passes_on = LAYER not in user.meta and len(user.all_input_nodes) == 1
        users += _consumers(user) if passes_on else [user]
    return users


def _layer_of(node: torch.fx.Node, plan: Plan) -> str:
    """The layer a node computes: as it was marked, else by the module it came from."""
    if LAYER in node.meta:
        return str(node.meta[LAYER])
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(path[0]) for path in stack.values()]
    last = names[-1] if names else str(node.name)
    return plan.by_any_name[last].name if last in plan.by_any_name else last


def _problem(converted: torch.fx.GraphModule, node: torch.fx.Node, expected: IntegerWeight) -> str | None:
    sources = [cast(torch.fx.Node, argument) for argument in node.args[:3]]
    codes, scale, zero_point = (_attribute(converted, str(source.target)) for source in sources)
    if codes.shape != expected.codes.shape:
        return f"has shape {list(codes.shape)}, the plan {list(expected.codes.shape)}"
    wrong = int((codes != expected.codes).sum())
    if wrong:
        return f"has {wrong} of {codes.numel()} codes that are not the plan's"
    if not (scale.equal(expected.scale[:, 0]) and zero_point.equal(expected.zero_point[:, 0])):
        return "has other scales or zero points than the plan's"
    return None


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more
