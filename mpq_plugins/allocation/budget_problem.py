"""One table's layers as a knapsack: which are pinned, which are decided together, what each takes of every limit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.checks import as_integer, shown
from ..common.patterns import matches
from ..common.text import first_few
from ..errors import SettingError
from ..plans.activations import INPUT_BITS
from ..plans.granular import FLOAT_BITS
from ..plans.layers import ALLOWED_BITS
from ..plans.size import map_bits
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .contract import Widths
from .knapsack import Problem, Solution, solve
from .limits import Limit
from .objective import channel_curves, layer_curve
from .parts_knapsack import PartsProblem
from .parts_solve import solve_parts
from .ties import tied_layers
from .watch import Watch

Array = NDArray[np.float64]

ROUNDED = 20  # times that a limit is met but for a rounding


@dataclass(frozen=True)
class Rules:
    """What decides a budget's items and what they cost, beside its limits; see Budget for each."""

    sensitivity: str
    bits: tuple[int, ...]
    parts: bool
    pin: tuple[str, ...]
    tie: tuple[str, ...]
    ends: int | None
    input_bits: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Item:
    """What is decided together: whole layers that agree, or the channels of one layer, each by itself."""

    layers: tuple[LayerStats, ...]
    channels: bool

    @property
    def columns(self) -> int:
        return self.layers[0].channels if self.channels else 1


