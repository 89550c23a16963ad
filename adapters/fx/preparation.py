"""A plan in PyTorch's FX graph mode quantization: `prepare_fx`, `convert_fx` and `convert_to_reference_fx`."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    ObserverBase,
    QConfig,
    QConfigMapping,
    default_weight_observer,
)
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

from mpq_plugins.errors import MismatchError, SettingError, SourceError
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.folding import Folded
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.models.plain import is_plain, standard_class
from mpq_plugins.models.tracing import BATCH_NORMS, Traced
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.integers import IntegerWeight

from ..shared.folded import integers_of, round_after, rounded_before
from ..shared.input_ranges import Ranges, taken_ranges
from .checks import check_calls, check_example, check_settings, graph_for_fx, traced_by_fx
from .graph import InCodes, by_position, divide, lend_shapes, without
from .inplace import follow_changes
from .inputs import OBSERVERS, observer_name, set_inputs
from .trained import trained_integers

NEAR = 1e-3  # of a step: a baked weight is what it should be
REGISTERED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class PlanWeight(ObserverBase):
    """A layer's integers as torch asks for them: as an observer of its weight, and in QAT as its fake quantizer.

    Converting, it returns the stored scales and zero points, and refuses a weight that they do not turn into the plan's
    codes. Training, it works the integers out anew for the weight as it is; gradients pass straight through.

    Args:
        choice: What the plan gives the layer.
        integers: The layer's codes, scales and zero points.
        qat: Whether it is the fake quantizer of a model in training.
        factory_kwargs: torch's; not used.
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
        """Fake quantize while training; else check the weight that torch is about to quantize.

        Args:
            x: The weight.

        Returns:
            The weight, fake quantized while training.

        Raises:
            MismatchError: The weight is not what the plan's integers mean.
        """
        if self.qat and self.training:
            self.integers = trained_integers(x, self.choice, self.integers)
            return x + (self.integers.dequantized().to(x) - x).detach()
        if not _becomes(x, self.integers):
            raise MismatchError(
                f"layer {self.choice.name!r}: its weights do not become the plan's codes. Prepare with "
                "fx.prepare(model, plan, ...), or give prepare_fx a copy made by fx.bake(model, plan); after QAT call "
                "fx.finish_qat(prepared)."
            )
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Give scale and zero point.

        Args:
            **_: torch's; not used.

        Returns:
            Both, (1,) or (channels,).
        """
        if self.integers.one_scale:
            return self.integers.scale[:1, 0], self.integers.zero_point[:1, 0]
        return self.integers.scale[:, 0], self.integers.zero_point[:, 0]


def qconfig_mapping(
    plan: Plan,
    model: nn.Module,
    *,
    activation_observer: str | None = None,
    reduce_range: bool | None = None,
    qat: bool = False,
) -> QConfigMapping:
    """Make the plan a QConfigMapping for `prepare_fx` of `bake(model, plan)`; layers it does not plan stay in float.

    Args:
        plan: The plan.
        model: The float model.
        activation_observer: `minmax`, `moving_average`, `percentile` (all but 1e-4 at either end) or `mse`, torch's
            histogram search, for all activations; by default what the plan says of its layers' inputs, where it says
            one of these of all, or else `mse`.
        reduce_range: Whether activations have 7 bits, which the x86 and fbgemm engines need on a CPU without VNNI,
            where their products overflow; by default found out.
        qat: Whether it is for `prepare_qat_fx`, activations fake quantized as they are observed.

    Returns:
        The mapping.

    Raises:
        SettingError: FX cannot run the plan, activations are in float, or the observer is unknown. The message names
            layers and the remedy.
        MismatchError: The plan is another model's, or FX would get the model wrong.
    """
    reduce = needs_reduced_range() if reduce_range is None else reduce_range
    return _mapping(plan, _baked(model, plan), activation_observer, reduce, qat)


def _mapping(plan: Plan, baked: "_Baked", activation_observer: str | None, reduce: bool, qat: bool) -> QConfigMapping:
    settings = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "reduce_range": reduce}
    observer = OBSERVERS[observer_name(plan, activation_observer)]
    activation = FakeQuantize.with_args(observer=observer, **settings) if qat else observer.with_args(**settings)
    mapping = QConfigMapping().set_global(None)
    for name, integers in baked.integers.items():
        weight = PlanWeight.with_args(choice=plan.by_name[name], integers=integers, qat=qat)
        mapping.set_module_name(name, QConfig(activation=activation, weight=weight))
    unweighted = QConfig(activation=activation, weight=default_weight_observer)
    for name in baked.in_codes.modules:
        mapping.set_module_name(name, unweighted)
    for place in baked.in_codes.sums:
        mapping.set_module_name_object_type_order("", torch.add, place, unweighted)
    return mapping


def prepare(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    ranges: Mapping[str, InputRange] | None = None,
    activation_observer: str | None = None,
    reduce_range: bool | None = None,
    qat: bool = False,
) -> torch.fx.GraphModule:
    """Run torch's `prepare_fx` on a baked copy, or `prepare_qat_fx`: run batches through it, then convert.

    After QAT, call finish_qat before converting.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        example_inputs: A batch of one tensor, or a tuple of arguments; the model runs on it.
        ranges: Of the inputs of planned layers, by name, as `mpq_plugins.input_ranges` gives them; by default those
            that the model carries, and where it carries none, torch observes each input for the range that is planned.
        activation_observer: As of `qconfig_mapping`, for all activations. By default it is for those alone that are
            no planned layer's input.
        reduce_range: As of `qconfig_mapping`.
        qat: Whether to prepare for training.

    Returns:
        The prepared copy.

    Raises:
        SettingError: As `qconfig_mapping`; or the model does not run on the inputs.
        MismatchError: As `qconfig_mapping`; or torch.fx traces the model wrongly.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net)).with_activation_bits(8)
        >>> prepared = fx.prepare(net, plan, torch.randn(2, 8))
        >>> prepared(torch.randn(32, 8)).shape
        torch.Size([32, 8])
    """
    bare, carried = taken_ranges(plan, model)
    known = carried or ranges or {}
    check_ranges(known, activation_observer, qat)
    reduce = needs_reduced_range() if reduce_range is None else reduce_range
    prepared = observed(bare, plan, example_inputs, activation_observer, reduce, qat)
    if activation_observer is None and not qat:
        set_inputs(prepared, plan, known, exactly=True, reduce=reduce)
    return prepared


def observed(
    model: nn.Module, plan: Plan, example_inputs: Any, activation_observer: str | None, reduce: bool, qat: bool = False
) -> torch.fx.GraphModule:
    """The prepared copy with torch's observers throughout."""
    baked = _baked(model, plan)
    mapping = _mapping(plan, baked, activation_observer, reduce, qat)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    check_example(baked.model, baked.exact, baked.integers, inputs)
    return prepare_qat_fx(baked.model.train(), mapping, inputs) if qat else prepare_fx(baked.model, mapping, inputs)


