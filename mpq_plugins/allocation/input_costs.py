"""What quantizing layers' inputs is predicted to cost, in the unit of what quantizing weights is.

Only what is measured at one place adds up: a change of the network's output (`kl`, `distance`), or of the layer's own
(`output_mse`). Errors of weights and of inputs are in different units, so `mse` alone says nothing of both; as the
second of two, in `kl*mse`, it says how a layer's costs are split between widths.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.stats import InputStats, LayerStats
from ..plans.table import LayerTable
from .objective import check, parts_of, shared_scale

Array = NDArray[np.float64]


def check_adds_up(table: LayerTable, name: str) -> None:
    """Raise SettingError for a sensitivity whose costs of weights and of inputs do not add up, naming what does."""
    names = check(table, name)
    inputs = [layer.inputs for layer in table.layers if layer.inputs is not None]
    first, last = names[0], names[-1]
    both = [each for each in table.sensitivities if all(each in own.sensitivities for own in inputs)]
    if first not in both:
        why = (
            "is an error of weights, and of inputs in another unit, so the two do not add up"
            if first in table.metrics
            else "was measured of weights, and not of inputs"
        )
        remedy = (
            f"of both, this table has {', '.join(both)}: give sensitivity={both[0]!r} (--sensitivity {both[0]})"
            if both
            else "measure kl, distance or output_mse of both, by mpq_plugins.sensitivity and measure_activations"
        )
        raise SettingError(f"sensitivity: {first!r} {why}; {remedy}")
    if any(_measured(own, last) is None for own in inputs):
        raise SettingError(
            f"sensitivity: {last!r} was not measured of inputs, which have {', '.join(_names(inputs[0]))}; split by "
            f"another, or give sensitivity={first!r}"
        )


def input_curve(table: LayerTable, layer: LayerStats, name: str, bits: Sequence[int]) -> Array:
    """The predicted cost of a layer's input at each width, (bits,).

    Raises SettingError for a width that was not measured, and for costs that are no numbers.
    """
    assert layer.inputs is not None
    positions = [_position(table, b) for b in bits]
    names = parts_of(name)
    curves = [_measured(layer.inputs, each) for each in (names[0], names[-1])]
    first, last = (curve for curve in curves if curve is not None)  # both are there, or check_adds_up would have said
    curve: Array = (last if len(names) == 1 else last * shared_scale(first, last))[positions]
    if np.isnan(curve).any() or not np.isfinite(curve).any():
        raise SettingError(
            f"layer {layer.name!r}: the {name} of its input is NaN, or infinite at every candidate width; measure "
            "again, or leave the layer in float (pin it to 32)"
        )
    return curve


def _position(table: LayerTable, bits: int) -> int:
    if bits not in table.input_bits:
        measured = ", ".join(map(str, table.input_bits))
        raise SettingError(f"input_bits: {bits} was not measured; this table has {measured} of inputs")
    return table.input_bits.index(bits)


def _measured(inputs: InputStats, name: str) -> Array | None:
    return inputs.sensitivities.get(name, inputs.errors.get(name))


def _names(inputs: InputStats) -> tuple[str, ...]:
    return (*inputs.errors, *inputs.sensitivities)
