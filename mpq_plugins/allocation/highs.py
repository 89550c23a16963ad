"""HiGHS, which solves linear programs and integer ones: silently, and so that Ctrl-C ends it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .watch import Watch

if TYPE_CHECKING:  # a plan that needs no program should not wait for it
    from highspy import Highs

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ASKED = 0.5  # seconds after which it is asked how far it is
GRACE = 0.3  # seconds in which it may end by itself what was interrupted


@dataclass(frozen=True)
class Matrix:
    """A sparse matrix by its entries: (row, column) holds the value."""

    row: Integers
    column: Integers
    value: Floats

    @classmethod
    def of(cls, dense: Floats, below: int = 0) -> "Matrix":
        """The entries of a dense matrix that are not 0, as rows from `below` on."""
        row, column = np.nonzero(dense)
        return cls(row + below, column, dense[row, column])

    @classmethod
    def together(cls, matrices: Sequence["Matrix"]) -> "Matrix":
        """The entries of all."""
        return cls(
            np.concatenate([each.row for each in matrices]),
            np.concatenate([each.column for each in matrices]),
            np.concatenate([each.value for each in matrices]),
        )


@dataclass(frozen=True)
class Program:
    """minimise  costs . x   subject to   at_least <= matrix x <= at_most   and   lowest <= x <= highest.

    costs, lowest, highest: (variables,); at_least, at_most: (rows,); any of the bounds may be infinite. whole: whether
    every x is an integer.
    """

    costs: Floats
    matrix: Matrix
    at_least: Floats
    at_most: Floats
    lowest: Floats
    highest: Floats
    whole: bool = False


@dataclass(frozen=True)
class Optimum:
    """values: x, (variables,); cost: costs . x; bound: no x costs less."""

    values: Floats
    cost: float
    bound: float


def optimum(program: Program, nodes: int | None = None, watch: Watch | None = None) -> Optimum | None:
    """The best x, or None where none was found.

    nodes: of the search tree of an integer program, after which the best so far is taken; as it is when the watch has
    no time left.
    """
    from highspy import HighsModelStatus, HighsStatus, kHighsInf

    watch = watch or Watch()
    highs = _loaded(program, nodes)
    if highs is None:
        return None
    if watch.left < math.inf:
        highs.setOptionValue("time_limit", watch.left)
    status = _run(highs, nodes, watch)
    early = (HighsModelStatus.kSolutionLimit, HighsModelStatus.kTimeLimit)
    stopped_early = program.whole and highs.getModelStatus() in early
    info = highs.getInfo()
    if status == HighsStatus.kError or not (stopped_early or highs.getModelStatus() == HighsModelStatus.kOptimal):
        return None
    if stopped_early and info.objective_function_value == kHighsInf:
        return None
    cost = float(info.objective_function_value)
    values = np.array(highs.getSolution().col_value, np.float64)
    return Optimum(values, cost, float(info.mip_dual_bound) if program.whole else cost)


def _silent() -> "Highs":
    """HiGHS, which prints its name already where its constructor enables callbacks."""
    from highspy import Highs

    class Silent(Highs):  # type: ignore[misc]  # this release of HiGHS has no types
        def enableCallbacks(self) -> None:  # noqa: N802  # as HiGHS has it
            self.silent()
            super().enableCallbacks()

    return Silent()


def _loaded(program: Program, nodes: int | None) -> "Highs | None":
    """HiGHS with the program in it; None where it refuses the numbers, as infinite ones in the matrix."""
    import highspy

    highs = _silent()
    highs.setOptionValue("mip_rel_gap", 0.0)
    if nodes is not None:
        highs.setOptionValue("mip_max_nodes", nodes)
    order = np.lexsort((program.matrix.row, program.matrix.column))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = program.costs.size, program.at_most.size
    lp.col_cost_ = program.costs
    lp.col_lower_, lp.col_upper_ = program.lowest, program.highest
    lp.row_lower_, lp.row_upper_ = program.at_least, program.at_most
    lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = program.costs.size, program.at_most.size
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.searchsorted(program.matrix.column[order], np.arange(program.costs.size + 1))
    lp.a_matrix_.index_ = program.matrix.row[order]
    lp.a_matrix_.value_ = program.matrix.value[order]
    if program.whole:
        lp.integrality_ = [highspy.HighsVarType.kInteger] * program.costs.size
    return None if highs.passModel(lp) == highspy.HighsStatus.kError else highs


def _run(highs: "Highs", nodes: int | None, watch: Watch) -> object:
    """Solve, in a thread of its own: what is raised here meanwhile, as by Ctrl-C, ends the search and goes on.

    HiGHS looks up from a large program only after minutes; then its thread is left alone, to end when it does or with
    the process.
    """
    highs.HandleUserInterrupt = True
    solving = _Solving(highs)
    highs.cbMipInterrupt += solving.seen
    solving.start()
    try:
        while not solving.done.wait(ASKED):
            watch.tell("search", solving.nodes, nodes or 0)
    except BaseException:
        highs.cancelSolve()
        solving.done.wait(GRACE)
        raise
    return solving.status


class _Solving(Thread):
    """Runs HiGHS; nodes: of its search tree so far; status: what it returns."""

    def __init__(self, highs: "Highs") -> None:
        super().__init__(name="HiGHS", daemon=True)
        self.highs, self.nodes = highs, 0
        self.status: object = None
        self.done = Event()  # join() takes a thread for ended once it was interrupted

    def run(self) -> None:
        try:
            self.status = self.highs.run()
        finally:
            self.done.set()

    def seen(self, event: Any) -> None:
        self.nodes = int(event.data_out.mip_node_count)
