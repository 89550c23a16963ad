"""Sensitivities, plans, evaluations and rounding are the same to the last bit on any executor, whoever is lost."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError, WorkerError
from tests.helpers.clusters import executor_of, local_cluster
from tests.helpers.nets import conv_net
from tests.helpers.scoring import (
    agreement,
    ends_its_process,
    ends_one_process,
    fails_below_three_bits,
    in_modes,
    inputs,
)
from tests.helpers.tables import contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # processes have to start

set_num_threads = torch.set_num_threads  # as it is: journeys replace it, for examples set it
SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
KINDS = ("threads", "processes", "dask")
Killing = tuple[Callable[[str, int, int], None], list[int]]


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture
def alone() -> Iterator[Executor]:
    """One process, so that who is asked is who has worked."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with local_cluster(threads=2) as made:
        yield made


@pytest.fixture(scope="module")
def dask(cluster: Any) -> Iterator[Executor]:
    with executor_of(cluster) as executor:
        yield executor


@pytest.fixture(scope="module")
def table() -> mpq.LayerTable:
    return mpq.measure(conv_net(), mpq.Affine(granularity="per_channel"), (2, 3, 4, 8), per_channel=True)


@pytest.fixture(scope="module")
def plans(table: mpq.LayerTable) -> dict[str, mpq.Plan]:
    return {f"{b} bits": mpq.Uniform(bits=b)(table) for b in (2, 3, 4, 8)}


@pytest.fixture(params=["threads", "processes"])
def pool(request: pytest.FixtureRequest) -> Executor:
    made: Executor = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=KINDS)
def executor(request: pytest.FixtureRequest) -> Executor:
    made: Executor = request.getfixturevalue(request.param)
    return made


