"""Who measures, as the command line asks for it."""

import json
import runpy
import socket
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import Store, measure
from mpq_plugins.cli import workers as cli_workers
from tests.conftest import Ran

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file({f"layer{n}.weight": torch.randn(8, 8) for n in range(3)}, path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler and one worker in threads of this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50,
        protocol="tcp://",
    ) as made:  # fmt: skip
        yield made


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def refused(ran: Ran, *words: str) -> None:
    """In one line, with nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("mpq: error: ") <= 1
    assert "Traceback" not in ran.err
    for word in words:
        assert word in " ".join(ran.err.split())


def test_the_table_is_the_same_bytes_with_any_number_of_threads(
    source: Path, tmp_path: Path, mpq: Callable[..., Ran]
) -> None:
    tables = [tmp_path / f"{workers}.mpqt" for workers in ("default", 1, 3)]
    assert mpq("measure", source, "-o", tables[0]).code == 0
    for table in tables[1:]:
        assert mpq("measure", source, "--workers", table.stem, "-o", table).code == 0
    assert len({table.read_bytes() for table in tables}) == 1
    assert sorted(tmp_path.iterdir()) == sorted([source, *tables])


def test_the_workers_of_a_cluster_measure_the_same_bytes(
    source: Path, tmp_path: Path, mpq: Callable[..., Ran], cluster: Any
) -> None:
    tables = [tmp_path / "dask.mpqt", tmp_path / "here.mpqt"]
    ran = mpq("measure", source, "--dask", cluster.scheduler_address, "-o", tables[0])
    assert ran.code == 0, ran.err
    assert mpq("measure", source, "-o", tables[1]).code == 0
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_threads_and_a_cluster_are_one_too_many(source: Path, tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    ran = mpq("measure", source, "--workers", 2, "--dask", "tcp://127.0.0.1:1", "-o", tmp_path / "t.mpqt")
    refused(ran, "--workers", "--dask", "give one")
    assert not (tmp_path / "t.mpqt").exists()


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1.5", "1000000"])
def test_a_number_of_threads_that_is_none(source: Path, workers: str, mpq: Callable[..., Ran]) -> None:
    refused(mpq("measure", source, "--workers", workers), "--workers", workers)


def test_a_cluster_that_does_not_answer(
    source: Path, tmp_path: Path, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cli_workers, "CONNECT", 1)
    address = f"tcp://127.0.0.1:{closed_port()}"
    ran = mpq("measure", source, "--dask", address, "-o", tmp_path / "t.mpqt")
    refused(ran, "mpq: error: dask: no scheduler answers at", address, "`dask scheduler`")
    assert sorted(tmp_path.iterdir()) == [source]


ANSWERS = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "another greeting": b"SSH-2.0-OpenSSH_9.7\r\n",
    "zeros": bytes(4096),
    "nothing": b"",
}


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of somebody who is no scheduler: who calls gets this answer, and then waits."""
    calls: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                calls.append(server.accept()[0])
                calls[-1].sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for call in calls:
        call.close()


@pytest.mark.parametrize("what", list(ANSWERS))
def test_an_address_where_something_else_answers(
    source: Path, tmp_path: Path, what: str, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cli_workers, "CONNECT", 1)
    with answering(ANSWERS[what]) as address:
        began = time.monotonic()
        ran = mpq("measure", source, "--dask", address, "-o", tmp_path / "t.mpqt")
        assert time.monotonic() - began < 60  # it does not wait for ever
    refused(ran, "mpq: error: dask: no scheduler answers at", address)
    assert ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://host:port", "nope://127.0.0.1:8786"])
def test_an_address_that_is_none(
    source: Path, address: str, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cli_workers, "CONNECT", 1)
    refused(mpq("measure", source, "--dask", address), "mpq: error: dask: no scheduler answers at", repr(address))


