"""The ranges of quantized inputs that a plan says how to find, for backends that take them as they are given."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.models.input_ranges import InputRange, holds, input_ranges, range_grid, without_input_ranges
from mpq_plugins.plans.activations import Activations
from mpq_plugins.plans.plan import Plan
from mpq_plugins.quantization.input_values import InputValues
from mpq_plugins.simulation.calibrate import found_ranges as simulated_ranges

from .folded import check_types

Ranges = Mapping[str, InputRange]
"""By the names that the model has for its layers."""


def statics(plan: Plan) -> dict[str, Activations]:
    """How inputs are quantized in ranges that are found once, by the layers' names and tied names."""
    return {
        name: layer.activations
        for name, layer in plan.by_any_name.items()
        if layer.activations is not None and layer.activations.dynamic is None
    }


def taken_ranges(plan: Plan, model: nn.Module) -> tuple[nn.Module, dict[str, InputRange]]:
    """The model without the ranges that it carries, and these ranges; the model itself where it carries none.

    So it is too where the plan has no use for any, and check_model refuses what would be lost.
    Raises SettingError where they are not ranges of the plan's inputs, or where a plan is no Plan or a model no module.
    """
    check_types(plan, model)
    carried = input_ranges(model)
    if not carried or not plan.quantizes_inputs:
        return model, {}
    planned = {name: layer.activations for name, layer in plan.by_any_name.items()}
    problems = [
        f"{name!r} carries {_range_text(own)}, the plan has {planned.get(name) or 'floating point'}"
        for name, own in carried.items()
        if not holds(own, planned.get(name))
    ]
    problems += [
        f"{layer.name!r} carries none, the plan has {layer.activations}"
        for layer in plan.layers
        if layer.activations is not None and not carried.keys() & {*layer.names}
    ]
    if problems:
        raise SettingError(
            f"{type(model).__name__}: its ranges of inputs are not the plan's: {first_few(problems)}. Make them by "
            "this plan, or give mpq_plugins.without_input_ranges(model), and batches to find ranges by"
        )
    return without_input_ranges(model), carried


def found_ranges(
    model: nn.Module, plan: Plan, batches: Iterable[Any], *, uncalled: bool = False
) -> dict[str, InputRange]:
    """The plan's ranges on the batches, as `mpq_plugins.calibrate_inputs` finds them on the float model, by all names.

    So a backend computes with the numbers that `mpq_plugins.apply` simulates. uncalled: leave out layers that are not
    called, whose weights other code may compute with. Raises SettingError as `calibrate_inputs`.
    """
    found = simulated_ranges(model, plan, batches, uncalled=uncalled)
    modules = dict(model.named_modules(remove_duplicate=False))
    by_module = {id(modules[name]): own for name, own in found.items()}
    return {name: by_module[id(modules[name])] for name in statics(plan) if id(modules.get(name)) in by_module}


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, InputValues]]:
    """Look at the layers' inputs, under all their names."""
    names = {id(module): name for name, module in reversed([*layers.items()])}
    seen = {number: InputValues(name) for number, name in names.items()}
    handles = [seen[number].watch(layers[name]) for number, name in names.items()]
    try:
        yield {name: seen[id(module)] for name, module in layers.items()}
    finally:
        for handle in handles:
            handle.remove()


def reduced(own: InputRange, bits: int, *, symmetric: bool) -> InputRange:
    """The same ends at fewer bits."""
    return _grid(ends(own), bits, symmetric)


def united(ranges: Sequence[InputRange], *, symmetric: bool) -> InputRange:
    """One range that holds several of the same bits; itself where they are equal."""
    if len({*ranges}) == 1:
        return ranges[0]
    lows, highs = zip(*map(ends, ranges), strict=True)
    return _grid((min(lows), max(highs)), ranges[0].bits, symmetric)


def same_range(one: InputRange, other: InputRange) -> bool:
    """Whether two ranges of the same bits are one, but for how scales are rounded."""
    return math.isclose(one.scale, other.scale, rel_tol=1e-6) and one.zero_point == other.zero_point


def ends(own: InputRange) -> tuple[float, float]:
    """The least and the greatest value of a static range."""
    return -own.zero_point * own.scale, (2**own.bits - 1 - own.zero_point) * own.scale


def _grid(low_high: tuple[float, float], bits: int, symmetric: bool) -> InputRange:
    low, high = map(torch.tensor, low_high)
    scale, zero_point = range_grid(low, high, bits, symmetric=symmetric)
    return InputRange(bits, float(scale), int(zero_point))


def _range_text(own: InputRange) -> str:
    return f"{own.bits} bits" + (f" {own.dynamic}" if own.dynamic is not None else "")
