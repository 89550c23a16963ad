"""Budget: the plan of least predicted cost under a size, an average, bit operations or a latency, or several of them.

    minimise  sum_l S[l, b_l]   subject to   sum_l cost_m[l, b_l] <= limit_m  for every limit m

over the widths of layers, solved exactly, or of output channels, to parts in a million (knapsack.py). DESIGN sec. 3.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError, first_few
from ..objective import channel_curves, layer_curve, parts_of
from ..patterns import families, matches
from ..plan import ALLOWED_BITS, Plan
from ..scheme import FLOAT_BITS, Affine, check_bits
from ..table import METRICS, LayerStats, LayerTable
from .base import Needs, Widths, make_plan
from .knapsack import Problem, Solution, least, solve
from .latency import LatencyTable
from .limits import Limit, bops_limit, code_limit, latency_limit, map_bits, numel, total_limit

Array = NDArray[np.float64]

SIZES = ("average_bits", "total_average_bits", "size_bytes", "weights_only_bytes")
LIMITS = (*SIZES, "bops", "latency_limit")
MOST_MAP_ROUNDS = 20


@dataclass(frozen=True)
class Allocation:
    """What Budget found.

    objective: the plan's predicted cost, pinned layers included; gap: how far from the optimum it is at most, as a
    share of it; binding: the limits that keep some layer from more bits; used: limit -> (used, asked), in the unit
    that was asked in.
    """

    plan: Plan
    objective: float
    gap: float
    binding: tuple[str, ...]
    used: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Budget:
    """The least predicted cost within every limit that is given; at least one of them is.

    average_bits: most bits a weight, codes alone, region bits included (what papers quote). total_average_bits: the
    same with scales, zero points and channel-to-part maps. size_bytes: in total; weights_only_bytes: codes alone.
    bops: multiply-accumulates x weight bits x activation bits (`bops_activation_bits`), for tables with
    multiply-accumulates. latency: a table layer -> bits -> cost, or a JSON file of one; latency_limit: the most of it.

    sensitivity: what is predicted, an error or sensitivity of the table (`mse`, `output_mse`, `kl`, ...); `kl*mse`
    takes each layer's scale from the first and the split inside it from the second. parts: whether channels of one
    layer may have different widths. bits: the candidates. pin: layers whose width is given, as `conv1=8` (a glob, or
    `re:` and a regular expression; 16 or 32 leaves them in float). ends: width of the first and last layer in the
    source's order. tie: layers that must agree, as `*.{query,key,value}`; they get one width each layer.

    Raises SettingError: nothing or nonsense asked; and, when called, a table without what is needed, names that match
    nothing, or limits that cannot be met, saying which and by how much.
    """

    name: ClassVar[str] = "budget"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"average_bits": (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)}

    average_bits: Annotated[float | None, "most bits a weight, scales not counted"] = None
    total_average_bits: Annotated[float | None, "most bits a weight in total"] = None
    size_bytes: Annotated[int | None, "most bytes in total"] = None
    weights_only_bytes: Annotated[int | None, "most bytes, scales not counted"] = None
    bops: Annotated[float | None, "most multiply-accumulates x weight bits x activation bits"] = None
    bops_activation_bits: Annotated[int, "activation bits in bops"] = 8
    latency: Annotated[LatencyTable | str | None, "JSON file: layer -> bits -> cost"] = None
    latency_limit: Annotated[float | None, "most of the latency table's cost"] = None
    sensitivity: Annotated[str, "error or sensitivity to keep low: mse, kl, kl*mse ..."] = "mse"
    bits: Annotated[tuple[int, ...], "candidate bit-widths"] = tuple(range(1, 9))
    parts: Annotated[bool, "channels of one layer may differ in width"] = True
    pin: Annotated[tuple[str, ...], "layers of a given width, GLOB=BITS"] = ()
    tie: Annotated[tuple[str, ...], "layers that must agree, '*.{query,key,value}'"] = ()
    ends: Annotated[int | None, "width of the first and the last layer"] = None

    def __post_init__(self) -> None:
        for field in LIMITS:
            object.__setattr__(self, field, _positive(field, getattr(self, field)))
        if (self.latency is None) != (self.latency_limit is None):
            raise SettingError("latency and latency_limit belong together: a table of costs, and the most of them")
        if self.latency is not None:
            object.__setattr__(self, "latency", LatencyTable.of(self.latency))
        if all(getattr(self, field) is None for field in LIMITS):
            raise SettingError(f"budget: no limit given; one or more of {', '.join(LIMITS)}")
        parts_of(self.sensitivity)
        if not isinstance(self.bits, Sequence) or not self.bits:
            raise SettingError(f"bits: {self.bits!r} is not allowed; a list of one or more of 1 to 8")
        object.__setattr__(self, "bits", tuple(sorted({check_bits(b) for b in self.bits})))
        for field in ("pin", "tie"):
            value = getattr(self, field)
            several = isinstance(value, Sequence) and not isinstance(value, str)
            object.__setattr__(self, field, tuple(value) if several else (value,))
        for entry in self.tie:
            if not isinstance(entry, str):
                raise SettingError(
                    f"tie: {entry!r} is not allowed; names with alternatives, as '*.{{query,key,value}}'"
                )
        for entry in self.pin:
            _pinned(entry)
        if self.ends is not None:
            _plan_bits("ends", self.ends)
        check_bits(self.bops_activation_bits, "bops_activation_bits")

    @property
    def needs(self) -> Needs:
        """Errors at the candidates and at pinned widths, per channel where parts are made."""
        given = {_pinned(entry)[1] for entry in self.pin} | ({self.ends} if self.ends is not None else set())
        names = parts_of(self.sensitivity)
        return Needs(
            tuple(sorted({*self.bits, *(b for b in given if b not in FLOAT_BITS)})),
            tuple(name for name in names if name in METRICS),
            channel_errors=self.parts,
            scheme=Affine(granularity="per_channel", range="mse"),
        )

    def __call__(self, table: LayerTable) -> Plan:
        """The plan for a measured table; it records the objective, the gap and what binds."""
        return self.solve(table).plan

    def solve(self, table: LayerTable) -> Allocation:
        """The plan with what is known of it."""
        if self.parts and table.scheme.granularity == "per_tensor":
            raise SettingError(
                "parts: under per_tensor each part would have a scale of its own, whose error no table knows; measure "
                "per_channel, or give each layer one width (parts=False)"
            )
        for b in self.bits:
            table.scheme.check_bits(b, "bits")
        layout = _Layout(self, table, tuple(self._limits(table)))
        widths, solution = layout.solved()
        used = {
            limit.name: (limit.shown(float(amount)), limit.asked)
            for limit, amount in zip(layout.limits, layout.taken(widths), strict=True)
        }
        objective = solution.cost + layout.pinned_cost
        gap = solution.gap * solution.cost / objective if objective else 0.0
        binding = layout.binding(widths)
        found = {"objective": objective, "gap": gap, "binding": list(binding)}
        return Allocation(make_plan(table, self, widths, found=found), objective, gap, binding, used)

    def _limits(self, table: LayerTable) -> Iterator[Limit]:
        count, scheme = max(1, numel(table)), table.scheme
        if self.average_bits is not None:
            most = _most(self.average_bits, count)
            yield code_limit("average_bits", self.average_bits, most, "bits", scheme, count)
        if self.total_average_bits is not None:
            most = _most(self.total_average_bits, count)
            yield total_limit("total_average_bits", self.total_average_bits, most, "bits", scheme, count)
        if self.size_bytes is not None:
            yield total_limit("size_bytes", self.size_bytes, 8.0 * self.size_bytes, "bytes", scheme, 8)
        if self.weights_only_bytes is not None:
            most = 8.0 * self.weights_only_bytes
            yield code_limit("weights_only_bytes", self.weights_only_bytes, most, "bytes", scheme, 8)
        if self.bops is not None:
            yield bops_limit(self.bops, self.bops_activation_bits)
        if self.latency is not None and self.latency_limit is not None:
            yield latency_limit(self.latency_limit, LatencyTable.of(self.latency))


def best_cost(table: LayerTable, sensitivity: str, bits: Sequence[int], total_bits: int) -> float | None:
    """The least predicted cost of one width per layer within a size in total, to about the gap of one layer's step.

    None where no such plan is that small.
    """
    limit = total_limit("size", total_bits, total_bits, "bits", table.scheme)
    curves = [layer_curve(table, layer, sensitivity, bits) for layer in table.layers]
    takes = [limit.whole(layer, bits) for layer in table.layers]
    if not curves:
        return None
    problem = Problem(np.stack(curves, axis=1), np.stack(takes, axis=1)[None], np.array([float(total_bits)]))
    found = solve(problem, close=False)
    return None if found is None else found.cost


@dataclass(frozen=True)
class _Item:
    """What is decided together: whole layers that agree, or the channels of one layer, each by itself."""

    layers: tuple[LayerStats, ...]
    channels: bool

    @property
    def columns(self) -> int:
        return self.layers[0].channels if self.channels else 1


class _Layout:
    """The knapsack of one table: which layers are pinned, which are items, and what each takes of every limit."""

    def __init__(self, budget: Budget, table: LayerTable, limits: tuple[Limit, ...]) -> None:
        self.budget, self.table, self.limits = budget, table, limits
        self.pinned = _pinned_layers(budget, table)
        self.items = list(_items(budget, table, self.pinned))
        own = {layer.name: layer for layer in table.layers}
        self.pinned_cost = math.fsum(
            float(layer_curve(table, own[name], budget.sensitivity, [b])[0])
            for name, b in self.pinned.items()
            if b not in FLOAT_BITS
        )
        pinned = [np.array([limit.whole(own[n], [b])[0] for n, b in self.pinned.items()]) for limit in limits]
        self.fixed = np.array([math.fsum(amounts) for amounts in pinned])
        self.problem = Problem(self._costs(), self._weights(), np.array([limit.most for limit in limits]) - self.fixed)

    def solved(self) -> tuple[dict[str, Widths], Solution]:
        """Widths by layer. Where maps count, what they take is set aside, a round at a time, until the plan fits."""
        aside = np.zeros(len(self.limits))
        best: Solution | None = None
        for _ in range(MOST_MAP_ROUNDS):
            problem = Problem(self.problem.costs, self.problem.weights, self.problem.limits - aside)
            solution = solve(problem)
            if solution is None:
                break
            over = self._over(solution)
            if (over <= 0).all():
                best = solution
                break
            aside = aside + np.maximum(over, 0.0)
        if aside.any():
            best = self._without_maps(best)
        if best is None:
            raise self._infeasible()
        return self.widths(best.choice), best

    def _over(self, solution: Solution) -> Array:
        over: Array = self.taken(self.widths(solution.choice)) - np.array([limit.most for limit in self.limits])
        return over

    def _without_maps(self, best: Solution | None) -> Solution | None:
        """The better of the best with maps and the best of one width a layer; the bound where no map takes anything."""
        free = solve(self.problem)
        if free is None or not self.items:
            return None
        columns = np.array([item.columns for item in self.items])
        starts = np.cumsum(columns) - columns
        own = self.problem
        merged = [np.add.reduceat(own.costs, starts, axis=1), np.add.reduceat(own.weights, starts, axis=2)]
        whole = solve(Problem(merged[0], merged[1], own.limits))
        if whole is not None and (best is None or whole.cost < best.cost):
            spread = Solution(np.repeat(whole.choice, columns), whole.cost, whole.bound)
            best = spread if (self._over(spread) <= 0).all() else best
        return None if best is None else Solution(best.choice, best.cost, min(free.bound, best.cost))

    def widths(self, choice: NDArray[np.int64]) -> dict[str, Widths]:
        """The options chosen as bits of each layer, or of each of its channels."""
        bits = np.array(self.budget.bits)[choice]
        widths: dict[str, Widths] = dict(self.pinned)
        start = 0
        for item in self.items:
            own = bits[start : start + item.columns]
            start += item.columns
            widths |= {layer.name: own if item.channels else int(own[0]) for layer in item.layers}
        return widths

    def taken(self, widths: Mapping[str, Widths]) -> Array:
        """What a plan takes of every limit, maps included."""
        return np.array([math.fsum(self._layer_takes(limit, widths)) for limit in self.limits])

    def _layer_takes(self, limit: Limit, widths: Mapping[str, Widths]) -> Iterator[float]:
        for layer in self.table.layers:
            own = widths[layer.name]
            if isinstance(own, int):
                yield float(limit.whole(layer, [own])[0])
                continue
            distinct, counts = np.unique(np.asarray(own), return_counts=True)
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
        return tuple(
            limit.name
            for m, limit in enumerate(self.limits)
            if (gains & (problem.weights[m] - problem.weights[m, choice, columns] > room[m])).any()
        )

    def _choice(self, widths: Mapping[str, Widths]) -> NDArray[np.int64]:
        own = [np.atleast_1d(np.asarray(widths[item.layers[0].name])) for item in self.items]
        bits = np.concatenate(own) if own else np.zeros(0, np.int64)
        choice: NDArray[np.int64] = np.searchsorted(self.budget.bits, bits)
        return choice

    def _costs(self) -> Array:
        name, bits = self.budget.sensitivity, self.budget.bits
        blocks = [
            channel_curves(self.table, item.layers[0], name, bits)
            if item.channels
            else sum(layer_curve(self.table, layer, name, bits) for layer in item.layers)[:, None]  # type: ignore[index]
            for item in self.items
        ]
        return np.concatenate([np.zeros((len(bits), 0)), *blocks], axis=1)

    def _weights(self) -> Array:
        bits = self.budget.bits
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

    def _infeasible(self) -> SettingError:
        """Which limit cannot be met, and by how much; of limits that only contradict each other, how far."""
        limits = [(limit, self.fixed[m] + self._least(m)) for m, limit in enumerate(self.limits)]
        beyond = [(limit, amount) for limit, amount in limits if amount > limit.most]
        if not beyond:
            together = " and ".join(limit.name for limit in self.limits)
            return SettingError(f"{together} can each be met, but no plan meets all of them; {self._apart()}")
        said = [
            f"{limit.name}: {limit.asked:g} cannot be reached: the least is {limit.shown(amount):.6g} {limit.unit}, "
            f"{limit.shown(amount - limit.most):.3g} more"
            for limit, amount in beyond
        ]
        return SettingError(
            f"{first_few(said)} (candidates {', '.join(map(str, self.budget.bits))} bits). Raise it, allow fewer bits, "
            "or unpin layers."
        )

    def _least(self, m: int) -> float:
        if not self.items:
            return 0.0
        return float(self.problem.used(least(self.problem, m))[m])

    def _apart(self) -> str:
        """The least of the last limit while the others hold."""
        last = len(self.limits) - 1
        others = np.arange(last)
        problem = Problem(self.problem.weights[last], self.problem.weights[others], self.problem.limits[others])
        found = solve(problem)
        name, limit = self.limits[last].name, self.limits[last]
        amount = math.inf if found is None else limit.shown(found.cost + self.fixed[last])
        if not limit.asked < amount < math.inf:
            return "relax one of them"
        return f"with the others met, the least {name} is {amount:.6g}, {amount - limit.asked:.3g} more than asked"


def _pinned_layers(budget: Budget, table: LayerTable) -> dict[str, int]:
    """Layer -> the width it is given. A pin goes before the rule for the ends."""
    names = [layer.name for layer in table.layers]
    given: dict[str, int] = {}
    if budget.ends is not None and names:
        given |= {names[0]: budget.ends, names[-1]: budget.ends}
    pinned: dict[str, int] = {}
    for entry in budget.pin:
        pattern, bits = _pinned(entry)
        found = [layer.name for layer in table.layers if any(matches(pattern, n) for n in (layer.name, *layer.tied))]
        if not found:
            raise SettingError(f"pin: {pattern!r} matches no layer; names look like {first_few(names[:3], ', ')}")
        for name in found:
            if pinned.setdefault(name, bits) != bits:
                raise SettingError(f"pin: layer {name!r} is given both {pinned[name]} and {bits} bits; give one")
    for name, bits in (given | pinned).items():
        if bits not in FLOAT_BITS:
            table.scheme.check_bits(bits, f"layer {name!r}: bits")
    return given | pinned


def _items(budget: Budget, table: LayerTable, pinned: Mapping[str, int]) -> Iterator[_Item]:
    """Everything that is not pinned, tied layers together; a layer without channels or weights as a whole."""
    layers = {layer.name: layer for layer in table.layers}
    group: dict[str, tuple[str, ...]] = {}
    for pattern in budget.tie:
        found = families(pattern, layers)
        if not any(len(own) > 1 for own in found.values()):
            raise SettingError(
                f"tie: {pattern!r} finds no layers to tie; names look like {first_few(list(layers)[:3], ', ')}"
            )
        for own in found.values():
            for name in own:
                if group.setdefault(name, own) != own:
                    raise SettingError(f"tie: layer {name!r} is in two groups; give one pattern for it")
    for own in dict.fromkeys(group.values()):
        given = {name: pinned.get(name) for name in own}
        if len(set(given.values())) > 1:
            raise SettingError(
                f"tie: {first_few(list(own), ', ')} must agree, but are pinned to {given}; pin all alike"
            )
    for layer in table.layers:
        own = group.get(layer.name, (layer.name,))
        if layer.name in pinned or own[0] != layer.name:
            continue
        yield _Item(tuple(layers[name] for name in own), budget.parts and len(own) == 1 and layer.channels > 1)


def _pinned(entry: Any) -> tuple[str, int]:
    pattern, equals, bits = str(entry).rpartition("=")
    if not equals or not pattern or not bits.strip().isdecimal():
        raise SettingError(f"pin: {entry!r} is not allowed; a layer's name or glob, and its bits, as in 'conv1=8'")
    return pattern.strip(), _plan_bits(f"pin: {pattern}", int(bits))


def _plan_bits(what: str, bits: Any) -> int:
    if type(bits) is not int or bits not in ALLOWED_BITS:
        raise SettingError(f"{what}: {bits!r} is not allowed; 1 to 8, or 16 or 32 for floating point")
    return bits


def _positive(field: str, value: Any) -> float | int | None:
    """As a float, or for bytes an integer: 3 and 3.0 make the same plan, to the byte."""
    if value is None:
        return None
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise SettingError(f"{field}: {value!r} is not allowed; a number above 0")
    if not field.endswith("_bytes"):
        return float(value)
    if value != int(value):
        raise SettingError(f"{field}: {value!r} is not allowed; a whole number above 0")
    return int(value)


def _most(average: float, count: int) -> float:
    """The most bits that the average of `count` weights allows, to the bit."""
    most = math.floor(average * count) + 1
    while most / count > average:
        most -= 1
    return float(most)
