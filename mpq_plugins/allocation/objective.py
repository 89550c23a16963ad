"""What a plan is predicted to cost: errors and sensitivities of a table as numbers that add up over layers.

`mse` and `relative` are means over weights, so they count once per weight; `rmse` and `max_abs` count once per layer;
`sqnr_db` as the noise's share of the signal's power; a sensitivity is a sum already. `first*second` takes the scale of
each layer from the first and the split between its bit-widths and channels from the second.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..common.checks import shown
from ..common.text import did_you_mean
from ..errors import SettingError
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice
from ..plans.plan import Plan
from ..plans.stats import LayerStats
from ..plans.table import LayerTable

Array = NDArray[np.float64]

PER_WEIGHT = ("mse", "relative")
NOT_BY_CHANNEL = ("rmse", "max_abs", "sqnr_db")


def parts_of(name: str) -> tuple[str, ...]:
    """The one or two names of a sensitivity as a user writes it: `mse`, or `kl*mse`. Raises SettingError."""
    names = tuple(part.strip() for part in name.split("*")) if isinstance(name, str) else ()
    if not 1 <= len(names) <= 2 or not all(names):
        raise SettingError(
            f"sensitivity: {shown(name)} is not allowed; an error or a sensitivity of the table, or two as in kl*mse, "
            "the first for the scale of each layer and the second for the split inside it"
        )
    return names


def check(table: LayerTable, name: str) -> tuple[str, ...]:
    """The names, if the table has them. Raises SettingError listing what it has."""
    for part in (names := parts_of(name)):
        if part not in (*table.metrics, *table.sensitivities):
            has = ", ".join(names_of(table))
            raise SettingError(
                f"sensitivity: {part!r} was not measured; this table has {has}{did_you_mean(part, names_of(table))}. "
                "What needs inputs is added by mpq_plugins.sensitivity, or measured by: mpq measure MODULE:FACTORY "
                f"--sensitivity {part} --calibrate MODULE:FUNCTION -o table.mpqt"
            )
    return names


def names_of(table: LayerTable) -> tuple[str, ...]:
    """The errors and sensitivities that a table has."""
    return (*table.metrics, *table.sensitivities)


def layer_curve(table: LayerTable, layer: LayerStats, name: str, bits: Sequence[int]) -> Array:
    """The predicted cost of a whole layer at each bit-width, (bits,). Raises SettingError where not measured."""
    curve: Array = combined_curve(table, layer, name)[[table.position(b) for b in bits]]
    return curve


def combined_curve(table: LayerTable, layer: LayerStats, name: str) -> Array:
    """The predicted cost of a whole layer wherever it was measured. Raises SettingError for what the table lacks."""
    names = check(table, name)
    last = _curve(layer, names[-1])
    curve: Array = last * _scale(layer, names, last)
    return curve


def channel_curves(table: LayerTable, layer: LayerStats, name: str, bits: Sequence[int]) -> Array:
    """The predicted cost of each output channel at each bit-width, (bits, channels).

    Raises SettingError where it was not measured per channel.
    """
    names = check(table, name)
    positions = [table.position(b) for b in bits]
    if names[-1] in NOT_BY_CHANNEL and names[-1] not in layer.sensitivities:
        raise SettingError(
            f"sensitivity: {names[-1]} does not add up over channels; use mse or relative, or one width a layer "
            "(parts=False)"
        )
    last = _channel_curves(layer, names[-1])
    if last is None:
        remedy = (
            "measure(per_channel=True)" if names[-1] in table.metrics else f"split by another, as in {names[-1]}*mse"
        )
        raise SettingError(
            f"layer {layer.name!r}: no {names[-1]} per channel in this table; {remedy}, or give each layer one width "
            "(parts=False)"
        )
    curves: Array = last[positions] * _scale(layer, names, _curve(layer, names[-1]))
    return curves


def predicted(table: LayerTable, plan: Plan, name: str) -> float | None:
    """The predicted cost of a plan; None where the table cannot tell.

    It cannot for a scheme that was not measured; for bit-widths that were not; and for parts, without numbers per
    channel or where a part has a scale of its own (per_tensor).
    """
    check(table, name)
    if plan.by_name.keys() != {layer.name for layer in table.layers}:
        return None
    total = 0.0
    for layer in table.layers:
        cost = _choice_cost(table, layer, plan.by_name[layer.name], name)
        if cost is None:
            return None
        total += cost
    return total


def _choice_cost(table: LayerTable, layer: LayerStats, choice: LayerChoice, name: str) -> float | None:
    widths = [bits for bits, _ in choice.widths if bits not in FLOAT_BITS]
    if not widths:
        return 0.0
    if choice.scheme != table.scheme_of(layer) or not set(widths) <= set(table.bits):
        return None
    if choice.bits is not None:
        return float(layer_curve(table, layer, name, [choice.bits])[0])
    split = parts_of(name)[-1]
    if choice.scheme.granularity == "per_tensor" or split in NOT_BY_CHANNEL or _channel_curves(layer, split) is None:
        return None
    parts = [part for part in choice.all_parts if part.bits not in FLOAT_BITS]
    curves = channel_curves(table, layer, name, widths)
    return sum(float(curves[k, part.runs.array()].sum()) for k, part in enumerate(parts))


def _curve(layer: LayerStats, name: str) -> Array:
    if name in layer.sensitivities:
        return layer.sensitivities[name]
    count = layer.numel if name in PER_WEIGHT else 1
    return _as_numbers(name, layer.errors[name]) * count


def _as_numbers(name: str, values: Array) -> Array:
    """Decibels as the noise's share; the others add up as they are."""
    return 10 ** (-values / 10) if name == "sqnr_db" else values


def _channel_curves(layer: LayerStats, name: str) -> Array | None:
    """(bits, channels), or None where there are none."""
    if name in layer.sensitivities:
        return layer.channel_sensitivities.get(name)
    if name not in layer.channel_errors:
        return None
    per_channel = layer.numel / max(1, layer.channels)
    return _as_numbers(name, layer.channel_errors[name]) * (per_channel if name in PER_WEIGHT else 1)


def _scale(layer: LayerStats, names: Sequence[str], split: Array) -> float:
    """What the second sensitivity is multiplied by."""
    return 1.0 if len(names) == 1 else shared_scale(_curve(layer, names[0]), split)


def shared_scale(first: Array, split: Array) -> float:
    """The geometric mean over bit-widths of the first curve's share of the other, (widths,) each."""
    known = (first > 0) & (split > 0)
    return float(np.exp(np.mean(np.log(first[known] / split[known])))) if known.any() else 0.0