def check_ranges(ranges: Ranges, activation_observer: str | None, qat: bool = False) -> None:
    """Raise SettingError for ranges that are there and would not be taken."""
    if ranges and activation_observer is not None:
        raise SettingError(
            f"activation_observer: {activation_observer!r} finds ranges in place of those that there are: leave it "
            "out, or give mpq_plugins.without_input_ranges(model)"
        )
    if ranges and qat:
        raise SettingError(
            "fx: in training, ranges are torch's own, found as it goes: give mpq_plugins.without_input_ranges(model)"
        )


def finish_qat(prepared: nn.Module) -> dict[str, IntegerWeight]:
    """End QAT: set every weight to what its integers mean, and put the model in evaluation mode.

    Args:
        prepared: What `prepare` made with qat, trained; it is changed.

    Returns:
        The integers by layer name, for `verify`.
    """
    check_module(prepared, "prepared")
    prepared.eval()
    trained: dict[str, IntegerWeight] = {}
    for module in prepared.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, PlanWeight):
            weight = cast(Tensor, module.weight)
            choice = quantizer.choice
            quantizer.integers = trained[choice.name] = trained_integers(weight, choice, quantizer.integers)
            with torch.no_grad():
                weight.copy_(quantizer.integers.dequantized())
    return trained


def check(plan: Plan, model: nn.Module) -> None:
    """Check that FX can run the plan on the model.

    What only shows as the model runs, `prepare` refuses: single samples, values that depend on what was traced.

    Args:
        plan: The plan.
        model: The float model; it is not changed.

    Raises:
        SettingError: FX cannot run the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's, or FX would get the model wrong.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> fx.check(mpq.Uniform(bits=4)(mpq.measure(net)).with_activation_bits(8), net)
    """
    _baked(model, plan)