class Layout:
    """The knapsack of one table: which layers are pinned, which are items, and what each takes of every limit."""

    def __init__(self, rules: Rules, table: LayerTable, limits: tuple[Limit, ...]) -> None:
        self.rules, self.table, self.limits = rules, table, limits
        self.pinned = pinned_layers(rules, table)
        self.items = list(_items(rules, table, self.pinned))
        by_name = {layer.name: layer for layer in table.layers}
        self.pinned_cost = math.fsum(
            float(layer_curve(table, by_name[name], rules.sensitivity, [b])[0])
            for name, b in self.pinned.items()
            if b not in FLOAT_BITS
        )
        pinned = [np.array([limit.whole(by_name[n], [b])[0] for n, b in self.pinned.items()]) for limit in limits]
        self.fixed = np.array([math.fsum(amounts) for amounts in pinned])
        self.problem = Problem(self._costs(), self._weights(), np.array([limit.most for limit in limits]) - self.fixed)

    def solved(self, watch: Watch | None = None) -> tuple[dict[str, Widths], Solution]:
        """Widths by layer, maps counted where a limit counts them."""
        watch = watch or Watch()
        aside = np.zeros(len(self.limits))
        for _ in range(ROUNDED):
            solution = self._within(self.problem.limits - aside, watch)
            if solution is None:
                break
            over = self._over(solution)
            if (over <= 0).all():
                return self.widths(solution.choice), solution
            aside += np.maximum(over, 0.0)  # the last bit of a float: layers add up otherwise than their channels
        raise self._infeasible(watch)

    def _within(self, limits: Array, watch: Watch) -> Solution | None:
        problem = self._parts(limits)
        return solve_parts(problem, watch) if problem.maps.any() else solve(problem.plain, watch=watch)

    def _parts(self, limits: Array) -> PartsProblem:
        """With what a bit of each layer's channel-to-part map takes."""
        columns = np.array([item.columns for item in self.items], np.int64)
        maps = [[float(item.columns * (limit.maps and item.channels)) for item in self.items] for limit in self.limits]
        plain = Problem(self.problem.costs, self.problem.weights, limits)
        return PartsProblem(plain, np.cumsum(columns) - columns, np.array(maps, np.float64))

    def _over(self, solution: Solution) -> Array:
        over: Array = self.taken(self.widths(solution.choice)) - np.array([limit.most for limit in self.limits])
        return over

    def widths(self, choice: NDArray[np.int64]) -> dict[str, Widths]:
        """The options chosen as bits of each layer, or of each of its channels."""
        bits = np.array(self.rules.bits)[choice]
        widths: dict[str, Widths] = dict(self.pinned)
        start = 0
        for item in self.items:
            chosen = bits[start : start + item.columns]
            start += item.columns
            widths |= {layer.name: chosen if item.channels else int(chosen[0]) for layer in item.layers}
        return widths

    def taken(self, widths: Mapping[str, Widths]) -> Array:
        """What a plan takes of every limit, maps included."""
        return np.array([math.fsum(self._layer_takes(limit, widths)) for limit in self.limits])

    def _layer_takes(self, limit: Limit, widths: Mapping[str, Widths]) -> Iterator[float]:
        for layer in self.table.layers:
            layer_widths = widths[layer.name]
            if isinstance(layer_widths, int):
                yield float(limit.whole(layer, [layer_widths])[0])
                continue
            distinct, counts = np.unique(np.asarray(layer_widths), return_counts=True)
            if len(distinct) == 1:
                yield float(limit.whole(layer, distinct.tolist())[0])
                continue
            yield float(limit.channel(layer, distinct.tolist()) @ counts)
            if limit.maps:
                yield map_bits(layer.channels, len(distinct))

    def binding(self, widths: Mapping[str, Widths]) -> tuple[str, ...]:
        """The limits in whose remaining room some change that would lower the cost does not fit."""
        problem = self.problem
        choice = self._choice(widths)
        columns = np.arange(choice.size)
        gains = problem.costs < problem.costs[choice, columns] if choice.size else np.zeros((1, 0), bool)
        room = np.array([limit.most for limit in self.limits]) - self.taken(widths)
        takes = self._parts(problem.limits).changes(choice) if choice.size else np.zeros((len(room), 1, 0))
        return tuple(limit.name for m, limit in enumerate(self.limits) if (gains & (takes[m] > room[m])).any())

    def _choice(self, widths: Mapping[str, Widths]) -> NDArray[np.int64]:
        item_widths = [np.atleast_1d(np.asarray(widths[item.layers[0].name])) for item in self.items]
        bits = np.concatenate(item_widths) if item_widths else np.zeros(0, np.int64)
        choice: NDArray[np.int64] = np.searchsorted(self.rules.bits, bits)
        return choice

    def _costs(self) -> Array:
        name, bits = self.rules.sensitivity, self.rules.bits
        blocks = [
            channel_curves(self.table, item.layers[0], name, bits)
            if item.channels
            else sum(layer_curve(self.table, layer, name, bits) for layer in item.layers)[:, None]  # type: ignore[index]
            for item in self.items
        ]
        for item, block in zip(self.items, blocks, strict=True):
            if np.isnan(block).any() or not np.isfinite(block).any(axis=0).all():
                raise SettingError(
                    f"layer {item.layers[0].name!r}: its {name} is NaN, or infinite at every candidate width; measure "
                    "again, pin the layer, or keep another sensitivity low"
                )
        return np.concatenate([np.zeros((len(bits), 0)), *blocks], axis=1)

    def _weights(self) -> Array:
        bits = self.rules.bits
        rows = []
        for limit in self.limits:
            blocks = [
                np.repeat(limit.channel(item.layers[0], bits)[:, None], item.columns, axis=1)
                if item.channels
                else np.sum([limit.whole(layer, bits) for layer in item.layers], axis=0)[:, None]
                for item in self.items
            ]
            rows.append(np.concatenate([np.zeros((len(bits), 0)), *blocks], axis=1))
        return np.stack(rows)

    def _infeasible(self, watch: Watch) -> SettingError:
        """Which limit cannot be met, and by how much; of limits that only contradict each other, how far."""
        limits = [(limit, self.fixed[m] + self._least(m)) for m, limit in enumerate(self.limits)]
        beyond = [(limit, amount) for limit, amount in limits if amount > limit.most]
        if not beyond and not watch.left:
            return SettingError(f"time_limit: no plan was found in {watch.seconds:g} seconds; allow more")
        if not beyond:
            if len(self.limits) == 1:
                return SettingError(
                    f"{self.limits[0].name}: no plan within {self.limits[0].asked:g} was found; raise it"
                )
            together = " and ".join(limit.name for limit in self.limits)
            return SettingError(f"{together} can each be met, but no plan meets all of them; {self._apart()}")
        said = [limit.missed(amount) for limit, amount in beyond]
        return SettingError(
            f"{first_few(said)} (candidates {', '.join(map(str, self.rules.bits))} bits). Raise it, allow fewer bits, "
            "or unpin layers."
        )

    def _least(self, m: int) -> float:
        if not self.items:
            return 0.0
        problem = self._parts(self.problem.limits)
        return float(problem.used(problem.least(m).choice)[m])

    def _apart(self) -> str:
        """The least of the last limit while the others hold."""
        last = len(self.limits) - 1
        others = np.arange(last)
        problem = Problem(self.problem.weights[last], self.problem.weights[others], self.problem.limits[others])
        solution = solve(problem)
        name, limit = self.limits[last].name, self.limits[last]
        amount = math.inf if solution is None else limit.shown(solution.cost + self.fixed[last])
        if not limit.asked < amount < math.inf:
            return "relax one of them"
        return f"with the others met, the least {name} is {amount:.6g}, {amount - limit.asked:.3g} more than asked"


