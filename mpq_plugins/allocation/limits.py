"""What a plan may take: each limit as what a layer, or one of its channels, takes of it at each bit-width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.granular import FLOAT_BITS
from ..plans.scheme import Scheme
from ..plans.size import layer_size
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .choices import layer_choice
from .latency import LatencyTable

Array = NDArray[np.float64]

UNITS = float(1 << 40)  # of a latency limit
BILLIONTH = float(1 << 10)


class Stated:
    """What every limit says of amounts, in the unit of what was asked."""

    name: str
    asked: float
    unit: str
    per: float
    beside: float

    def shown(self, amount: float) -> float:
        """An amount in the unit of what was asked."""
        return amount / self.per + self.beside

    def missed(self, least: float) -> str:
        """That it cannot be met, and by how much; least: the smallest amount there is."""
        return (
            f"{self.name}: {self.asked:,g} cannot be reached: the least is {self.shown(least):,.6g} {self.unit}, "
            f"{self.shown(least) - self.asked:,.4g} more"
        )


@dataclass(frozen=True)
class Limit(Stated):
    """No more than `most`, which was asked for as `asked`, in `unit`, so many times `per`.

    whole(layer, bits) is what the layer takes at each of these widths; channel(layer, bits) what one of its
    channels takes where channels have widths of their own; maps: whether channel-to-part maps count too; beside: what
    else was counted in what was asked, in its unit.
    """

    name: str
    asked: float
    most: float
    unit: str
    whole: Callable[[LayerStats, Sequence[int]], Array]
    channel: Callable[[LayerStats, Sequence[int]], Array]
    per: float = 1.0
    maps: bool = False
    beside: float = 0.0


def code_limit(name: str, asked: float, most: float, unit: str, scheme: Scheme, per: float = 1.0) -> Limit:
    """Bits of the codes, interval bits included."""

    def codes(layer: LayerStats, bits: Sequence[int], numel: int) -> Array:
        return np.array([numel * (b if b in FLOAT_BITS else b + scheme.interval_bits(b)) for b in bits], np.float64)

    return Limit(
        name, asked, most, unit,
        whole=lambda layer, bits: codes(layer, bits, layer.numel),
        channel=lambda layer, bits: codes(layer, bits, layer.numel // max(1, layer.channels)),
        per=per,
    )  # fmt: skip


def total_limit(name: str, asked: float, most: float, unit: str, scheme: Scheme, per: float = 1.0) -> Limit:
    """Bits of everything a file must hold: codes, interval bits, scales, zero points and channel-to-part maps."""

    def whole(layer: LayerStats, bits: Sequence[int]) -> Array:
        return np.array([layer_size(layer_choice(layer, b, scheme)).total for b in bits], np.float64)

    def channel(layer: LayerStats, bits: Sequence[int]) -> Array:
        return whole(layer, bits) / max(1, layer.channels)  # every channel has groups of its own

    return Limit(name, asked, most, unit, whole, channel, per, maps=True)


def model_limit(asked: int, table: LayerTable, scheme: Scheme) -> Limit:
    """Bytes of the whole model: what `total_limit` counts of the planned layers, and the rest as it is stored.

    Raises SettingError for a table that does not tell what the rest takes.
    """
    if table.rest_bytes is None:
        raise SettingError(
            "size: this table does not tell what the model stores beside its planned layers, for it is of an earlier "
            "version, or that could not be known. Limit the planned layers alone (size_bytes), or measure again: "
            "mpq measure SOURCE -o TABLE"
        )
    most = 8.0 * (asked - table.rest_bytes)
    limit = total_limit("size", asked, most, "bytes", scheme, 8)
    return replace(limit, beside=float(table.rest_bytes))


def bops_limit(asked: float, activation_bits: int) -> Limit:
    """Multiply-accumulates x weight bits x activation bits."""

    def whole(layer: LayerStats, bits: Sequence[int]) -> Array:
        return np.array([macs_of(layer) * b * activation_bits for b in bits], np.float64)

    def channel(layer: LayerStats, bits: Sequence[int]) -> Array:
        return whole(layer, bits) / max(1, layer.channels)

    return Limit("bops", asked, asked, "bit operations", whole, channel)


def macs_of(layer: LayerStats) -> int:
    """Its multiply-accumulates. Raises SettingError where they were not counted."""
    if layer.macs is None:
        raise SettingError(
            f"bops: layer {layer.name!r} has no multiply-accumulates in this table; measure(example_input=...), or "
            "--input-shape on the command line"
        )
    return layer.macs


def latency_limit(asked: float, table: LatencyTable) -> Limit:
    """The sum of the layers' costs in the latency table, kept to a part in a billion.

    Costs are counted in whole small units, so that sums of them, and of a layer's channels, are exact.
    """
    unit = asked / UNITS

    def whole(layer: LayerStats, bits: Sequence[int]) -> Array:
        return channel(layer, bits) * max(1, layer.channels)

    def channel(layer: LayerStats, bits: Sequence[int]) -> Array:
        shares: Array = np.rint(np.array(table.curve(layer.name, bits)) / unit / max(1, layer.channels))
        return shares

    return Limit("latency_limit", asked, UNITS + BILLIONTH, "of the latency table", whole, channel, per=1 / unit)


def numel(table: LayerTable) -> int:
    """Weights of all planned layers."""
    return sum(layer.numel for layer in table.layers)