def bake(model: nn.Module, plan: Plan) -> torch.fx.GraphModule:
    """Make a copy of the model with BatchNorm folded away and every planned weight set to what its integers mean.

    Args:
        model: The float model; it is not changed.
        plan: The plan.

    Returns:
        The copy, traced.

    Raises:
        SettingError: FX cannot run the plan.
        MismatchError: The plan is another model's, or torch.fx cannot trace the model.
    """
    return _baked(model, plan).model


@dataclass(frozen=True)
class _Baked:
    """What torch is given, the integers that its planned weights are, and what between them stays in codes.

    exact: the same modules as the user's code calls them.
    """

    model: torch.fx.GraphModule
    exact: nn.Module
    integers: dict[str, IntegerWeight]
    in_codes: InCodes


def _baked(model: nn.Module, plan: Plan) -> _Baked:
    model, _ = taken_ranges(plan, model)
    traced = Traced(model)
    check_settings(plan, model, traced)
    folded = _folded(traced, plan)
    copied = folded.model
    _name_norms(copied)
    graph = graph_for_fx(folded)
    without(graph, folded.pairs.values())
    by_position(copied, graph)
    follow_changes(graph, dict(copied.named_modules(remove_duplicate=False)))
    check_calls(plan, folded, graph)
    integers = integers_of(plan, folded)
    _set_weights(copied, integers)
    root = _stand_in(copied)
    lend_shapes(root, graph, integers)
    in_codes = divide(root, graph, integers)
    return _Baked(torch.fx.GraphModule(root, graph), copied, integers, in_codes)


def _stand_in(model: nn.Module) -> nn.Module:
    """A module with all that the model has, to which more can be added: a Sequential's forward runs whatever it has."""
    root = nn.Module()
    vars(root).update({name: copy.copy(value) if name in REGISTERED else value for name, value in vars(model).items()})
    return root


def _folded(traced: Traced, plan: Plan) -> Folded:
    try:
        traced.graph  # noqa: B018  # where there is none, FX's tracer says why
    except SourceError:
        traced_by_fx(duplicate(traced.model))
    folded = Folded.of(rounded_before(traced, plan), plan.skipped)
    round_after(folded.model, plan)
    return folded


def _name_norms(model: nn.Module) -> None:
    """Give norms of a user's class that compute as torch's own torch's class, for FX looks into any other."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and is_plain(module):
            module.__class__ = cast(Any, standard_class(module))


def _set_weights(model: nn.Module, integers: dict[str, IntegerWeight]) -> None:
    """Set every planned weight to what its integers mean."""
    for name, weight in integers.items():
        layer = model.get_submodule(name)
        before = cast(Tensor, layer.weight)
        layer.weight = nn.Parameter(weight.dequantized().to(before), requires_grad=before.requires_grad)


def needs_reduced_range() -> bool:
    """Tell whether this engine's int8 products can overflow on this CPU: x86 and fbgemm without VNNI.

    Returns:
        Whether they can.
    """
    return torch.backends.quantized.engine in ("x86", "fbgemm") and not torch.cpu._is_vnni_supported()


def _becomes(weight: Tensor, integers: IntegerWeight) -> bool:
    """Whether the weight is what these integers mean."""
    if weight.shape != integers.codes.shape:
        return False
    steps = (weight.detach().cpu() - integers.dequantized()).abs()
    return bool((integers.group_rows(steps) < NEAR * integers.scale.reshape(-1, 1)).all())
