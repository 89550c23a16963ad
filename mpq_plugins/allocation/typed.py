"""Budget over a table of types: each layer one type, at the least predicted cost within every limit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..common.checks import as_integer, shown
from ..common.patterns import matches
from ..common.text import first_few
from ..errors import SettingError
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice
from ..plans.stats import LayerStats
from ..plans.type_table import TypeColumn, TypeTable
from ..plans.types import NamedType
from .choices import layer_choice
from .knapsack import Problem, Solution, solve
from .limits import Limit
from .objective import combined_curve
from .ties import tied_layers
from .watch import Watch

Array = NDArray[np.float64]
Given = NamedType | int
"""What a pin gives a layer: a type, or 16 or 32 bits, which leave it in float."""


@dataclass(frozen=True)
class TypedLayout:
    """The knapsack of one table of types.

    limits: for each type in the table's order, then for layers in float, the limits, in the same order; pinned: what
    layers are given; items: layers that agree on a type.
    """

    table: TypeTable
    sensitivity: str
    limits: Sequence[Sequence[Limit]]
    pinned: Mapping[str, Given]
    items: Sequence[tuple[str, ...]]

    def solved(self, watch: Watch) -> tuple[dict[str, Given], Solution, float]:
        """The type of each layer, the solution, and the cost of what is pinned. Raises SettingError."""
        pinned_cost = math.fsum(self._cost(name, given) for name, given in self.pinned.items())
        solution = solve(self._problem, watch=watch)
        if solution is None:
            raise self._infeasible(self._problem)
        given: dict[str, Given] = dict(self.pinned)
        for item, k in zip(self.items, solution.choice.tolist(), strict=True):
            given |= dict.fromkeys(item, self.table.types[k])
        return {layer.name: given[layer.name] for layer in self.table.base.layers}, solution, pinned_cost

    def choice(self, layer: LayerStats, given: Given) -> LayerChoice:
        """The layer's entry in a plan."""
        if isinstance(given, int):
            return layer_choice(layer, given, self.table.base.scheme)
        return layer_choice(layer, given.bits, given.scheme)

    def taken(self, given: Mapping[str, Given]) -> Array:
        """What a plan takes of every limit."""
        amounts = [self._takes(layer, given[layer.name]) for layer in self.table.base.layers]
        return np.array([math.fsum(column) for column in zip(*amounts, strict=True)])

    def binding(self, given: Mapping[str, Given]) -> tuple[str, ...]:
        """The limits in whose remaining room some change that would lower the cost does not fit."""
        room = np.array([limit.most for limit in self.limits[0]]) - self.taken(given)
        costs, weights = self._problem.costs, self._problem.weights
        position = {kind.name: k for k, kind in enumerate(self.table.types)}
        bound = np.zeros(len(room), bool)
        for i, item in enumerate(self.items):
            chosen = given[item[0]]
            assert isinstance(chosen, NamedType)
            k = position[chosen.name]
            better = costs[:, i] < costs[k, i]
            bound |= ((weights[:, better, i] - weights[:, [k], i]) > room[:, None]).any(axis=1)
        return tuple(limit.name for limit, tight in zip(self.limits[0], bound, strict=True) if tight)

    @cached_property
    def _problem(self) -> Problem:
        """The knapsack of what is not pinned, worked out once."""
        most = np.array([limit.most for limit in self.limits[0]])
        return Problem(self._costs(), self._weights(), most - self._fixed())

    def _fixed(self) -> Array:
        layers = {layer.name: layer for layer in self.table.base.layers}
        amounts = [self._takes(layers[name], given) for name, given in self.pinned.items()]
        return np.array([math.fsum(row[m] for row in amounts) for m in range(len(self.limits[0]))])

    def _takes(self, layer: LayerStats, given: Given) -> Array:
        """What a layer takes of every limit."""
        if isinstance(given, int):
            return np.array([limit.whole(layer, [given])[0] for limit in self.limits[-1]])
        k = [kind.name for kind in self.table.types].index(given.name)
        return np.array([limit.whole(layer, [given.bits])[0] for limit in self.limits[k]])

    def _costs(self) -> Array:
        """(types, items), infinite where a layer cannot have the type."""
        curves = {name: self._curve(name) for item in self.items for name in item}
        columns = [np.sum([curves[name] for name in item], axis=0) for item in self.items]
        for item, column in zip(self.items, columns, strict=True):
            if not np.isfinite(column).any():
                raise self._nothing_for(item)
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.table.columns), 0))

    def _weights(self) -> Array:
        """(limits, types, items); of types that a layer cannot have, whatever their costs rule out."""
        layers = {layer.name: layer for layer in self.table.base.layers}
        weights = np.zeros((len(self.limits[0]), len(self.table.columns), len(self.items)))
        for i, item in enumerate(self.items):
            for k, column in enumerate(self.table.columns):
                if all(name in column.by_name for name in item):
                    weights[:, k, i] = np.sum([self._takes(layers[name], column.type) for name in item], axis=0)
        return weights

    def _curve(self, name: str) -> Array:
        """What a layer costs as each type, (types,), infinite where it cannot have it."""
        return layer_costs(self.table, name, self.sensitivity)

    def _cost(self, name: str, given: Given) -> float:
        if isinstance(given, int):
            return 0.0
        k = [kind.name for kind in self.table.types].index(given.name)
        return float(self._curve(name)[k])

    def _nothing_for(self, item: tuple[str, ...]) -> SettingError:
        if len(item) > 1:
            each = first_few([f"{name!r} can be {', '.join(self.table.types_for(name))}" for name in item])
            return SettingError(f"tie: no type is common to layers that must agree: {each}. Measure more types")
        return SettingError(
            f"layer {item[0]!r}: its {self.sensitivity} is infinite or NaN as every type; measure again, or pin it"
        )

    def _infeasible(self, problem: Problem) -> SettingError:
        said = []
        for m, limit in enumerate(self.limits[0]):
            least = float(problem.used(problem.least(m).choice)[m] + self._fixed()[m])
            if least > limit.most:
                said.append(limit.missed(least))
        if not said:
            together = " and ".join(limit.name for limit in self.limits[0])
            return SettingError(f"{together}: no plan meets all of them; relax one")
        names = ", ".join(kind.name for kind in self.table.types)
        return SettingError(f"{first_few(said)} (types {names}). Raise it, measure smaller types, or unpin layers.")


