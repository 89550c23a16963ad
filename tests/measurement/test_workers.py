"""The table is the same to the last bit whoever measures, and whoever is lost on the way."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpq_plugins import Affine, LayerTable, Minifloat, Piecewise, measure
from mpq_plugins.common import workers as workers_module
from mpq_plugins.common.workers import Call, Workers
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError, WeightError, WorkerError
from mpq_plugins.measurement import measure as run
from mpq_plugins.measurement import units
from mpq_plugins.measurement.error import UnitRequest, unit_sums
from mpq_plugins.measurement.units import cut
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.weights import chunks
from mpq_plugins.weights.find import find_weights
from tests.helpers.checkpoints import sharded
from tests.helpers.clusters import executor_of, local_cluster
from tests.helpers.nets import conv_net
from tests.helpers.tables import contents

pytestmark = pytest.mark.slow

BITS = (1, 3, 8)
METRICS = ("relative", "mse", "sqnr_db", "max_abs")
SCHEMES: list[Scheme] = [
    Affine(),
    Affine(granularity="per_channel"),
    Affine(granularity="per_group", group_size=4),
    Affine(range="mse"),
    Affine(granularity="per_channel", range="mse", symmetric=True),
    Affine(granularity="per_channel", range="mse", symmetric="full", scale_dtype="float16"),
    Affine(range="percentile", share=0.99),
    Piecewise(),
    Piecewise(granularity="per_channel"),
    Minifloat(format="nvfp4"),
]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("processes", "dask")]  # to start
SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and every dtype; the first layer is several chunks, and with one scale too large for one unit."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    state = {
        "big.weight": draw(1100, 2048).bfloat16(),
        "middle.weight": draw(301, 512),
        "moe.experts.up_proj": draw(2, 304, 512).half(),  # as wide as the hidden state on the side of the inputs
        "moe.experts.down_proj": draw(2, 304, 512).half(),  # read by columns
        "small.weight": draw(7, 16),
        "embed_tokens.weight": draw(64, 512).bfloat16(),
    }
    return sharded(tmp_path_factory.mktemp("workers") / "model", state)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with local_cluster(threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def dask(cluster: Any) -> Iterator[Executor]:
    with executor_of(cluster) as executor:
        yield executor


def table_of(source: Path | nn.Module, scheme: Scheme, executor: Executor | None, **options: Any) -> LayerTable:
    bits = (scheme.bits,) if isinstance(scheme, Minifloat) else BITS[1:] if isinstance(scheme, Piecewise) else BITS
    return measure(source, scheme, bits, METRICS, per_channel=True, executor=executor, **options)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Callable[[Scheme], object]:
    """What the threads that are the default measure of the checkpoint."""
    return cache(lambda scheme: contents(table_of(checkpoint, scheme, None)))


def test_the_checkpoint_is_many_units_and_chunks(checkpoint: Path) -> None:
    weights = tuple(find_weights(checkpoint))
    whole, by_channel = cut(weights, SCHEMES[0]), cut(weights, SCHEMES[1])
    assert [weights[position].name for position in whole.shared] == ["big"]
    assert cut(weights, SCHEMES[-1]) == whole  # which has a scale for the layer too
    assert len(chunks.chunks(weights[0])) > 1
    assert len(whole.units) > 3
    assert len(by_channel.units) > len(whole.units)
    assert {weight.channel_axis for weight in weights} == {0, 1}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["one thread", "three threads", *SLOW])
def test_every_executor_gives_the_same_table(
    checkpoint: Path, expected: Callable[[Scheme], object], scheme: Scheme, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind in ("processes", "dask"):
        found = table_of(checkpoint, scheme, request.getfixturevalue(kind))
    else:
        with ThreadPoolExecutor(1 if kind == "one thread" else 3) as pool:
            found = table_of(checkpoint, scheme, pool)
    assert contents(found) == expected(scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_files_that_must_be_waited_for_give_the_same_table(
    checkpoint: Path, expected: Callable[[Scheme], object], scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = expected(scheme)
    monkeypatch.setattr("mpq_plugins.checkpoints.readers.FileRows.at_once", lambda *_: None)
    assert contents(table_of(checkpoint, scheme, None)) == known


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("smallest", [1, 1 << 9])
def test_small_units_and_chunks_give_nearly_the_same_table(
    scheme: Scheme, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks decide in which order sums are added, so here the last bits may differ; with other units they do not.

    Fitted ranges may tip to a neighbouring candidate, so only the error they keep low is compared.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 40), nn.ConvTranspose1d(16, 12, 3), nn.Embedding(30, 16))
    whole = table_of(net, scheme, None)
    monkeypatch.setattr(chunks, "CHUNK", 96)
    monkeypatch.setattr(units, "SMALLEST", 1 << 20)
    in_chunks = table_of(net, scheme, None)
    monkeypatch.setattr(units, "SMALLEST", smallest)
    monkeypatch.setattr(units, "UNITS", 1 << 20)  # or the size would be a share of the whole
    assert contents(table_of(net, scheme, None)) == contents(in_chunks)
    for own, other in zip(in_chunks.layers, whole.layers, strict=True):
        assert own.digest == other.digest
        assert own.errors["mse"] == pytest.approx(other.errors["mse"], rel=1e-5)
    assert in_chunks.fingerprint == whole.fingerprint


def test_a_module_travels_to_processes(processes: Executor) -> None:
    net = conv_net()
    for scheme in (Affine(), Affine(granularity="per_channel")):
        assert contents(table_of(net, scheme, processes)) == contents(table_of(net, scheme, None))


def kill_once(pids: Callable[[], Iterable[int]]) -> tuple[Callable[[str, int, int], None], list[int]]:
    """A progress callback that kills the first of these processes as soon as something is finished."""
    killed: list[int] = []

    def progress(name: str, done: int, total: int) -> None:
        if 0 < done < total and not killed:
            killed.append(next(iter(pids())))
            os.kill(killed[0], signal.SIGKILL)

    return progress, killed


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Affine(range="mse"), SCHEMES[4]], ids=str)
def test_a_dask_worker_killed_in_the_middle_changes_nothing(
    checkpoint: Path, expected: Callable[[Scheme], object], scheme: Scheme, cluster: Any, dask: Executor
) -> None:
    progress, killed = kill_once(lambda: (worker.pid for worker in cluster.workers.values()))
    found = table_of(checkpoint, scheme, dask, progress=progress)
    assert killed
    assert contents(found) == expected(scheme)


@pytest.mark.slow
def test_a_process_killed_in_the_middle_leaves_the_rest_to_threads(
    checkpoint: Path, expected: Callable[[Scheme], object]
) -> None:
    scheme = Affine(range="mse")  # units, and a layer that is handed out pass by pass
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        progress, killed = kill_once(lambda: list(pool._processes))
        with pytest.warns(MeasureWarning, match=r"its processes are gone .* on \d+ threads of this process"):
            found = table_of(checkpoint, scheme, pool, progress=progress)
    assert killed
    assert contents(found) == expected(scheme)


def test_a_file_that_is_gone_is_named_by_the_worker(checkpoint: Path, tmp_path: Path, processes: Executor) -> None:
    source = sharded(tmp_path / "model", {f"{n}.weight": torch.randn(300, 512) for n in range(4)})
    shard = source / "model-00002-of-00002.safetensors"

    def progress(name: str, done: int, total: int) -> None:
        shard.unlink(missing_ok=True)

    with pytest.raises(SourceError, match=r"00002-of-00002\.safetensors: cannot be read .*under this path"):
        table_of(source, Affine(), processes, progress=progress)
    assert table_of(checkpoint, Affine(), processes).layers  # an error of the weights is not the pool's end


def test_infinite_weights_are_refused_by_the_worker_with_the_layers_name(tmp_path: Path, processes: Executor) -> None:
    good = torch.ones(4, 4, dtype=torch.bfloat16)
    bad = good.clone()
    bad[3, 2] = float("inf")
    source = sharded(tmp_path / "model", {"good.weight": good, "bad.weight": bad})
    with pytest.raises(WeightError, match=r"layer 'bad': holds NaN or infinite"):
        table_of(source, Affine(granularity="per_channel"), processes)


def fails(message: str) -> None:
    raise MemoryError(message)


def test_what_a_worker_raises_is_told_with_its_layer(processes: Executor) -> None:
    workers = Workers(processes, 1)
    with pytest.raises(WorkerError, match=r"measuring 'fc' failed on a worker \(MemoryError: no room\)"):
        list(workers.finished([Call("7", fails, ("no room",), "fc")]))


def test_an_executor_that_is_closed_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(WorkerError, match="give one that is open"):
        measure(conv_net(), executor=pool)


@pytest.mark.parametrize("executor", ["threads", 4, ThreadPoolExecutor])
def test_what_is_no_executor_is_refused(executor: Any) -> None:
    with pytest.raises(SettingError, match=r"executor: .* is no concurrent\.futures\.Executor"):
        measure(conv_net(), executor=executor)


def test_an_executor_that_was_given_stays_open(one_thread: None) -> None:
    with ThreadPoolExecutor(2) as pool:
        measure(conv_net(), executor=pool)
        assert pool.submit(int, "3").result() == 3


@pytest.mark.parametrize("scheme", [Affine(), Affine(granularity="per_channel")], ids=str)
def test_progress_goes_up_to_all_weights(checkpoint: Path, scheme: Scheme) -> None:
    seen: list[tuple[str, int, int]] = []
    table = table_of(checkpoint, scheme, None, progress=lambda *report: seen.append(report))
    total = sum(layer.numel for layer in table.layers)
    done = [report[1] for report in seen]
    assert done == sorted(done)
    assert (done[0], seen[-1]) == (0, ("", total, total))
    assert {report[2] for report in seen} == {total}
    assert {report[0] for report in seen[:-1]} <= {layer.name for layer in table.layers}


def test_ctrl_c_does_not_wait_for_the_rest(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def watched(*arguments: Any) -> Any:
        begun.append(len(begun))
        return unit_sums(*arguments)

    def interrupt(name: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "unit_sums", watched)
    scheme = Affine(granularity="per_channel", range="mse")
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        table_of(checkpoint, scheme, pool, progress=interrupt)
    assert 1 <= len(begun) < len(cut(tuple(find_weights(checkpoint)), scheme).units) // 2


def shared_and_broken(path: Path) -> Path:
    """Layers that are handed out pass by pass, and one that cannot be measured."""
    state = {f"{n}.weight": torch.randn(2048, 512) for n in range(4)}
    state["z.weight"] = torch.full((4, 4), float("nan"))
    save_file(state, path)
    return path


@pytest.mark.parametrize("given", [False, True])
def test_an_error_in_one_layer_ends_the_passes_over_others(
    tmp_path: Path, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1 << 16)
    source = shared_and_broken(tmp_path / "model.safetensors")
    assert cut(list(find_weights(source)), Affine(range="mse")).shared == (0, 1, 2, 3)
    executor = ThreadPoolExecutor(1) if given else None
    before = set(threading.enumerate())
    with pytest.raises(WeightError, match="layer 'z'"):
        measure(source, Affine(range="mse"), executor=executor)
    left = {thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()}
    assert not any(name.startswith(("mpq-shared", "mpq-measure")) for name in left)
    if executor is not None:  # it is not ours to close, and has nothing more to do
        assert executor.submit(lambda: 3).result(timeout=30) == 3
        executor.shutdown()


def test_workers_that_say_nothing_are_asked_after_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "LOOK", 0.05)
    monkeypatch.setattr(workers_module, "QUIET", 0.2)
    crew = Workers(None, 1)
    with pytest.warns(MeasureWarning, match="nothing has come back for 0 seconds; are its workers alive") as said:
        found = [result for _, result in crew.finished([Call("slow", time.sleep, (1.0,))])]
    crew.close()
    assert found == [None]
    assert len(said) == 1


def test_a_worker_with_another_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,) = find_weights(torch.nn.Linear(4, 4))
    request = UnitRequest(Affine(), (4,), ("mse",), False, "numba 0.1 on another processor")
    with pytest.raises(WorkerError, match=r"a worker measures with .*, and this process with numba 0\.1 on another"):
        unit_sums([weight], request)


@pytest.mark.slow
def test_a_device_is_looked_for_where_the_work_is_done(processes: Executor) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is such a device here")
    net = nn.Linear(4, 4)
    with pytest.raises(SettingError, match="device: 'cuda' cannot be used"):
        measure(net, device="cuda")
    with pytest.raises(WorkerError, match=r"measuring '' failed on a worker \(.*CUDA"):
        measure(net, device="cuda", executor=processes)
