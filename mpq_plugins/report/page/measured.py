"""What the page knows of a table, so that it decides as the library does: errors to the last bit, orders as they are.

Whatever the library sums in its own order, the page is given and does not sum again: which layer and which channel is
the more important, and what a layer is predicted to cost.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...allocation.choices import layer_choice
from ...allocation.make import plan_of
from ...allocation.objective import channel_curves, combined_curve
from ...allocation.uniform import Uniform
from ...errors import SettingError
from ...plans.granular import LAYER_SCALE_BITS
from ...plans.layers import LayerChoice
from ...plans.scheme import group_bits, has_width, scale_bits_of, scales_per_layer
from ...plans.size import LayerSize, layer_size
from ...plans.stats import LayerStats
from ...plans.table import LayerTable
from ..details import scheme_words
from .commands import as_argument
from .packed import doubles, permutations
from .patterns import pattern_of

IN_PARTS = ("affine", "piecewise", "entropy_coded")  # schemes under which any number of channels can have any width
MOST_CHANNEL_COSTS = 60_000  # numbers; more would make the page too large to be sent
MOST_ORDERED = 3_000_000  # channels of all layers together


@dataclass(frozen=True)
class Measured:
    """A table as the page has it.

    Attributes:
        table: The table.
        file: What the command line calls it.
        judge: What plans are compared on; None where the table has nothing to compare on.

    Raises:
        SettingError: The table has no layers, or its scheme counts sizes in a way that the page does not know.
    """

    table: LayerTable
    file: str
    judge: str | None

    def document(self) -> dict[str, Any]:
        """Give what the page embeds.

        Returns:
            Plain values.

        Raises:
            SettingError: As the class.
        """
        table = self.table
        if not table.layers:
            raise SettingError(f"{self.file}: the table has no layers, so there is nothing to show")
        bits = widths_of(table)
        if not bits:
            raise SettingError(f"{self.file}: {table.scheme} has none of the widths {list(table.bits)}")
        positions = [table.position(b) for b in bits]
        parts = table.scheme.name in IN_PARTS
        ordered = parts and sum(layer.channels for layer in table.layers) <= MOST_ORDERED
        return {
            "file": as_argument(self.file),
            "quantizer": self.quantizer,
            "scheme": table.scheme.name,
            "parts": parts,
            "bits": list(bits),
            "metrics": list(table.metrics),
            "judge": self.judge,
            "errors": {
                name: doubles([layer.errors[name][positions] for layer in table.layers]) for name in table.metrics
            },
            "costs": {name: self._costs(name, positions) for name in self._cost_names()},
            "importances": doubles(np.array([layer.importance for layer in table.layers])),
            "order": np.argsort([-layer.importance for layer in table.layers], kind="stable").tolist(),
            "channel_orders": permutations(map(channel_order, table.layers)) if ordered else None,
            "channel_costs": self._channel_costs(bits) if ordered else None,
            "widths": [_width(table, b) for b in bits],
            "groups": [
                table.scheme_of(one).groups_per_channel(one.shape, one.channel_axis, one.name) for one in table.layers
            ],
            "impossible": _impossible(table, bits),
            "rest_bytes": table.rest_bytes,
            "skipped": len(table.skipped),
            "patterns": _patterns(table),
            "written": _written(table),
        }

    @property
    def quantizer(self) -> str:
        """How weights become codes, in words."""
        folded = ", BatchNorm folded" if self.table.fold_bn else ""
        return f"{scheme_words(self.table.scheme)}{folded}"

    def _cost_names(self) -> tuple[str, ...]:
        """Whose costs the page can keep low: everything measured, and the judge where that is a product of two."""
        names = (*self.table.metrics, *self.table.sensitivities)
        return (*names, self.judge) if self.judge is not None and self.judge not in names else names

    def _costs(self, name: str, positions: Sequence[int]) -> dict[str, Any]:
        """Costs by layer and width; where these are errors, or these times weights, that is said in their stead."""
        layers = self.table.layers
        costs = np.array([combined_curve(self.table, layer, name)[positions] for layer in layers])
        if name in self.table.metrics:
            errors = np.array([layer.errors[name][positions] for layer in layers])
            weights = np.array([[layer.numel] for layer in layers], np.float64)
            for times, product in ((1, errors), ("weights", errors * weights)):
                if np.array_equal(costs, product):
                    return {"errors": name, "times": times}
        return doubles(costs)

    def _channel_costs(self, bits: Sequence[int]) -> list[dict[str, Any]] | None:
        """The judge's cost of each channel, (widths, channels) a layer; None where that is unknown or too much."""
        table, judge = self.table, self.judge
        if judge is None or table.scheme.granularity == "per_tensor":
            return None
        if sum(layer.channels for layer in table.layers) * len(bits) > MOST_CHANNEL_COSTS:
            return None
        try:
            return [doubles(channel_curves(table, layer, judge, bits)) for layer in table.layers]
        except SettingError:  # it was not measured by channel
            return None


