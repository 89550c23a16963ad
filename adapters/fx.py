"""A plan in PyTorch's FX graph mode quantization: `prepare_fx`, `convert_fx` and `convert_to_reference_fx`.

    prepared = fx.prepare(model, plan, example_inputs)   # a copy; the model is not changed
    prepared(batch)                                      # calibrate: activations only, weights are the plan's
    quantized = convert_fx(prepared)                     # torch's own
    fx.verify(quantized, plan, model)                    # integer codes against the plan's

Backends compute scales their own way, and their 4 bits are not ours. So BatchNorm is folded, the plan's integers
are worked out here, the weights are set to what those integers mean, and torch is handed observers that return the
stored scales and zero points. Kernels work on int8: nothing is packed, so a 4-bit layer takes 8 bits on disk.
"""

from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
    QConfig,
    QConfigMapping,
)
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.fold import conv_bn_pairs, fold_batch_norm
from mpq_plugins.lower import IntegerWeight, integer_weight
from mpq_plugins.plan import LayerChoice, Plan

from .folded import folded_integers
from .fx_checks import CAPABILITIES, check, traced
from .fx_verify import LayerCheck, verify

__all__ = [
    "CAPABILITIES", "LayerCheck", "PercentileObserver", "PlanWeight", "bake", "finish_qat", "folded_integers",
    "needs_reduced_range", "prepare", "qconfig_mapping", "verify",
]  # fmt: skip


NEAR = 1e-3  # of a step: a baked weight is what it should be


class PercentileObserver(HistogramObserver):
    """The range that holds all but `tail` of the values at either end of their histogram."""

    tail = 1e-4

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        share = self.histogram.cumsum(0) / self.histogram.sum().clamp_min(1)
        width = (self.max_val - self.min_val) / self.bins
        low = self.min_val + width * (share < self.tail).sum()
        high = self.min_val + width * ((share < 1 - self.tail).sum() + 1)
        return low, torch.minimum(high, self.max_val)


OBSERVERS: dict[str, type[ObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "percentile": PercentileObserver,
    "mse": HistogramObserver,  # searches its histogram for the range of least squared error
}


class PlanWeight(ObserverBase):
    """A layer's integers as torch asks for them: as an observer of its weight, and in QAT as its fake quantizer.

    Converting, it returns the stored scales and zero points, and refuses a weight that they do not turn into the
    plan's codes. Training, it works the integers out anew for the weight as it is; gradients pass
    straight through.
    """

    def __init__(
        self, choice: LayerChoice, integers: IntegerWeight, qat: bool = False, factory_kwargs: object = None
    ) -> None:
        super().__init__(dtype=torch.qint8)
        self.choice, self.integers, self.qat = choice, integers, qat
        self.ch_axis = integers.channel_axis
        self.qscheme = torch.per_tensor_affine if integers.one_scale else torch.per_channel_affine
        self.quant_min, self.quant_max = -128, 127

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize while training; else check the weight that torch is about to quantize."""
        if self.qat and self.training:
            self.integers = integer_weight(x, self.choice)
            return x + (self.integers.dequantized().to(x) - x).detach()
        if not _becomes(x, self.integers):
            raise MismatchError(
                f"layer {self.choice.name!r}: its weights do not become the plan's codes. Prepare with "
                "fx.prepare(model, plan, ...), or give prepare_fx a copy made by fx.bake(model, plan); after QAT call "
                "fx.finish_qat(prepared)."
            )
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (1,) or (channels,)."""
        if self.integers.one_scale:
            return self.integers.scale[:1, 0], self.integers.zero_point[:1, 0]
        return self.integers.scale[:, 0], self.integers.zero_point[:, 0]


def qconfig_mapping(
    plan: Plan,
    model: nn.Module,
    *,
    activation_observer: str = "mse",
    reduce_range: bool | None = None,
    qat: bool = False,
) -> QConfigMapping:
    """The plan as a QConfigMapping for `prepare_fx` of `bake(model, plan)`; layers it does not plan stay in float.

    model: the float model. activation_observer: minmax, moving_average, percentile (all but 1e-4 at either end) or
    mse, torch's histogram search. reduce_range: 7-bit activations, which the x86 and fbgemm engines need on a CPU
    without VNNI, where their products overflow; by default found out. qat: for `prepare_qat_fx`, activations fake
    quantized as they are observed. Raises SettingError (a plan that FX cannot run, float activations, an unknown
    observer) and MismatchError (another model, or one that FX would get wrong), each naming layers and remedy.
    """
    check(plan, model)
    return _mapping(plan, folded_integers(plan, model), activation_observer, reduce_range, qat)


def _mapping(
    plan: Plan,
    integers: dict[str, IntegerWeight],
    activation_observer: str,
    reduce_range: bool | None,
    qat: bool,
) -> QConfigMapping:
    if activation_observer not in OBSERVERS:
        raise SettingError(f"activation_observer: {activation_observer!r} is not allowed; {', '.join(OBSERVERS)}")
    reduce = needs_reduced_range() if reduce_range is None else reduce_range
    settings = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "reduce_range": reduce}
    observer = OBSERVERS[activation_observer]
    activation = FakeQuantize.with_args(observer=observer, **settings) if qat else observer.with_args(**settings)
    mapping = QConfigMapping().set_global(None)
    for name, own in integers.items():
        weight = PlanWeight.with_args(choice=plan.by_name[name], integers=own, qat=qat)
        mapping.set_module_name(name, QConfig(activation=activation, weight=weight))
    return mapping


