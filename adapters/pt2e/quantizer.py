"""A plan in PyTorch 2 export quantization (PT2E, from torchao): a quantizer for `prepare_pt2e` and `convert_pt2e`."""

from collections.abc import Iterable, Mapping
from typing import Any

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
from mpq_plugins.errors import MismatchError
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.models.tracing import Traced
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name, weight_name
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight

from ..shared.folded import has_float16, integers_of, planned_by_name, planned_layers
from ..shared.input_ranges import Ranges, taken_ranges
from .checks import check_traced
from .folded import folding_factors, graph_problem, halves_of, rounded_fold, times, traced_fold, weight_names
from .graph import ANNOTATION, replace_weight

LAYER, FACTOR = "mpq_plugins_layer", "mpq_plugins_factor"


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


class PlanInputObserver(ObserverBase):  # type: ignore[misc]
    """Returns the range that an input has."""

    def __init__(self, input_range: InputRange, **_: Any) -> None:  # the rest of the spec, which is fixed here
        super().__init__(dtype=torch.uint8)
        self.input_range, self.qscheme = input_range, torch.per_tensor_affine
        self.quant_min, self.quant_max = 0, 255

    def forward(self, x: Tensor) -> Tensor:
        """The value; nothing is observed."""
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (1,) each."""
        return torch.tensor([self.input_range.scale], dtype=torch.float32), torch.tensor([self.input_range.zero_point])


class PlanQuantizer(X86InductorQuantizer):  # type: ignore[misc]
    """Quantizes what the plan says, at its integers, and nothing else.

    While preparing, MismatchError is raised for a layer that the exported graph lacks or that has other weights there,
    for inputs that are to be quantized and cannot be, and where PT2E's folding has made another function.

    Args:
        plan: The plan.
        model: The float model; what is exported must carry no ranges of inputs (without_input_ranges).
        ranges: Of the inputs of planned layers, by name, as `mpq_plugins.input_ranges` gives them; by default those
            that the model carries, and where it carries none, torch's histograms find ranges of least squared error.

    Raises:
        SettingError: PT2E cannot run the plan, or the model carries ranges that are not the plan's.
        MismatchError: The plan is another model's.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import pt2e
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> quantizer = pt2e.PlanQuantizer(mpq.Uniform(bits=4)(mpq.measure(net)), net)
    """

    def __init__(self, plan: Plan, model: nn.Module, ranges: Ranges | None = None) -> None:
        super().__init__()
        model, carried = taken_ranges(plan, model)
        self.ranges = carried or ranges or {}
        traced = Traced(model)
        check_traced(plan, traced)
        folded = traced_fold(traced)
        self.plan, self.model, self.folded = plan, model, folded.model
        self.integers, self.factors = integers_of(plan, folded), dict[str, Tensor]()
        self.halves = halves_of(plan, rounded_fold(traced, plan).model) if has_float16(plan) else {}
        for layer in planned_layers(plan):
            if layer.activations is not None:
                for name in layer.names:
                    self.set_module_name_qconfig(name, get_default_x86_inductor_quantization_config())

    def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Set every planned weight of the exported graph, BatchNorm folded by now, to what its integers mean.

        Args:
            model: The exported graph; it is changed.

        Returns:
            The graph.

        Raises:
            MismatchError: The graph lacks a layer, or has other weights there.
        """
        nodes = {layer.name: node for node, layer in self._weights(model)}
        problems = [f"{name!r} is not in the exported graph: skip it" for name in self.integers if name not in nodes]
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
        for name, node in nodes.items():
            if name in self.factors:
                self.integers[name] = self.integers[name].rescaled(self.factors[name])
            replace_weight(model, str(node.target), self.integers[name].dequantized())
        self._set_halves(model)
        return model

    def _set_halves(self, model: torch.fx.GraphModule) -> None:
        """Set every weight at 16 bits to float16's values, before or after BatchNorm is folded, as it was measured."""
        names = weight_names(self.folded)
        for node in model.graph.nodes:
            name = names.get(str(node.target)) if node.op == "get_attr" else None
            if name in self.halves and node.users:
                half = self.halves[str(name)]
                axis = self.plan.by_any_name[str(name)].channel_axis
                factor = self.factors.get(str(name))
                replace_weight(model, str(node.target), half if factor is None else times(half, factor, axis))

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Mark the weights of planned layers, and with 8-bit activations their inputs.

        Args:
            model: The exported graph; it is changed.

        Returns:
            The graph.

        Raises:
            MismatchError: Inputs are to be quantized and cannot be.
        """
        if self.plan.quantizes_inputs:
            super().annotate(model)
        untaken: list[str] = []
        readers: dict[torch.fx.Node, dict[str, tuple[Any, Any]]] = {}
        for node, layer in self._weights(model):
            spec = QuantizationSpec(
                dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_affine,
                ch_axis=self.integers[layer.name].channel_axis,
                observer_or_fake_quant_ctr=PlanPerChannelObserver.with_args(integers=self.integers[layer.name]),
            )  # fmt: skip
            for user in node.users:
                annotation = user.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True))
                if layer.activations is not None and not annotation.input_qspec_map.keys() - {node}:
                    untaken.append(repr(layer.name))
                for source in annotation.input_qspec_map.keys() - {node} if layer.activations is not None else ():
                    own = self.ranges.get(layer_name(str(node.target)))
                    readers.setdefault(source, {})[layer.name] = (layer.activations, own)
                self._set_input(annotation, node, str(node.target))
                annotation.input_qspec_map[node] = spec
                user.meta[LAYER] = layer.name
        if untaken:
            raise MismatchError(
                f"pt2e cannot run this plan: X86InductorQuantizer quantizes no inputs of {first_few(untaken, ', ')}, "
                "for other code than the layer's own computes with the weight, as in MultiheadAttention: skip it, or "
                "plan.with_activation_bits(None)"
            )
        self._require_alike(readers.values())
        self._note_factors(model)
        return model

    def _require_alike(self, readers: Iterable[Mapping[str, tuple[Any, Any]]]) -> None:
        """Refuse layers that read one value, for which PT2E has one range, and are planned or calibrated otherwise."""
        for layers in readers:
            if len({*layers.values()}) > 1:
                raise MismatchError(
                    f"pt2e: {first_few(list(map(repr, layers)), ', ')}: read the same values, which PT2E keeps in one "
                    "range: plan their inputs alike, or give mpq_plugins.without_input_ranges(model), and batches"
                )

    def _set_input(self, annotation: QuantizationAnnotation, weight: torch.fx.Node, name: str) -> None:
        """Have the input beside a weight quantized in the range that there is for it."""
        own = self.ranges.get(layer_name(name))
        for source, spec in annotation.input_qspec_map.items():
            if own is not None and source is not weight and isinstance(spec, QuantizationSpec):
                annotation.input_qspec_map[source] = QuantizationSpec(
                    dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine,
                    observer_or_fake_quant_ctr=PlanInputObserver.with_args(input_range=own),
                )  # fmt: skip

    def _note_factors(self, model: torch.fx.GraphModule) -> None:
        """On the nodes that use a rescaled weight, for `verify`."""
        names = weight_names(self.folded)
        for node in model.graph.nodes:
            name = names.get(str(node.target)) if node.op == "get_attr" else None
            for user in node.users if name in self.factors else ():
                user.meta[FACTOR] = self.factors[str(name)]

    def validate(self, model: torch.fx.GraphModule) -> None:
        """Do nothing: transform_for_annotation has refused what is wrong.

        Args:
            model: The exported graph.
        """

    def _weights(self, model: torch.fx.GraphModule) -> list[tuple[torch.fx.Node, LayerChoice]]:
        """The planned weights' nodes: their targets are the parameters' names, of tied ones any."""
        planned = {weight_name(name): layer for name, layer in planned_by_name(self.plan).items()}
        nodes = [node for node in model.graph.nodes if node.op == "get_attr" and str(node.target) in planned]
        return [(node, planned[str(node.target)]) for node in nodes if node.users]


def _listed(factors: Mapping[str, Tensor]) -> str:
    return f"{first_few([repr(name) for name in factors], ', ')}: " if factors else ""
