"""The ranges of planned layers' inputs in a model that torch's FX quantization has prepared, and in a converted one."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantizeBase,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
)
from torch.fx import Node

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.input_ranges import InputRange
from mpq_plugins.plans.activations import Activations
from mpq_plugins.plans.plan import Plan

from ..shared.input_ranges import Ranges, reduced, united

LOG = logging.getLogger(__name__)
FULL, REDUCED = 8, 7  # bits


class PercentileObserver(HistogramObserver):
    """The range that holds all but a share of the values at either end of their histogram.

    Attributes:
        tail: The share at either end.
    """

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


class PlanInput(ObserverBase):
    """A range that is known, as torch asks for it: as the observer of a value."""

    def __init__(self, own: InputRange) -> None:
        super().__init__(dtype=torch.quint8)
        self.own, self.qscheme = own, torch.per_tensor_affine
        self.quant_min, self.quant_max = 0, 2**own.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """The value; nothing is observed."""
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (1,) each."""
        return torch.tensor([self.own.scale], dtype=torch.float32), torch.tensor([self.own.zero_point])


def observer_name(plan: Plan, asked: str | None) -> str:
    """The observer of values that are no planned layer's input, or that is asked for. Raises SettingError."""
    if asked is not None and asked not in OBSERVERS:
        raise SettingError(f"activation_observer: {asked!r} is not allowed; {', '.join(OBSERVERS)}")
    names = {layer.activations.range for layer in plan.layers if layer.activations is not None}
    planned = names.pop() if len(names) == 1 else "mse"
    return asked or (planned if planned in OBSERVERS else "mse")


def set_inputs(prepared: torch.fx.GraphModule, plan: Plan, ranges: Ranges, *, exactly: bool, reduce: bool) -> None:
    """Have the input of every planned layer quantized in its range, or where there is none observed as it is planned.

    exactly: these ranges are to be taken, and no others. Raises MismatchError for layers that read one value, which FX
    has one range for, and are planned otherwise; SettingError for a range that torch has no observer for.
    """
    for names, modules in _groups(prepared, plan).items():
        activations = {plan.by_name[name].activations for name in names}
        if len(activations) > 1:
            raise MismatchError(
                f"fx: {first_few([f'{n!r} ({plan.by_name[n].activations})' for n in names], ', ')}: read the same "
                "values, which FX keeps in one range: plan their inputs alike"
            )
        own, planned = [ranges[name] for name in names if name in ranges], activations.pop()
        assert planned is not None
        made = _known(own, names, exactly, reduce, planned) if own else _observer(planned, names[0], reduce)
        for module in modules:
            setattr(prepared, module, made)


def input_range(converted: nn.Module, source: Node | None) -> InputRange | None:
    """The range of a value in a converted model, of the node that gives it: its own, or of what it is made from."""
    while source is not None:
        for where in _grids(converted, source):
            return where
        source = source.all_input_nodes[0] if source.all_input_nodes else None
    return None


def _grids(converted: nn.Module, node: Node) -> Iterator[InputRange]:
    module: Any = converted.get_submodule(str(node.target)) if node.op == "call_module" else node
    scale, zero_point = getattr(module, "scale", None), getattr(module, "zero_point", None)
    numbers = [
        getattr(converted, str(each.target))
        for each in node.args
        if isinstance(each, Node) and each.op == "get_attr" and ("scale" in each.name or "zero_point" in each.name)
    ]
    if node.op == "call_module" and scale is not None and zero_point is not None:
        yield InputRange(FULL, float(scale), int(zero_point))
    elif node.op == "call_function" and len(numbers) == 2:
        yield InputRange(FULL, float(numbers[0]), int(numbers[1]))


def _groups(prepared: torch.fx.GraphModule, plan: Plan) -> dict[tuple[str, ...], list[str]]:
    """The names of layers that read one value, and those of its observer, which a pooling shares."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    readers: dict[int, list[str]] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module" or node.target not in plan.by_name or not node.args:
            continue
        observer = _observer_of(modules, cast(Node, node.args[0]))
        if observer is not None and plan.by_name[str(node.target)].activations is not None:
            readers.setdefault(id(observer), []).append(str(node.target))
    return {
        tuple(names): [name for name, module in modules.items() if id(module) == observer]
        for observer, names in readers.items()
    }


def _observer_of(modules: Mapping[str, nn.Module], value: Node) -> nn.Module | None:
    """What observes a value: FX lets some operations, as `contiguous`, pass what is observed before them."""
    while True:
        module = modules.get(str(value.target)) if value.op == "call_module" else None
        if isinstance(module, ObserverBase | FakeQuantizeBase):
            return module
        if not value.all_input_nodes:
            return None
        value = value.all_input_nodes[0]


def _known(
    own: list[InputRange], names: tuple[str, ...], exactly: bool, reduce: bool, planned: Activations
) -> PlanInput:
    if exactly and len({*own}) > 1:
        raise MismatchError(
            f"fx: {first_few([repr(name) for name in names], ', ')}: read the same values, which FX keeps in one "
            "range, and each has a range of its own: give mpq_plugins.without_input_ranges(model), and batches"
        )
    if len({*own}) > 1:
        LOG.info("%s: read the same values, some of them pooled; one range holds all", ", ".join(names))
    one = united(own, symmetric=planned.symmetric)
    return PlanInput(reduced(one, REDUCED, symmetric=planned.symmetric) if reduce else one)


def _observer(activations: Activations, layer: str, reduce: bool) -> ObserverBase:
    cls = OBSERVERS.get(activations.range)
    if cls is None:
        raise SettingError(
            f"layer {layer!r}: torch has no observer for {activations.range}: use fx.apply, which finds ranges as the "
            f"plan says, or give activation_observer, one of {', '.join(OBSERVERS)}"
        )
    make = cast(Callable[..., ObserverBase], cls)
    qscheme = torch.per_tensor_symmetric if activations.symmetric else torch.per_tensor_affine
    observer = make(dtype=torch.quint8, qscheme=qscheme, reduce_range=reduce)
    if isinstance(observer, PercentileObserver) and activations.share is not None:
        observer.tail = (1 - activations.share) / 2
    return observer
