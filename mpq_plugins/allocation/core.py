"""What the dual leaves open, as an integer program that HiGHS decides with every limit kept to the bit."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dual import Choice, Floats
from .highs import Matrix, Program, optimum
from .watch import Watch

Taken = NDArray[np.bool_]

EXACT_ATTEMPTS = 20  # choices over a limit by less than HiGHS sees that are refused one by one
ROOM = 1e-7  # of the largest weight, beyond a limit: HiGHS's presolve loses choices that meet it to the bit
OBJECTIVE_SCALE = 1e6  # HiGHS stops at an absolute gap of 1e-6


@dataclass(frozen=True)
class Core:
    """The program of what is open, the rest fixed: each variable is taken or not.

    costs: (variables,), beyond `paid` for what is fixed; takes: (limits, variables), of what is `left`, (limits,), in
    whole multiples of `units`, (limits,), where there are such; rows: what each variable counts in equations,
    (equations, variables), whose right sides are `equal`.
    """

    costs: Floats
    takes: Floats
    left: Floats
    units: Floats
    paid: float
    rows: Matrix
    equal: Floats

    def program(self, unit: float, refused: Floats, tight: float) -> Program:
        """With costs times `unit` and this much less room; refused: (choices, variables), not to be taken together."""
        takes = self.takes / self.units[:, None]
        limits = Matrix.of(np.concatenate([takes, refused]), below=self.equal.size)
        free = np.full(len(takes) + len(refused), -np.inf)
        return Program(
            costs=self.costs * unit,
            matrix=Matrix.together([self.rows, limits]),
            at_least=np.concatenate([self.equal, free]),
            at_most=np.concatenate([self.equal, self.left / self.units - tight, refused.sum(axis=1) - 1.0]),
            lowest=np.zeros(self.costs.size),
            highest=np.ones(self.costs.size),
            whole=True,
        )


def decided(
    core: Core, choice_of: Callable[[Taken], Choice], within: Callable[[Choice], bool], nodes: int, watch: Watch
) -> tuple[Choice, float] | None:
    """HiGHS's best choice within the limits, and a bound on the cost of all; None where it finds none.

    choice_of: the whole problem's choice from the variables that are taken.
    """
    unit = OBJECTIVE_SCALE / max(float(np.abs(core.costs).max()), 1e-300)
    refused = np.zeros((0, core.costs.size))
    below, tight = -math.inf, -ROOM
    for attempt in range(2 * EXACT_ATTEMPTS):  # HiGHS keeps a limit to a tolerance; ours is kept to the bit
        best = optimum(core.program(unit, refused, tight), nodes, watch)
        if best is None:
            return None
        # Refusing a choice that is over a limit keeps the bound true; taking room away does not.
        if attempt < EXACT_ATTEMPTS:
            below = max(below, best.bound / unit + core.paid)
        taken = best.values > 0.5
        choice = choice_of(taken)
        if within(choice):
            return choice, below
        refused = np.vstack([refused, taken.astype(np.float64)])
        if attempt >= EXACT_ATTEMPTS - 1:
            tight += 1e-6
    return None


def shared_unit(weights: Floats) -> float:
    """What every entry is a whole multiple of, so that HiGHS adds small integers; the largest where there is none."""
    if (np.abs(weights) < 2.0**62).all():  # what is larger, or infinite, is no integer that numpy has
        whole = weights.astype(np.int64)
        if (whole == weights).all():
            return float(np.gcd.reduce(whole, axis=None)) or 1.0
    return float(weights.max()) or 1.0