@pytest.mark.parametrize(("kind", "fit_ranges"), [("kl", True), ("distance", False), ("compensated_mse", False)])
def test_sensitivities(
    table: mpq.LayerTable, executor: Executor, kind: str, fit_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq_plugins.measurement.alone.LAYERS_A_UNIT", 2)
    options: dict[str, Any] = {"fit_ranges": fit_ranges}
    here = mpq.sensitivity(conv_net(), table, kind, inputs(), **options)
    assert contents(mpq.sensitivity(conv_net(), table, kind, inputs(), executor=executor, **options)) == contents(here)


def test_plans(table: mpq.LayerTable, executor: Executor) -> None:
    here = mpq.pareto(table, (2.5, 3))
    assert mpq.pareto(table, (2.5, 3), executor=executor) == here


def test_sweeps(table: mpq.LayerTable, plans: dict[str, mpq.Plan], executor: Executor) -> None:
    asked = [*plans.values()]
    here = mpq.sweep(table, asked, conv_net(), agreement, calibrate=inputs())
    assert mpq.sweep(table, asked, conv_net(), agreement, calibrate=inputs(), executor=executor) == here
    assert len({row.scores["agreement"] for row in here}) == len(here)


def test_evaluations(plans: dict[str, mpq.Plan], executor: Executor) -> None:
    def rows(executor: Executor | None) -> list[mpq.EvaluatedPlan]:
        found = mpq.evaluate(conv_net(), plans, agreement, calibrate=inputs(), executor=executor)
        return [replace(row, seconds=0) for row in found]

    assert rows(executor) == rows(None)


def test_plans_for_a_files_bytes_come_back_with_their_steps(processes: Executor) -> None:
    coded = mpq.measure(conv_net(), mpq.EntropyCoded())
    asked = [mpq.Budget(file_bits=8)(coded)]
    options: dict[str, Any] = {"calibrate": inputs(), "files": True}
    here = mpq.sweep(coded, asked, conv_net(), agreement, **options)
    assert mpq.sweep(coded, asked, conv_net(), agreement, executor=processes, **options) == here


@pytest.mark.parametrize("scheme", [mpq.Affine(granularity="per_channel"), mpq.EntropyCoded(step=0.2)], ids=str)
def test_compensated_rounding(executor: Executor, scheme: mpq.Scheme) -> None:
    """Of convolutions with groups, transposed ones and linear layers, with BatchNorms and biases that are corrected."""
    plan = mpq.Uniform(bits=3)(mpq.measure(conv_net(), scheme, (3,)))
    here = mpq.round_weights(conv_net(), plan, inputs())
    found = mpq.round_weights(conv_net(), plan, inputs(), executor=executor)
    assert found.state_dict().keys() == here.state_dict().keys()
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert not torch.equal(here.fc.weight, conv_net().fc.weight)  # type: ignore[arg-type, union-attr]


def kill_once(pids: Callable[[], Iterable[int]]) -> Killing:
    """A progress callback that kills the first of these processes as soon as something is finished."""
    killed: list[int] = []

    def progress(name: str, done: int, total: int) -> None:
        if 0 < done < total and not killed:
            killed.append(next(iter(pids())))
            os.kill(killed[0], signal.SIGKILL)

    return progress, killed


def test_a_dask_worker_killed_in_the_middle_changes_nothing(
    table: mpq.LayerTable, plans: dict[str, mpq.Plan], cluster: Any, dask: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq_plugins.measurement.alone.LAYERS_A_UNIT", 1)
    progress, killed = kill_once(lambda: (worker.pid for worker in cluster.workers.values()))
    here = mpq.sensitivity(conv_net(), table, "kl", inputs())
    found = mpq.sensitivity(conv_net(), table, "kl", inputs(), executor=dask, progress=progress)
    assert killed
    assert contents(found) == contents(here)
    progress, killed = kill_once(lambda: (worker.pid for worker in cluster.workers.values()))
    rows = mpq.sweep(table, [*plans.values()], conv_net(), agreement, executor=dask, progress=progress)
    assert killed
    assert rows == mpq.sweep(table, [*plans.values()], conv_net(), agreement)


def test_a_process_killed_in_the_middle_changes_nothing(
    table: mpq.LayerTable, plans: dict[str, mpq.Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the evaluation itself, once: the plan is evaluated again, in a new process and not in this one."""
    (once := tmp_path / "once").touch()
    monkeypatch.setenv("MPQ_TEST_ONCE", str(once))
    here = mpq.sweep(table, [*plans.values()], conv_net(), agreement)
    with (
        ProcessPoolExecutor(2, mp_context=SPAWN) as pool,
        pytest.warns(MeasureWarning, match="its processes are gone .* evaluating what is left in one new process"),
    ):
        assert mpq.sweep(table, [*plans.values()], conv_net(), ends_one_process, executor=pool) == here
    assert not once.exists()


def test_a_plan_that_ends_every_process_is_named(plans: dict[str, mpq.Plan]) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=SPAWN) as pool,
        pytest.warns(MeasureWarning, match="its processes are gone"),
        pytest.raises(WorkerError, match=r"evaluating 'float' ended its process \(killed, out of memory\?\)") as said,
    ):
        mpq.evaluate(conv_net(), plans, ends_its_process, executor=pool)
    assert "\n" not in str(said.value)


class Losing(Executor):
    """As dask's is where a unit has ended one worker after another."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        distributed = pytest.importorskip("distributed")
        future: Future[Any] = Future()
        future.set_exception(distributed.KilledWorker("elsewhere-1", None, 4))
        return future


def test_a_plan_that_ends_every_worker_of_a_cluster_is_named(plans: dict[str, mpq.Plan]) -> None:
    with pytest.raises(WorkerError, match=r"evaluating 'float' failed on a worker \(KilledWorker") as said:
        mpq.evaluate(conv_net(), plans, agreement, executor=Losing())
    assert "\n" not in str(said.value)


def test_an_evaluation_that_fails_is_named_with_its_plan(
    table: mpq.LayerTable, plans: dict[str, mpq.Plan], pool: Executor
) -> None:
    with pytest.raises(
        SourceError, match=r"fails_below_three_bits of uniform \{'bits': 2\}: .*too coarse for me"
    ) as said:
        mpq.sweep(table, [*plans.values()], conv_net(), fails_below_three_bits, executor=pool)
    assert "\n" not in str(said.value)
    with pytest.raises(SourceError, match=r"fails_below_three_bits of 2 bits, nearest: .*too coarse for me"):
        mpq.evaluate(conv_net(), plans, fails_below_three_bits, executor=pool)


def test_an_interrupted_sweep_goes_on_with_workers_and_without(
    table: mpq.LayerTable, plans: dict[str, mpq.Plan], tmp_path: Path, pool: Executor
) -> None:
    asked, seen = [*plans.values()], list[int]()
    here = mpq.sweep(table, asked, conv_net(), agreement)

    def interrupt(name: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    for first, then in ((pool, None), (None, pool)):
        with mpq.Store(tmp_path / "sweep.store") as store:
            with pytest.raises(KeyboardInterrupt):
                mpq.sweep(table, asked, conv_net(), agreement, executor=first, store=store, progress=interrupt)
            assert 3 <= len(store) <= len(here)
            assert mpq.sweep(table, asked, conv_net(), agreement, executor=then, store=store) == here


def test_an_interrupted_sensitivity_goes_on(
    table: mpq.LayerTable, tmp_path: Path, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq_plugins.measurement.alone.LAYERS_A_UNIT", 1)
    here = mpq.sensitivity(conv_net(), table, "kl", inputs())
    dones: list[int] = []

    def interrupt(name: str, done: int, total: int) -> None:
        dones.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with mpq.Store(tmp_path / "kl.store") as store:
        with pytest.raises(KeyboardInterrupt):
            mpq.sensitivity(conv_net(), table, "kl", inputs(), executor=threads, store=store, progress=interrupt)
        kept = len(store)
        assert kept == 5
        found = mpq.sensitivity(conv_net(), table, "kl", inputs(), executor=threads, store=store)
        assert contents(found) == contents(here)
        assert len(store) == len(table.layers) * len(inputs())


def test_what_cannot_be_sent_is_named(table: mpq.LayerTable, plans: dict[str, mpq.Plan], processes: Executor) -> None:
    with pytest.raises(WorkerError, match=r"the evaluation cannot be pickled .*lambda.* ThreadPoolExecutor") as said:
        mpq.evaluate(conv_net(), plans, lambda model: 1.0, executor=processes)
    assert "\n" not in str(said.value)
    model = conv_net()
    model.kept = lambda: 3  # type: ignore[assignment]
    with pytest.raises(WorkerError, match=r"the model cannot be pickled"):
        mpq.sensitivity(model, table, "kl", inputs(), executor=processes)
    with pytest.raises(WorkerError, match=r"the output function cannot be pickled"):
        mpq.sensitivity(conv_net(), table, "kl", inputs(), output=lambda net, x: net(x), executor=processes)


def test_dask_is_sent_a_function_without_a_name(plans: dict[str, mpq.Plan], dask: Executor) -> None:
    (row, *_) = mpq.evaluate(conv_net(), plans, lambda model: 2.5, executor=dask)
    assert row.scores == {"score": 2.5}


def test_a_module_that_workers_do_not_have_is_named(
    plans: dict[str, mpq.Plan], tmp_path: Path, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.submit(int).result()  # which have started without this folder
    (tmp_path / "only_here.py").write_text("def score(model):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    with pytest.raises(WorkerError, match=r"a worker cannot load the evaluation \(ModuleNotFoundError: .*only_here"):
        mpq.evaluate(conv_net(), plans, only_here.score, executor=processes)
    sys.modules.pop("only_here")


def test_an_executor_that_is_shut_down_or_none(table: mpq.LayerTable, plans: dict[str, mpq.Plan]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    calls: list[Callable[[Any], object]] = [
        lambda given: mpq.sensitivity(conv_net(), table, "kl", inputs(), executor=given),
        lambda given: mpq.sensitivity(conv_net(), table, "compensated_mse", inputs(), executor=given),
        lambda given: mpq.sweep(table, [*plans.values()], conv_net(), agreement, executor=given),
        lambda given: mpq.evaluate(conv_net(), plans, agreement, executor=given),
        lambda given: mpq.pareto(table, (3,), executor=given),
    ]
    for call in calls:
        with pytest.raises(WorkerError, match=r"takes no work .* give one that is open"):
            call(pool)
        with pytest.raises(SettingError, match=r"executor: int is no concurrent\.futures\.Executor"):
            call(2)


class Drawing(nn.Module):
    """Adds noise as it runs, to batches of so many samples."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.net, self.least = conv_net(), least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x + 0.1 * torch.rand(x.shape) if len(x) >= self.least else x)
        return out


@pytest.mark.parametrize("least", [1, 20], ids=["on every batch", "on the last batch"])
def test_a_model_that_draws_random_numbers_draws_the_same_everywhere(pool: Executor, least: int) -> None:
    net = Drawing(least).eval()
    table = mpq.measure(net, bits=(2, 4), fold_bn=False)
    here = mpq.sensitivity(net, table, "kl", inputs())
    assert contents(mpq.sensitivity(net, table, "kl", inputs(), executor=pool)) == contents(here)
    assert contents(mpq.sensitivity(net, table, "kl", inputs(), seed=1)) != contents(here)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_units_compute_in_the_callers_modes(
    plans: dict[str, mpq.Plan], kind: str, request: pytest.FixtureRequest
) -> None:
    """What of torch is a thread's own, or a process's: autocast, gradients, the default dtype."""
    executor: Executor = request.getfixturevalue(kind)
    given = {name: plans[name] for name in ("2 bits", "4 bits")}
    model, before = conv_net(), torch.get_default_dtype()

    def scores(executor: Executor | None) -> list[Any]:
        return [row.scores for row in mpq.evaluate(model, given, in_modes, executor=executor)]

    plain = scores(None)
    assert scores(executor) == plain
    with torch.autocast("cpu", torch.bfloat16):
        rough = scores(None)
        assert scores(executor) == rough
    with torch.no_grad():
        bare = scores(None)
        assert scores(executor) == bare
    with torch.inference_mode():
        assert scores(executor) == scores(None)
    try:
        torch.set_default_dtype(torch.float64)
        wide = scores(None)
        assert scores(executor) == wide
    finally:
        torch.set_default_dtype(before)
    assert rough[0] != plain[0]
    assert [row["gradients"] for row in (plain[0], bare[0])] == [1, 0]
    assert wide[0]["digits"] > plain[0]["digits"]
    assert scores(executor) == plain


def test_units_compute_with_the_callers_threads(table: mpq.LayerTable, alone: Executor) -> None:
    before = torch.get_num_threads()
    wanted = 3 - before
    set_num_threads(wanted)
    try:
        mpq.sensitivity(conv_net(), table, "kl", inputs(1), executor=alone)
        count = alone.submit(torch.get_num_threads).result()
    finally:
        set_num_threads(before)
    assert count == wanted


class Warns(nn.Module):
    """A layer of its own kind beside a usual one: it is rounded to nearest, which is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dead = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]


def flat(model: nn.Module) -> float:
    return 1.0


def test_what_a_unit_warns_of_is_heard_here(pool: Executor) -> None:
    torch.manual_seed(0)
    net = Warns().eval()
    plan = mpq.Uniform(bits=4)(mpq.measure(net))
    with pytest.warns(mpq.RoundingWarning, match="'dead' .*no batch reaches it"):
        mpq.evaluate(net, {"four": plan}, flat, calibrate=inputs(1), executor=pool)


def slow(model: nn.Module) -> float:
    time.sleep(0.2)
    return 1.0


def test_plans_are_evaluated_side_by_side(plans: dict[str, mpq.Plan], threads: Executor) -> None:
    began = time.perf_counter()
    mpq.evaluate(conv_net(), plans, slow)
    alone = time.perf_counter() - began
    began = time.perf_counter()
    mpq.evaluate(conv_net(), plans, slow, executor=threads)
    assert time.perf_counter() - began < 0.75 * alone