def pinned_layers(rules: Rules, table: LayerTable) -> dict[str, int]:
    """Layer -> the width it is given. A pin goes before the rule for the ends."""
    names = [layer.name for layer in table.layers]
    given: dict[str, int] = {}
    if rules.ends is not None and names:
        given |= {names[0]: rules.ends, names[-1]: rules.ends}
    pinned: dict[str, int] = {}
    for entry in rules.pin:
        pattern, bits, _ = pinned_widths(entry)
        for name in matching_layers(pattern, table):
            if pinned.setdefault(name, bits) != bits:
                raise SettingError(f"pin: layer {name!r} is given both {pinned[name]} and {bits} bits; give one")
    for name, bits in (given | pinned).items():
        if bits not in FLOAT_BITS:
            table.scheme.check_bits(bits, f"layer {name!r}: bits")
    return given | pinned


def matching_layers(pattern: str, table: LayerTable) -> list[str]:
    """The layers that a pin's pattern names. Raises SettingError where there are none."""
    matching = [layer.name for layer in table.layers if any(matches(pattern, n) for n in (layer.name, *layer.tied))]
    if not matching:
        names = [layer.name for layer in table.layers[:3]]
        raise SettingError(f"pin: {pattern!r} matches no layer; names look like {first_few(names, ', ')}")
    return matching


def _items(rules: Rules, table: LayerTable, pinned: Mapping[str, int]) -> Iterator[_Item]:
    """Everything that is not pinned, tied layers together; a layer without channels or weights as a whole."""
    layers = {layer.name: layer for layer in table.layers}
    families_of = tied_families(rules, table, pinned)
    for layer in table.layers:
        family = families_of.get(layer.name, (layer.name,))
        if layer.name in pinned or family[0] != layer.name:
            continue
        yield _Item(tuple(layers[name] for name in family), rules.parts and len(family) == 1 and layer.channels > 1)


def tied_families(rules: Rules, table: LayerTable, pinned: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Layer -> those that it must agree with, where it is tied. Raises SettingError for those pinned apart."""
    families_of = tied_layers(rules.tie, [layer.name for layer in table.layers])
    for family in dict.fromkeys(families_of.values()):
        given = {name: pinned.get(name) for name in family}
        if len(set(given.values())) > 1:
            raise SettingError(
                f"tie: {first_few(list(family), ', ')} must agree, but are pinned to {given}; pin all alike"
            )
    return families_of


def pinned_widths(entry: Any) -> tuple[str, int, int | None]:
    """'conv1=8' -> ('conv1', 8, None), and 'conv1=8/4' -> ('conv1', 8, 4), whose input has 4. Raises SettingError."""
    pattern, equals, word = str(entry).rpartition("=")
    bits, slash, inputs = (part.strip() for part in word.partition("/"))
    width, input_width = as_integer(bits), as_integer(inputs)
    if equals and pattern and word.strip().isidentifier():
        raise SettingError(
            f"pin: {entry!r} names a type, and this table has widths; give a number of bits, or measure types"
        )
    if not equals or not pattern or width is None:
        raise SettingError(f"pin: {shown(entry)} is not allowed; a layer's name or glob, and its bits, as in 'conv1=8'")
    width = plan_bits(f"pin: {pattern}", width)
    if not slash:
        return pattern.strip(), width, None
    if input_width not in INPUT_BITS:
        raise SettingError(
            f"pin: {entry!r}: an input of {inputs!r:.20} bits is not allowed; 2 to 16, as in 'conv1=8/4'"
        )
    if width in FLOAT_BITS:
        raise SettingError(f"pin: {entry!r}: a layer in float reads its input in float; give '{pattern}={width}'")
    return pattern.strip(), width, input_width


def plan_bits(what: str, bits: Any) -> int:
    """The width, if a plan can have it. Raises SettingError naming `what`."""
    if type(bits) is not int or bits not in ALLOWED_BITS:
        raise SettingError(f"{what}: {shown(bits)} is not allowed; 1 to 8, or 16 or 32 for floating point")
    return bits