def layer_costs(table: TypeTable, layer: str, sensitivity: str) -> Array:
    """What a layer costs as each type, (types,), infinite where it cannot have it. Raises SettingError."""
    there = [column.by_name.get(layer) for column in table.columns]
    having = [(column, stats) for column, stats in zip(table.columns, there, strict=True) if stats is not None]
    costs = np.full(len(there), np.inf)
    if not having:
        return costs
    costs[[stats is not None for stats in there]] = combined_curve(having[0][0].table, _joined(having), sensitivity)
    return costs


def _joined(having: Sequence[tuple[TypeColumn, LayerStats]]) -> LayerStats:
    """The layer with its numbers as each type where those at each width are."""
    stats = [layer for _, layer in having]
    first = stats[0]
    return replace(
        first,
        errors={metric: np.concatenate([layer.errors[metric] for layer in stats]) for metric in first.errors},
        sensitivities={
            name: np.concatenate([layer.sensitivities[name] for layer in stats])
            for name in first.sensitivities
            if all(name in layer.sensitivities for layer in stats)
        },
    )


def typed_layout(
    table: TypeTable, sensitivity: str, limits: Sequence[Sequence[Limit]], pin: Sequence[str], tie: Sequence[str]
) -> TypedLayout:
    """The knapsack of a table of types. Raises SettingError for pins and ties that mean nothing there."""
    pinned = _pinned(table, pin)
    names = [layer.name for layer in table.base.layers]
    tied = tied_layers(tie, names)
    for family in dict.fromkeys(tied.values()):
        given = {name: _word(pinned.get(name)) for name in family}
        if len(set(given.values())) > 1:
            raise SettingError(f"tie: {first_few(list(family), ', ')} must agree, but are pinned to {given}; pin alike")
    items = list(dict.fromkeys(tied.get(name, (name,)) for name in names if name not in pinned))
    return TypedLayout(table, sensitivity, limits, pinned, items)


def pinned_type(entry: str, table: TypeTable) -> tuple[str, Given]:
    """`embed=q8_0` -> a pattern and the type as the table has it, or 16 or 32 bits. Raises SettingError."""
    pattern, equals, word = entry.rpartition("=")
    if not equals or not pattern.strip():
        raise SettingError(f"pin: {shown(entry)} is not allowed; a layer's name or glob and its type, as 'embed=int8'")
    bits = as_integer(word.strip())
    if bits is None:
        return pattern.strip(), table.column(word.strip()).type
    if bits not in FLOAT_BITS:
        raise SettingError(
            f"pin: {shown(entry)} is not allowed with types; a type, as int{bits}, or 16 or 32 for float"
        )
    return pattern.strip(), bits


def _pinned(table: TypeTable, pin: Sequence[str]) -> dict[str, Given]:
    pinned: dict[str, Given] = {}
    for entry in pin:
        pattern, given = pinned_type(entry, table)
        matching = [
            layer.name for layer in table.base.layers if any(matches(pattern, n) for n in (layer.name, *layer.tied))
        ]
        if not matching:
            names = [layer.name for layer in table.base.layers]
            raise SettingError(f"pin: {pattern!r} matches no layer; names look like {first_few(names[:3], ', ')}")
        for name in matching:
            if isinstance(given, NamedType) and name not in table.column(given.name).by_name:
                raise SettingError(
                    f"pin: layer {name!r} cannot be {given.name}, for its shape; it can be "
                    f"{', '.join(table.types_for(name))}"
                )
            if pinned.setdefault(name, given) != given:
                raise SettingError(
                    f"pin: layer {name!r} is given both {_word(pinned[name])} and {_word(given)}; give one"
                )
    return pinned


def _word(given: Given | None) -> str:
    return given.name if isinstance(given, NamedType) else "nothing" if given is None else f"float{given}"