def widths_of(table: LayerTable) -> tuple[int, ...]:
    """The widths that were measured and that the scheme has."""
    return tuple(b for b in table.bits if has_width(table.scheme, b))


def channel_order(layer: LayerStats) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Channels from the most important down, equal ones in their order, as PTILMPQ takes them."""
    return np.argsort(-layer.channel_importance, kind="stable")


def _width(table: LayerTable, bits: int) -> dict[str, int]:
    """What a width costs beyond its codes: of each weight, of each group, and of the layer."""
    scheme = table.scheme
    scale = scale_bits_of(scheme)
    group = scheme.scales_per_group * scale + group_bits(scheme, bits) + scheme.zero_point_bits(bits)
    return {
        "interval": scheme.interval_bits(bits),
        "group": group + scheme.codebook_entries(bits) * scale,
        "layer": scales_per_layer(scheme) * LAYER_SCALE_BITS,
    }


def _impossible(table: LayerTable, bits: Sequence[int]) -> list[list[int]]:
    """[layer, width] that the layer cannot have; and make sure that the page counts all others as the library does.

    Layers of one shape are alike, so one of them is tried.
    """
    by_width = {b: _width(table, b) for b in bits}
    lacking: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for layer in table.layers:
        shape = (layer.shape, layer.channel_axis)
        if shape not in lacking:
            lacking[shape] = [b for b in bits if not _possible(layer, table, b, by_width[b])]
    return [[place, b] for place, one in enumerate(table.layers) for b in lacking[one.shape, one.channel_axis]]


def _possible(layer: LayerStats, table: LayerTable, bits: int, width: dict[str, int]) -> bool:
    """Whether the layer can have that width, which then is counted as the library counts it."""
    try:
        choice = layer_choice(layer, bits, table.scheme)
    except SettingError:
        return False
    _check_counted(layer_size(choice), choice, width)
    return True


def _check_counted(size: LayerSize, choice: LayerChoice, width: dict[str, int]) -> None:
    """Raise SettingError where the scheme counts groups otherwise than schemes of this package do."""
    each = choice.scheme.groups_per_channel(choice.shape, choice.channel_axis, choice.name)
    groups = max(1, choice.channels * each) if choice.numel else 0
    of_layer = width["layer"] if groups else 0
    if size.total != choice.code_bits + choice.numel * width["interval"] + groups * width["group"] + of_layer:
        raise SettingError(
            f"layer {choice.name!r}: the scheme {choice.scheme.name} counts its groups in a way that the page does "
            "not know; mpq plan and mpq show do"
        )


def _patterns(table: LayerTable) -> dict[str, str]:
    """By place how commands name the layers whose names are no patterns of their own."""
    found = {place: pattern_of(layer.name) for place, layer in enumerate(table.layers)}
    return {str(place): own for place, own in found.items() if own != table.layers[place].name}


def _written(table: LayerTable) -> dict[str, Any]:
    """The pieces of a plan's file that are the same whatever is decided, as the library writes them."""
    in_float = [layer_choice(layer, 32, table.scheme) for layer in table.layers]  # a width that every layer can have
    document = plan_of(table, Uniform(), in_float, {}).document()
    schemes: dict[str, int] = {}
    places = [schemes.setdefault(_line(one["scheme"]), len(schemes)) for one in document["layers"]]
    head = [(key, value) for key, value in document.items() if key not in ("layers", "allocator")]
    return {
        "head": [[key, _line(value), _sealed(value)] for key, value in head],
        "schemes": [[text, _sealed(json.loads(text))] for text in schemes],
        "scheme_of": places,
    }


def _line(value: Any) -> str:
    """As a plan's file has it."""
    return json.dumps(value, ensure_ascii=False)


def _sealed(value: Any) -> str:
    """As the checksum reads it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
