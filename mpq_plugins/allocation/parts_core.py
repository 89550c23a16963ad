"""The integer program of a knapsack with maps: which set of options each group has, and which of them each item.

A variable for each open set of a group, one of which is taken, and for each option of an item that is open in the set,
one of which is taken where the set is. Its linear relaxation bounds as the dual does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .core import Core, Taken, shared_unit
from .dual import Choice, Floats
from .highs import Matrix
from .parts_knapsack import Flags, PartsProblem, bits_of, index_bits


@dataclass(frozen=True)
class OpenSet:
    """A set that a group may have: its options, ascending, and which of them are open, (options, items of the group),
    one or more for each item."""

    group: int
    options: Choice
    open: Flags

    @property
    def decided(self) -> bool:
        """Whether each item has one option."""
        return bool((self.open.sum(axis=0) == 1).all())


@dataclass(frozen=True)
class _Variables:
    """Of one open set: the set itself, with the items that have one option in it, and the options of the others.

    items, option: (items that are decided,); other, other_option: (variables after the first,), by item; row: the
    equation of each of those, from 0.
    """

    source: OpenSet
    items: Choice
    option: Choice
    other: Choice
    other_option: Choice
    row: Choice

    @classmethod
    def of(cls, problem: PartsProblem, source: OpenSet) -> "_Variables":
        every = np.arange(source.open.shape[1]) + problem.starts[source.group]
        single = source.open.sum(axis=0) == 1
        row, option = np.nonzero(source.open[:, ~single].T)
        return cls(
            source=source,
            items=every[single],
            option=source.options[source.open.argmax(axis=0)[single]],
            other=every[~single][row],
            other_option=source.options[option],
            row=row,
        )

    @property
    def size(self) -> int:
        return 1 + self.other.size

    def costs(self, problem: PartsProblem) -> Floats:
        plain = problem.plain
        return np.array([math.fsum(plain.costs[self.option, self.items]), *plain.costs[self.other_option, self.other]])

    def takes(self, problem: PartsProblem) -> Floats:
        """(limits, variables)."""
        weights = problem.plain.weights
        maps = problem.maps[:, self.source.group] * index_bits(self.source.options.size)
        own = [math.fsum((*row, paid)) for row, paid in zip(weights[:, self.option, self.items], maps, strict=True)]
        return np.concatenate([np.array(own)[:, None], weights[:, self.other_option, self.other]], axis=1)

    def rows(self, equation: int, first: int, below: int) -> Matrix:
        """That one set of the group is taken, and with it one option of each item that is not decided."""
        others = first + 1 + np.arange(self.other.size)
        count = int(self.row[-1]) + 1 if self.row.size else 0
        return Matrix(
            np.concatenate([[equation], below + np.arange(count), below + self.row]).astype(np.int64),
            np.concatenate([np.full(1 + count, first), others]).astype(np.int64),
            np.concatenate([[1.0], np.full(count, -1.0), np.ones(others.size)]),
        )


def parts_core(problem: PartsProblem, sets: Sequence[OpenSet], fixed: Choice) -> tuple[Core, Callable[[Taken], Choice]]:
    """The program of these open sets, one or more for each group that is not fixed, and how its answer is read."""
    blocks = [_Variables.of(problem, each) for each in sets]
    groups = sorted({each.group for each in sets})
    equations = {group: row for row, group in enumerate(groups)}
    free = np.isin(problem.group, groups)
    rows, first, below = [], 0, len(groups)
    for block in blocks:
        rows.append(block.rows(equations[block.source.group], first, below))
        first += block.size
        below += int(block.row[-1]) + 1 if block.row.size else 0
    core = Core(
        costs=np.concatenate([block.costs(problem) for block in blocks]),
        takes=np.concatenate([block.takes(problem) for block in blocks], axis=1),
        left=problem.limits - _spent(problem, fixed, free),
        units=np.array(
            [
                shared_unit(np.append(weights, maps))
                for weights, maps in zip(problem.plain.weights, problem.maps, strict=True)
            ]
        ),
        paid=math.fsum(problem.plain.costs[fixed[~free], np.flatnonzero(~free)]),
        rows=Matrix.together(rows),
        equal=np.append(np.ones(len(groups)), np.zeros(below - len(groups))),
    )

    def choice_of(taken: Taken) -> Choice:
        choice, start = fixed.copy(), 0
        for block in blocks:
            own = taken[start : start + block.size]
            start += block.size
            if own[0]:
                choice[block.items] = block.option
                choice[block.other[own[1:]]] = block.other_option[own[1:]]
        return choice

    return core, choice_of


def _spent(problem: PartsProblem, fixed: Choice, free: Flags) -> Floats:
    """What the groups that are fixed take, maps included."""
    others = np.flatnonzero(~free)
    bits = bits_of(problem.used_options(fixed))
    bits[np.unique(problem.group[free])] = 0
    return np.array(
        [
            math.fsum((*weights[fixed[others], others], *maps))
            for weights, maps in zip(problem.plain.weights, problem.maps * bits, strict=True)
        ]
    )
