"""Steps under a budget of a file's bytes: reverse water-filling over layers whose codes are entropy coded.

    minimise  sum_l s_l D_l(step_l)   subject to   sum_l bytes_l(step_l) + what the file holds beside  <=  asked

At high rate D_l grows with step^2 and each octave costs a bit a weight, so at the optimum of the Lagrangian all layers
have the same s_l step_l^2: step_l = t / sqrt(s_l), and t is found by bisection on the ladders of the table. With plain
squared error s_l is 1, and all layers have one step (Cover and Thomas, Elements of Information Theory, sec. 10.3.3).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.plan import Plan
from ..plans.stats import CodedCurve, LayerStats
from ..plans.steps import steps_of
from ..plans.table import LayerTable
from .objective import check, layer_curve, predicted

Array = NDArray[np.float64]

# What the coder takes beside the entropy of a layer's codes, and the compressed header: fitted to files of ResNet-20,
# ResNet-56 and MiniLM, which are met within 2 %. `fit_file` counts them in the file.
CODER, LAYER_BYTES = 1.004, 18
HEADER_BYTES, HEADER_BYTES_PER_LAYER = 560, 22
HALVINGS = 60


@dataclass(frozen=True)
class Steps:
    """steps: of each layer; coded_bytes: what its codes are predicted to take; file_bytes: what the file is, None where
    the rest of the model is not known; cost: predicted; finest: layers held at the finest step that int8 has."""

    steps: Mapping[str, float]
    coded_bytes: Mapping[str, int]
    file_bytes: int | None
    file_bits: float
    cost: float
    finest: tuple[str, ...]


def steps_for_bits(table: LayerTable, sensitivity: str, file_bits: float) -> Steps:
    """The steps at so many bits a planned weight: all bytes of the file but other tensors', by the planned weights.

    Raises SettingError for what cannot be met, and for a table without ladders.
    """
    weights = sum(layer.numel for layer in table.layers)
    most = file_bits * weights / 8
    beside = _header_bytes(table)
    if most <= beside:
        raise SettingError(
            f"file_bits: {file_bits:g} bits of each of {weights:,} weights are {int(most):,} bytes, and the header of "
            f"the file alone takes about {beside:,}; ask for {8 * 1.1 * beside / max(1, weights):.3g} bits or more"
        )
    return _solved(table, sensitivity, most - beside)


def steps_for_size(table: LayerTable, sensitivity: str, file_size: int) -> Steps:
    """The steps at so many bytes of the whole file. Raises as steps_for_bits."""
    if table.rest_bytes is None:
        raise SettingError(
            "file_size: this table does not tell what the model stores beside its planned layers; measure again, or "
            "count the planned layers alone (file_bits)"
        )
    beside = table.rest_bytes + _header_bytes(table)
    if file_size <= beside:
        raise SettingError(
            f"file_size: {file_size:,} bytes are fewer than what the file holds beside codes: {table.rest_bytes:,} "
            f"bytes of other tensors as they are stored (biases, norms, skipped layers) and about "
            f"{_header_bytes(table):,} of its header. Coding takes some off: plan with file_bits, which leaves other "
            "tensors out, and then fit_file(..., file_size=...) counts what they really take"
        )
    return _solved(table, sensitivity, file_size - beside)


def predicted_cost(table: LayerTable, plan: Plan, sensitivity: str) -> float | None:
    """The predicted cost of a plan, of steps too; None where the table cannot tell.

    Of steps it can where it has ladders, and where all layers have one.
    """
    steps = steps_of(plan)
    if not steps:
        return predicted(table, plan, sensitivity)
    if steps.keys() != {layer.name for layer in table.layers} or len(steps) != len(plan.layers):
        return None
    if any(layer.coded is None for layer in table.layers):
        return None
    return _cost(_curves(table), _weights(table, sensitivity), steps)


def _solved(table: LayerTable, sensitivity: str, most: float) -> Steps:
    curves = _curves(table)
    weights = _weights(table, sensitivity)
    relative = {name: 1 / math.sqrt(weight) for name, weight in weights.items()}

    def steps_at(t: float) -> dict[str, float]:
        return {
            name: float(np.float32(min(max(t * relative[name], curve.steps[0]), curve.steps[-1])))
            for name, curve in curves.items()
        }

    def codes(steps: Mapping[str, float]) -> dict[str, int]:
        return {name: coded_bytes(curve, steps[name]) for name, curve in curves.items()}

    t = _coarsened(
        lambda t: sum(codes(steps_at(t)).values()) <= most,
        min(curve.steps[0] / relative[name] for name, curve in curves.items()),
        max(curve.steps[-1] / relative[name] for name, curve in curves.items()),
    )
    steps = steps_at(t)
    taken = codes(steps)
    total = sum(taken.values())
    if total > most:
        raise SettingError(
            f"file_bits, file_size: with every code at 0 the layers take {total:,} bytes; {int(most):,} are left for "
            "them. Ask for a larger file"
        )
    beside = _header_bytes(table)
    numel = max(1, sum(layer.numel for layer in table.layers))
    return Steps(
        steps, taken, None if table.rest_bytes is None else total + beside + table.rest_bytes,
        8 * (total + beside) / numel, _cost(curves, weights, steps),
        tuple(name for name, curve in curves.items() if steps[name] <= curve.steps[0] and curve.bits[0] > 0),
    )  # fmt: skip


def _coarsened(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The least t from `low` to `high` at which it fits, bisected on a logarithmic scale."""
    if fits(low):
        return low
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _weights(table: LayerTable, sensitivity: str) -> dict[str, float]:
    """s_l of each layer: what a unit of squared error in it costs, the geometric mean over the widths measured."""
    names = check(table, sensitivity)
    if names == ("mse",):
        return dict.fromkeys((layer.name for layer in table.layers), 1.0)
    check(table, "mse")
    found = {}
    for layer in table.layers:
        costs = layer_curve(table, layer, sensitivity, table.bits)
        lost = layer.numel * layer.errors["mse"]
        known = (costs > 0) & (lost > 0)
        found[layer.name] = float(np.exp(np.mean(np.log(costs[known] / lost[known])))) if known.any() else 0.0
    least = min((weight for weight in found.values() if weight > 0), default=1.0)
    return {name: weight or least for name, weight in found.items()}  # what costs nothing is as coarse as any


def _cost(curves: Mapping[str, CodedCurve], weights: Mapping[str, float], steps: Mapping[str, float]) -> float:
    return sum(weights[name] * _at(curve, curve.squared_error, steps[name]) for name, curve in curves.items())


def _curves(table: LayerTable) -> dict[str, CodedCurve]:
    return {layer.name: _curve(layer) for layer in table.layers}


def _curve(layer: LayerStats) -> CodedCurve:
    if layer.coded is None:
        raise SettingError(
            "file_bits, file_size: this table has no entropies; measure under the entropy-coded scheme, without a "
            "step: measure(model, EntropyCoded()), or mpq measure SOURCE --scheme entropy_coded"
        )
    return layer.coded


def coded_bytes(curve: CodedCurve, step: float) -> int:
    """What a layer's codes are predicted to take in a file."""
    return math.ceil(CODER * _at(curve, curve.bits, step) / 8) + LAYER_BYTES


def _at(curve: CodedCurve, values: Array, step: float) -> float:
    """Between the ladder's steps, in a line over their logarithm."""
    return float(np.interp(math.log(step), np.log(curve.steps), values))


def _header_bytes(table: LayerTable) -> int:
    return HEADER_BYTES + HEADER_BYTES_PER_LAYER * len(table.layers)
