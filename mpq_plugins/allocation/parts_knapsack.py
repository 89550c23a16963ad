"""The knapsack whose groups of items pay for the options they use: channels of a layer, and the map of its parts.

    minimise  sum_i costs[k_i, i]
    subject to  sum_i weights[m, k_i, i] + sum_g maps[m, g] ceil(log2 n_g) <= limits[m]  for every m

with n_g the number of options that the items of group g use. At given prices the Lagrangian falls apart into groups,
and in a group the best choice is, for one of its sets of 1, 2, 4 or 8 options, the best of the set for each item. So
the dual's bound counts maps as a plan does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .dual import Choice, Cut, Floats
from .knapsack import Problem

Flags = NDArray[np.bool_]

BLOCK = 1 << 16  # items whose values are held for every set at once


@cache
def option_sets(options: int) -> Flags:
    """Which options are in each set, (sets, options): of 1, 2, 4, ... or of all; smaller sets first."""
    sizes = [min(2**power, options) for power in range(index_bits(options) + 1)]
    chosen = [list(members) for size in sizes for members in combinations(range(options), size)]
    flags = np.zeros((len(chosen), options), np.bool_)
    for row, members in zip(flags, chosen, strict=True):
        row[members] = True
    return flags


def index_bits(options: int) -> int:
    """Bits that tell so many options apart."""
    return (options - 1).bit_length()


def bits_of(used: Flags) -> Choice:
    """Bits that tell apart the options of each row, (rows, options)."""
    return np.array([index_bits(int(count)) for count in used.sum(axis=1)])


@dataclass(frozen=True)
class PartsProblem:
    """The plain knapsack, and what maps add to it.

    starts: (groups,), the first item of each group; maps: (limits, groups), what a bit of the index takes for all items
    of a group, 0 where there is no map.
    """

    plain: Problem
    starts: Choice
    maps: Floats

    @property
    def limits(self) -> Floats:
        """The most of everything that is limited, (limits,)."""
        return self.plain.limits

    @cached_property
    def group(self) -> Choice:
        """The group of each item, (items,)."""
        return np.repeat(np.arange(self.starts.size), np.diff(self.starts, append=self.plain.costs.shape[1]))

    def items(self, group: int) -> slice:
        """The items of a group."""
        return slice(self.starts[group], self.starts[group + 1] if group + 1 < self.starts.size else None)

    def used_options(self, choice: Choice) -> Flags:
        """Which options each group uses, (groups, options)."""
        used = np.zeros((self.starts.size, len(self.plain.costs)), np.bool_)
        used[self.group, choice] = True
        return used

    def used(self, choice: Choice) -> Floats:
        """What a choice takes of each limit, maps included, (limits,)."""
        return self.plain.used(choice) + self._map_sizes(self.used_options(choice))

    def changes(self, choice: Choice) -> Floats:
        """What each option of an item would take more than the one chosen, maps included; (limits, options, items)."""
        columns = np.arange(choice.size)
        takes = self.plain.weights - self.plain.weights[:, choice, columns][:, None]
        counts = np.zeros((self.starts.size, len(self.plain.costs)), np.int64)
        np.add.at(counts, (self.group, choice), 1)
        before = (counts > 0).sum(axis=1)[self.group]
        after = before - (counts[self.group, choice] == 1) + (counts[self.group].T == 0)
        bits = np.array([index_bits(max(1, count)) for count in range(len(counts[0]) + 2)])
        return np.asarray(takes + self.maps[:, None, self.group] * (bits[after] - bits[before]))

    def within(self, choice: Choice) -> bool:
        """Whether it stays within every limit."""
        return bool((self.used(choice) <= self.limits).all())

    def minimiser(self, prices: Floats) -> Cut:
        """The choice of the least Lagrangian; of equal ones the one that takes least."""
        return self._cheapest(self.values(prices), prices)

    def least(self, limit: int) -> Cut:
        """The choice that takes least of one limit, whatever it costs."""
        allowed = np.where(np.isfinite(self.plain.costs), self.plain.weights[limit], np.inf)
        return self._cheapest(allowed, np.eye(len(self.limits))[limit])

    def values(self, prices: Floats) -> Floats:
        """What each option costs at these prices, without a map, (options, items)."""
        return np.asarray(self.plain.costs + np.tensordot(prices, self.plain.weights, 1))

    def by_set(self, values: Floats, prices: Floats) -> Floats:
        """The least that each set of options can cost a group, its map paid at these prices, (sets, groups).

        Infinite for a set of more options than the group has items, where a smaller one does as well.
        """
        bits = bits_of(option_sets(len(values)))[:, None]
        most = np.array([index_bits(int(size)) for size in np.bincount(self.group)])
        return np.where(bits <= most, _least_sums(values, self.starts) + bits * (prices @ self.maps), np.inf)

    def within_sets(self, allowed: Flags) -> Problem:
        """The plain knapsack with these options alone, (groups, options), and room set aside for the maps of all."""
        costs = np.where(allowed[self.group].T, self.plain.costs, np.inf)
        return Problem(costs, self.plain.weights, self.limits - self._map_sizes(allowed))

    def _map_sizes(self, used: Flags) -> Floats:
        return np.array([math.fsum(sizes) for sizes in self.maps * bits_of(used)])

    def _cheapest(self, values: Floats, prices: Floats) -> Cut:
        allowed = option_sets(len(values))[self.by_set(values, prices).argmin(axis=0)]
        choice = np.where(allowed[self.group].T, values, np.inf).argmin(axis=0)
        return Cut(choice, self.plain.cost(choice), self.used(choice) - self.limits)


def _least_sums(values: Floats, starts: Choice) -> Floats:
    """(sets, groups): each item the least of the set, summed over the group."""
    ends = np.append(starts[1:], values.shape[1])
    blocks = [
        _block_sums(values[:, starts[first] : ends[last - 1]], starts[first:last] - starts[first])
        for first, last in _blocks(starts, ends)
    ]
    sums: Floats = np.concatenate(blocks, axis=1)
    return sums


def _blocks(starts: Choice, ends: Choice) -> Iterator[tuple[int, int]]:
    """Groups first:last of BLOCK items at most, or one that has more."""
    first = 0
    while first < starts.size:
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BLOCK, "right")))
        yield first, last
        first = last


def _block_sums(values: Floats, starts: Choice) -> Floats:
    @cache
    def lowest(chosen: tuple[int, ...]) -> Floats:
        if len(chosen) == 1:
            single: Floats = values[chosen[0]]
            return single
        half = len(chosen) // 2
        return np.minimum(lowest(chosen[:half]), lowest(chosen[half:]))

    sets = option_sets(len(values))
    return np.stack([np.add.reduceat(lowest(tuple(np.flatnonzero(row).tolist())), starts) for row in sets])
