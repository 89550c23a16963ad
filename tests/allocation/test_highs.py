"""Programs as HiGHS solves them: against what is known, silent, and ended by Ctrl-C."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mpq_plugins.allocation.highs import Matrix, Program, optimum
from mpq_plugins.allocation.watch import Watch


def knapsack(costs: list[float], takes: list[list[float]], most: list[float], whole: bool = True) -> Program:
    """x between 0 and 1, each row of `takes` at most so much."""
    count = len(costs)
    return Program(
        costs=np.array(costs), matrix=Matrix.of(np.array(takes)), at_least=np.full(len(most), -np.inf),
        at_most=np.array(most), lowest=np.zeros(count), highest=np.ones(count), whole=whole,
    )  # fmt: skip


def market_split(rows: int = 5, seed: int = 0) -> Program:
    """Equations that hardly any 0/1 vector solves, for which a search tree takes hours (Cornuejols and Dawande)."""
    generator = np.random.default_rng(seed)
    takes = generator.integers(0, 100, (rows, 10 * (rows - 1))).astype(np.float64)
    half = np.floor(takes.sum(axis=1) / 2)
    count = takes.shape[1]
    return Program(
        costs=np.ones(count), matrix=Matrix.of(takes), at_least=half, at_most=half, lowest=np.zeros(count),
        highest=np.ones(count), whole=True,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_an_integer_program_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs, takes = -generator.uniform(0, 10, 7), generator.integers(1, 9, (2, 7)).astype(np.float64)
    most = np.array([17.0, 19.0])
    vectors = np.array(list(itertools.product((0, 1), repeat=7)))
    allowed = vectors[(vectors @ takes.T <= most).all(axis=1)]
    found = optimum(knapsack(costs.tolist(), takes.tolist(), most.tolist()))
    assert found is not None
    assert found.cost == pytest.approx((allowed @ costs).min(), rel=1e-9)
    assert found.values @ costs == pytest.approx(found.cost)
    assert found.bound == pytest.approx(found.cost)


def test_a_linear_program_fills_the_room_in_order_of_worth() -> None:
    found = optimum(knapsack([-3.0, -2.0, -1.0], [[1.0, 1.0, 1.0]], [1.5], whole=False))
    assert found is not None
    assert found.values == pytest.approx([1.0, 0.5, 0.0])
    assert found.cost == found.bound == pytest.approx(-4.0)


def test_what_no_vector_meets_has_no_optimum() -> None:
    assert optimum(knapsack([1.0], [[-1.0]], [-2.0])) is None
    assert optimum(knapsack([1.0], [[-1.0]], [-2.0], whole=False)) is None


def test_what_is_infinite_has_no_optimum() -> None:
    assert optimum(knapsack([1.0, 1.0], [[np.inf, 1.0]], [1.0])) is None


def test_a_search_that_ends_early_without_a_vector_has_no_optimum() -> None:
    assert optimum(market_split(), nodes=1) is None


def test_entries_of_a_matrix_are_those_that_are_not_0() -> None:
    matrix = Matrix.of(np.array([[0.0, 2.0], [3.0, 0.0]]), below=4)
    assert (matrix.row.tolist(), matrix.column.tolist(), matrix.value.tolist()) == ([4, 5], [1, 0], [2.0, 3.0])
    both = Matrix.together([matrix, Matrix.of(np.array([[1.0]]))])
    assert (both.row.tolist(), both.column.tolist(), both.value.tolist()) == ([4, 5, 0], [1, 0, 0], [2.0, 3.0, 1.0])


def test_ctrl_c_ends_a_search(capfd: pytest.CaptureFixture[str]) -> None:
    threads = threading.active_count()
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        optimum(market_split())
    assert time.monotonic() - start < 30
    timer.join()
    while threading.active_count() > threads:  # nothing is left searching
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


LARGE = """
import os, signal, threading, time
import numpy as np
from mpq_plugins.allocation.highs import Matrix, Program, optimum

options, items, generator = 8, 20_000, np.random.default_rng(0)
count = options * items
takes = Matrix.of(generator.integers(0, 1000, (3, count)).astype(np.float64), below=items)
one_each = Matrix(np.tile(np.arange(items), options), np.arange(count), np.ones(count))
program = Program(
    costs=generator.uniform(0, 10, count), matrix=Matrix.together([one_each, takes]),
    at_least=np.array([1.0] * items + [-np.inf] * 3), at_most=np.array([1.0] * items + [300.0 * items] * 3),
    lowest=np.zeros(count), highest=np.ones(count), whole=True,
)
sent = []

def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

timer = threading.Timer(2.0, interrupt)
timer.daemon = True
timer.start()
try:
    optimum(program)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_search_that_does_not_look_up() -> None:
    """HiGHS is in the linear relaxation of 160,000 variables for many seconds without asking whether to go on."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 1.0
    assert done.stderr == ""
    assert time.monotonic() - start < 30


def test_without_time_a_search_gives_what_it_has() -> None:
    start = time.monotonic()
    assert optimum(market_split(), watch=Watch(1.0)) is None
    assert time.monotonic() - start < 20


def test_a_long_search_says_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    optimum(market_split(), 10**9, Watch(2.5, lambda *each: told.append(each)))
    assert told
    assert all(what == "search" and most == 10**9 for what, _, most in told)
    done = [each[1] for each in told]
    assert done == sorted(done)
    assert done[-1] > 0


def test_a_short_search_says_nothing() -> None:
    def told(*each: object) -> None:
        pytest.fail(f"told {each} within a second")

    optimum(knapsack([-3.0, -2.0, -1.0], [[1.0, 1.0, 1.0]], [1.5]), watch=Watch(progress=told))
