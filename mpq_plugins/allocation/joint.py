"""Budget over weights and inputs together: a pair of widths for each layer, at the least predicted cost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..common.text import first_few
from ..errors import SettingError
from ..plans.activations import Activations
from ..plans.granular import FLOAT_BITS
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .budget_problem import Rules
from .dual import Choice
from .input_costs import check_adds_up, input_curve
from .joint_inputs import Inputs
from .joint_limits import PairLimit
from .joint_solve import JointProblem, solve_joint
from .knapsack import Problem, Solution
from .objective import layer_curve
from .watch import Watch

Array = NDArray[np.float64]
FLOAT_INPUT = 32  # bits that an input in floating point counts, where its layer is quantized


@dataclass(frozen=True)
class Pair:
    """A layer's widths; input_bits: None where its input stays in floating point."""

    bits: int
    input_bits: int | None


@dataclass(frozen=True)
class JointLayout:
    """The knapsack of one table's weights and inputs."""

    rules: Rules
    table: LayerTable
    inputs: Inputs
    limits: tuple[PairLimit, ...]

    def solved(self, watch: Watch) -> tuple[dict[str, Pair], Solution]:
        """The widths of each layer, and the solution. Raises SettingError."""
        solution = solve_joint(self.problem, watch)
        if solution is None:
            raise self._infeasible(watch)
        return self._pairs(solution.choice), solution

    @cached_property
    def items(self) -> list[tuple[LayerStats, ...]]:
        """Layers that agree on both widths, those left in float aside."""
        by_name = {layer.name: layer for layer in self.table.layers}
        families = self.inputs.families
        named = dict.fromkeys(families.get(name, (name,)) for name in by_name)
        return [
            tuple(by_name[name] for name in family)
            for family in named
            if self.inputs.weights.get(family[0]) not in FLOAT_BITS
        ]

    @cached_property
    def bits(self) -> list[int]:
        """Weights' widths, candidates' and pinned ones."""
        return sorted({*self.rules.bits, *self.inputs.weights.values()} - set(FLOAT_BITS))

    @cached_property
    def input_bits(self) -> list[int]:
        """Inputs' widths."""
        return sorted({*self.rules.input_bits, *self.inputs.widths.values()})

    @cached_property
    def problem(self) -> JointProblem:
        """The knapsack of what is not left in float."""
        check_adds_up(self.table, self.rules.sensitivity)
        shape = (len(self.bits) * len(self.input_bits), len(self.items))
        costs = np.full(shape, np.inf)
        weights = np.zeros((len(self.limits), *shape))
        for i, item in enumerate(self.items):
            options = np.add.outer(np.array(self._allowed(item)) * len(self.input_bits), self._inputs(item))
            costs[options, i] = sum(self._cost(layer) for layer in item)
            for m, limit in enumerate(self.limits):
                weights[m, options, i] = sum(self._takes(limit, layer) for layer in item)
        most = np.array([limit.most for limit in self.limits]) - self._fixed()
        names = list(dict.fromkeys(self.inputs.groups[item[0].name] for item in self.items))
        group = np.array([names.index(self.inputs.groups[item[0].name]) for item in self.items], np.int64)
        return JointProblem(Problem(costs, weights, most), len(self.input_bits), group)

    def taken(self, pairs: Mapping[str, Pair]) -> Array:
        """What a plan takes of every limit."""
        return np.array([math.fsum(self._amounts(limit, pairs)) for limit in self.limits])

    def binding(self, pairs: Mapping[str, Pair]) -> tuple[str, ...]:
        """The limits in whose remaining room some change that would lower the cost does not fit.

        A change is one layer's weights', or that of inputs that agree.
        """
        room = np.array([limit.most for limit in self.limits]) - self.taken(pairs)
        bound = np.zeros(len(self.limits), bool)
        for gains, takes in self._changes(self._choice(pairs)):
            bound |= (takes[:, gains < 0] > room[:, None]).any(axis=1)
        return tuple(dict.fromkeys(limit.name for limit, tight in zip(self.limits, bound, strict=True) if tight))

    def _allowed(self, item: Sequence[LayerStats]) -> list[int]:
        """Positions of the weights' widths that the item may have."""
        given = self.inputs.weights.get(item[0].name)
        return [self.bits.index(b) for b in (self.rules.bits if given is None else (given,))]

    def _inputs(self, item: Sequence[LayerStats]) -> list[int]:
        """Positions of its inputs' widths; one, which says nothing, where all inputs stay in floating point."""
        if not any(self.inputs.quantized(layer) for layer in item):
            return [0]
        given = self.inputs.widths.get(item[0].name)
        return [self.input_bits.index(a) for a in (self.rules.input_bits if given is None else (given,))]

    def _widths(self, layer: LayerStats) -> tuple[list[int], list[int]]:
        """The widths that a layer may have; of an input in floating point what it counts."""
        item = self._item(layer)
        inputs = [self.input_bits[k] for k in self._inputs(item)]
        return [self.bits[k] for k in self._allowed(item)], (
            inputs if self.inputs.quantized(layer) else [FLOAT_INPUT] * len(inputs)
        )

    def _item(self, layer: LayerStats) -> tuple[LayerStats, ...]:
        return self._item_of[layer.name]

    @cached_property
    def _item_of(self) -> dict[str, tuple[LayerStats, ...]]:
        return {layer.name: item for item in self.items for layer in item}

    def _cost(self, layer: LayerStats) -> Array:
        """Of each pair that the layer may have, (bits, input bits)."""
        name = self.rules.sensitivity
        bits, input_bits = self._widths(layer)
        curve = layer_curve(self.table, layer, name, bits)
        if np.isnan(curve).any() or not np.isfinite(curve).any():
            raise SettingError(
                f"layer {layer.name!r}: its {name} is NaN, or infinite at every candidate width; measure again, pin "
                "the layer, or keep another sensitivity low"
            )
        if not self.inputs.quantized(layer):
            return np.repeat(curve[:, None], len(input_bits), axis=1)
        return np.add.outer(curve, input_curve(self.table, layer, name, input_bits))

    def _takes(self, limit: PairLimit, layer: LayerStats) -> Array:
        return limit.takes(layer, *self._widths(layer))

    def _fixed(self) -> Array:
        """What layers in float take, weights and inputs."""
        left = [layer for layer in self.table.layers if self.inputs.weights.get(layer.name) in FLOAT_BITS]
        given = {layer.name: Pair(self.inputs.weights[layer.name], None) for layer in left}
        return np.array(
            [math.fsum(self._amount(limit, layer, given[layer.name]) for layer in left) for limit in self.limits]
        )

    def _amounts(self, limit: PairLimit, pairs: Mapping[str, Pair]) -> Iterator[float]:
        for layer in self.table.layers:
            yield self._amount(limit, layer, pairs[layer.name])

    def _amount(self, limit: PairLimit, layer: LayerStats, pair: Pair) -> float:
        stays = pair.bits if pair.bits in FLOAT_BITS else FLOAT_INPUT
        return float(limit.takes(layer, [pair.bits], [pair.input_bits or stays])[0, 0])

    def _pairs(self, choice: Choice) -> dict[str, Pair]:
        pairs: dict[str, Pair] = {}
        for item, option in zip(self.items, choice.tolist(), strict=True):
            b, a = divmod(option, len(self.input_bits))
            for layer in item:
                input_bits = self.input_bits[a] if self.inputs.quantized(layer) else None
                pairs[layer.name] = Pair(self.bits[b], input_bits)
        return {
            layer.name: pairs.get(layer.name) or Pair(self.inputs.weights[layer.name], None)
            for layer in self.table.layers
        }

    def _choice(self, pairs: Mapping[str, Pair]) -> Choice:
        """The options that pairs are, (items,)."""
        found = []
        for item in self.items:
            quantized = [layer for layer in item if self.inputs.quantized(layer)]
            a = pairs[quantized[0].name].input_bits if quantized else None
            found.append(
                self.bits.index(pairs[item[0].name].bits) * len(self.input_bits)
                + (0 if a is None else self.input_bits.index(a))
            )
        return np.array(found, np.int64)

    def _changes(self, choice: Choice) -> Iterator[tuple[Array, Array]]:
        """What changes from a choice cost, (changes,), and take, (limits, changes): infinite of what is not allowed."""
        plain, count = self.problem.plain, len(self.input_bits)
        for i, option in enumerate(choice.tolist()):
            others = np.arange(option % count, len(plain.costs), count)
            yield (
                plain.costs[others, i] - plain.costs[option, i],
                plain.weights[:, others, i] - plain.weights[:, [option], i],
            )
        for group in range(self.problem.groups):
            members = np.flatnonzero(self.problem.group == group)
            others = choice[members] // count * count + np.arange(count)[:, None]
            costs = plain.costs[others, members].sum(axis=1) - plain.costs[choice[members], members].sum()
            takes = plain.weights[:, others, members].sum(axis=2)
            yield costs, takes - plain.weights[:, choice[members], members].sum(axis=1)[:, None]

    def _infeasible(self, watch: Watch) -> SettingError:
        """Which limit cannot be met, and by how much; of limits that only contradict each other, how far."""
        least = self._fixed() + np.array([self._least(m) for m in range(len(self.limits))])
        beyond: dict[str, tuple[PairLimit, float]] = {}
        for limit, amount in zip(self.limits, least.tolist(), strict=True):
            if amount > max(limit.most, beyond.get(limit.name, (limit, -math.inf))[1]):
                beyond[limit.name] = (limit, amount)
        if not beyond and not watch.left:
            return SettingError(f"time_limit: no plan was found in {watch.seconds:g} seconds; allow more")
        if not beyond:
            together = " and ".join(dict.fromkeys(limit.name for limit in self.limits))
            return SettingError(f"{together} can each be met, but no plan meets all of them; {self._apart()}")
        said = [limit.missed(amount) for limit, amount in beyond.values()]
        bits, input_bits = (", ".join(map(str, widths)) for widths in (self.rules.bits, self.rules.input_bits))
        return SettingError(
            f"{first_few(said)} (candidates {bits} bits, inputs {input_bits}). Raise it, allow fewer bits, or unpin "
            "layers."
        )

    def _least(self, m: int) -> float:
        if not self.items:
            return 0.0
        return float(self.problem.plain.used(self.problem.least(m).choice)[m])

    def _apart(self) -> str:
        """The least of the last limit that is one alone, while the others hold."""
        plain, names = self.problem.plain, [limit.name for limit in self.limits]
        alone = [m for m, name in enumerate(names) if names.count(name) == 1]
        if not alone or len(names) == 1:
            return "relax one of them"
        last, limit = alone[-1], self.limits[alone[-1]]
        costs = np.where(np.isfinite(plain.costs), plain.weights[last], np.inf)
        others = Problem(costs, np.delete(plain.weights, last, axis=0), np.delete(plain.limits, last))
        solution = solve_joint(JointProblem(others, self.problem.inputs, self.problem.group), Watch())
        amount = math.inf if solution is None else limit.shown(solution.cost + float(self._fixed()[last]))
        if not limit.asked < amount < math.inf:
            return "relax one of them"
        return (
            f"with the others met, the least {limit.name} is {amount:.6g}, {amount - limit.asked:.3g} more than asked"
        )


def planned_inputs(table: LayerTable, pairs: Mapping[str, Pair]) -> dict[str, Activations]:
    """How each input is quantized that is: as the table's were measured, at its own width."""
    assert table.activations is not None, "Inputs were made of this table"
    return {
        name: replace(table.activations, bits=pair.input_bits)
        for name, pair in pairs.items()
        if pair.input_bits is not None
    }