def prepare(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    activation_observer: str = "mse",
    reduce_range: bool | None = None,
    qat: bool = False,
) -> torch.fx.GraphModule:
    """torch's `prepare_fx` of a baked copy, or `prepare_qat_fx`: run batches through it, then convert.

    After QAT, call finish_qat before converting. Raises as qconfig_mapping.
    """
    check(plan, model)
    integers = folded_integers(plan, model)
    mapping = _mapping(plan, integers, activation_observer, reduce_range, qat)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    baked = _baked(model, integers)
    return prepare_qat_fx(baked.train(), mapping, inputs) if qat else prepare_fx(baked, mapping, inputs)


def finish_qat(prepared: nn.Module) -> dict[str, IntegerWeight]:
    """End QAT: set every weight to what its integers mean, and return those, for `verify`; evaluation mode after."""
    prepared.eval()
    found: dict[str, IntegerWeight] = {}
    for module in prepared.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, PlanWeight):
            weight = cast(Tensor, module.weight)
            quantizer.integers = found[quantizer.choice.name] = integer_weight(weight, quantizer.choice)
            with torch.no_grad():
                weight.copy_(quantizer.integers.dequantized())
    return found


def bake(model: nn.Module, plan: Plan) -> torch.fx.GraphModule:
    """A copy of the model with BatchNorm folded away and every planned weight set to what its integers mean."""
    check(plan, model)
    return _baked(model, folded_integers(plan, model))


def _baked(model: nn.Module, integers: dict[str, IntegerWeight]) -> torch.fx.GraphModule:
    graph_module = _without_batch_norm(model)
    with torch.no_grad():
        for name, weight in integers.items():
            cast(Tensor, graph_module.get_submodule(name).weight).copy_(weight.dequantized())
    return graph_module


def needs_reduced_range() -> bool:
    """Whether this engine's int8 products can overflow on this CPU: x86 and fbgemm without VNNI."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and not torch.cpu._is_vnni_supported()


def _without_batch_norm(model: nn.Module) -> torch.fx.GraphModule:
    """A folded copy as a graph, without the Identity that folding leaves between a convolution and its ReLU."""
    gone = set(conv_bn_pairs(model).values())
    folded = fold_batch_norm(model)
    graph = traced(folded)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in gone:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return torch.fx.GraphModule(folded, graph)


def _becomes(weight: Tensor, integers: IntegerWeight) -> bool:
    """Whether the weight is what these integers mean."""
    if weight.shape != integers.codes.shape:
        return False
    steps = (weight.detach().cpu() - integers.dequantized()).abs()
    return bool((integers.region_rows(steps) < NEAR * integers.scale.reshape(-1, 1)).all())