def test_without_dask_it_is_said_how_to_get_it(
    source: Path, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(mpq("measure", source, "--dask", "tcp://127.0.0.1:1"), "dask: is not installed: pip install")


def test_a_device_that_is_none(source: Path, tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    ran = mpq("measure", source, "--device", "nonsense", "-o", tmp_path / "t.mpqt")
    refused(ran, "mpq: error: device: 'nonsense' cannot be used")
    assert ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("command", [("measure", "-o"), ("plan", "--table"), ("sweep", "--table")])
def test_what_an_earlier_version_left_beside_the_table_is_refused(
    source: Path, tmp_path: Path, mpq: Callable[..., Ran], command: tuple[str, str]
) -> None:
    left = tmp_path / "t.mpqt.measure.partial"
    left.write_text("mpq-partial 1\nof something else\n")
    ran = mpq(command[0], source, command[1], tmp_path / "t.mpqt")
    refused(ran, "t.mpqt.measure.partial: is a partial file of a measurement that an earlier mpq-plugins left")
    assert ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted([source, left])


def test_a_damaged_store_is_said_and_the_table_is_right(source: Path, tmp_path: Path, mpq: Callable[..., Ran]) -> None:
    assert mpq("measure", source, "-o", tmp_path / "plain.mpqt").code == 0
    left = tmp_path / "t.mpqt.partial"
    with suppress(KeyboardInterrupt), Store(left) as store:
        measure(source, store=store)
        raise KeyboardInterrupt
    with closing(sqlite3.connect(left)) as connection:
        connection.execute("UPDATE unit SET data = zeroblob(9) WHERE id = 1")
        connection.commit()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as where the command is run
        ran = mpq("measure", source, "-o", tmp_path / "t.mpqt")
    assert ran.code == 0
    assert "t.mpqt.partial: is damaged; " in " ".join(ran.err.split())
    assert (tmp_path / "t.mpqt").read_bytes() == (tmp_path / "plain.mpqt").read_bytes()
    assert not left.exists()


MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

def net():
    torch.manual_seed(0)
    return Net().eval()

EXACT = net()  # a score that seeds the one generator of a process would not be for threads

def batches():
    return [torch.linspace(-1, 1, 8 * n).view(n, 8) for n in (12, 20)]

def score(model):
    with torch.no_grad():
        return -float((model(batches()[0]) - EXACT(batches()[0])).square().sum())
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a user's that only `mpq` is told of."""
    path = tmp_path / f"mine_{tmp_path.name}.py".replace("-", "_")
    path.write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop(path.stem, None)


def test_plans_are_evaluated_alike_by_threads_and_by_a_cluster_that_is_sent_the_users_file(
    mine: Path, mpq: Callable[..., Ran], cluster: Any
) -> None:
    for bits in (2, 3):
        assert mpq("plan", f"{mine}:net", "--bits", bits, "-o", f"{bits}.json").code == 0
    common = ("2.json", "3.json", "--eval", f"{mine}:score", "--calibrate", f"{mine}:batches", "--json")
    found = [
        mpq("evaluate", f"{mine}:net", *common, *more)
        for more in ((), ("--workers", 2), ("--dask", cluster.scheduler_address))
    ]
    assert [ran.code for ran in found] == [0, 0, 0], found[-1].err
    rows = [[{**row, "seconds": 0} for row in json.loads(ran.out)["rows"]] for ran in found]
    assert rows[0] == rows[1] == rows[2]
    assert len({str(row["scores"]) for row in rows[0]}) == 5


def test_a_sweep_is_the_same_bytes_by_threads(mine: Path, mpq: Callable[..., Ran]) -> None:
    common = ("sweep", f"{mine}:net", "--average-bits", "2,3", "--eval", f"{mine}:score")
    assert mpq(*common, "-o", "here.csv").code == 0
    assert mpq(*common, "-o", "there.csv", "--workers", 2).code == 0
    assert Path("here.csv").read_bytes() == Path("there.csv").read_bytes()


@pytest.mark.parametrize("command", ["apply", "compress"])
def test_weights_are_compensated_alike_by_threads_and_by_a_cluster(
    mine: Path, command: str, mpq: Callable[..., Ran], cluster: Any
) -> None:
    torch.save(runpy.run_path(str(mine))["net"]().state_dict(), "net.pt")
    assert mpq("plan", "net.pt", "--bits", 2, "-o", "2.json").code == 0
    suffix = {"apply": "pt", "compress": "mpq"}[command]
    common = (command, "net.pt", "2.json", "--model", f"{mine}:net", "--calibrate", f"{mine}:batches")
    ways = {"here": (), "threads": ("--workers", 2), "dask": ("--dask", cluster.scheduler_address)}
    for name, more in (ways | {"nearest": ("--rounding", "nearest")}).items():
        Path(name).mkdir()  # for torch writes a file's name into it
        ran = mpq(*common, *more, "-o", f"{name}/out.{suffix}")
        assert ran.code == 0, ran.err
    here, threads, dask, nearest = (
        path.read_bytes() for path in (Path(name) / f"out.{suffix}" for name in (*ways, "nearest"))
    )
    assert here == threads == dask != nearest


@pytest.mark.parametrize("command", ["apply", "compress"])
@pytest.mark.parametrize(("more", "label"), [((), "nearest"), (("--rounding", "learned"), "learned")])
def test_workers_where_nothing_is_compensated_are_refused(
    mine: Path, command: str, more: tuple[str, ...], label: str, mpq: Callable[..., Ran]
) -> None:
    inputs = ("--model", f"{mine}:net", "--calibrate", f"{mine}:batches") if more else ()
    ran = mpq(command, "net.pt", "2.json", *inputs, *more, "--workers", 2, "-o", "out.mpq")
    refused(ran, "workers: share compensated rounding", label, "--calibrate", "--rounding compensated")


@pytest.mark.parametrize("command", ["sweep", "pareto"])
def test_workers_without_an_evaluation_are_refused(source: Path, command: str, mpq: Callable[..., Ran]) -> None:
    refused(mpq(command, source, "--workers", 2), "workers: evaluate models", "--eval")


def test_an_evaluation_on_a_cluster_that_does_not_answer(
    mine: Path, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cli_workers, "CONNECT", 1)
    assert mpq("plan", f"{mine}:net", "--bits", 2, "-o", "2.json").code == 0
    address = f"tcp://127.0.0.1:{closed_port()}"
    ran = mpq("evaluate", f"{mine}:net", "2.json", "--eval", f"{mine}:score", "--dask", address, "-o", "rows.csv")
    refused(ran, "mpq: error: dask: no scheduler answers at", address)
    assert not Path("rows.csv").exists()
