"""A measurement that was interrupted goes on from what is intact, and from nothing else."""

import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mpq_plugins import Affine, LayerTable, Piecewise, measure
from mpq_plugins.common.record import MAGIC, Record
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError
from mpq_plugins.measurement import measure as run
from mpq_plugins.measurement import units
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.weights import chunks
from tests.helpers.checkpoints import sharded
from tests.helpers.says import naming
from tests.helpers.tables import contents

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES: list[Scheme] = [Affine(range="mse"), Affine(granularity="per_channel"), Piecewise()]
values = hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=3), elements=st.floats(allow_nan=False))
entries = st.dictionaries(st.text(max_size=5), st.dictionaries(st.sampled_from("ab"), values, min_size=1), max_size=4)


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    """Many units, and a layer that is handed out pass by pass, of a checkpoint that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 64)
        patch.setattr(units, "SMALLEST", 256)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    state = {f"{n}.weight": draw(6, 8) for n in range(4)} | {"large.weight": draw(48, 16).bfloat16()}
    return sharded(tmp_path_factory.mktemp("record") / "model", state)


def table_of(source: Path, scheme: Scheme, journal: Path | None, **options: Any) -> LayerTable:
    return measure(source, scheme, (2, 4), per_channel=True, journal=journal, **options)


class Counted:
    """How often workers were asked for anything, passes over parts of a large layer included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for name in ("unit_sums", "answers"):
            monkeypatch.setattr(run, name, self.watch(getattr(run, name)))

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.calls += 1
            return function(*arguments)

        return watched


@contextmanager
def warned(expected: bool) -> Iterator[None]:
    """A warning is an error here unless it is expected."""
    if expected:
        with pytest.warns(MeasureWarning):
            yield
    else:
        yield


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_recorded_is_not_measured_again(
    checkpoint: Path, scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "table.partial"
    counted = Counted(monkeypatch)
    whole = contents(table_of(checkpoint, scheme, None))
    every, counted.calls = counted.calls, 0

    def interrupt(name: str, done: int, total: int) -> None:
        if 3 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table_of(checkpoint, scheme, journal, progress=interrupt)
    first = counted.calls
    kept = recorded(journal, job_of(journal))
    assert 0 < kept <= first
    counted.calls = 0
    assert contents(table_of(checkpoint, scheme, journal)) == whole
    assert counted.calls == every - kept
    counted.calls = 0
    assert contents(table_of(checkpoint, scheme, journal)) == whole
    assert counted.calls == 0


def recorded(journal: Path, job: str) -> int:
    record = Record(journal, job)
    record.close()
    return len(record)


def job_of(journal: Path) -> str:
    return journal.read_bytes().splitlines()[1].decode()


@pytest.fixture(scope="module")
def partials(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Scheme, bytes, object]]:
    """Of each scheme: a whole partial file, and the table."""
    found: list[tuple[Scheme, bytes, object]] = []
    for scheme in SCHEMES:
        journal = tmp_path_factory.mktemp("partial") / "whole"
        known = contents(table_of(checkpoint, scheme, journal))
        found.append((scheme, journal.read_bytes(), known))
    return found


@pytest.mark.slow
@given(position=st.integers(0, 1 << 20), which=st.integers(0, len(SCHEMES) - 1))
def test_a_partial_file_cut_anywhere_gives_the_same_table(
    partials: list[tuple[Scheme, bytes, object]],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    which: int,
) -> None:
    scheme, whole, known = partials[which]
    journal = tmp_path_factory.mktemp("cut") / "partial"
    journal.write_bytes(whole[: position % len(whole)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasureWarning)  # where an entry ends there is nothing to warn of
        assert contents(table_of(checkpoint, scheme, journal)) == known
    # And what was left of it is whole again: all of it is believed, without a warning.
    assert contents(table_of(checkpoint, scheme, journal)) == known
    assert len(journal.read_bytes()) == len(whole)


@pytest.mark.slow
@given(position=st.integers(0, 1 << 20), flip=st.integers(1, 255), which=st.integers(0, len(SCHEMES) - 1))
def test_a_partial_file_with_any_byte_flipped_gives_the_same_table(
    partials: list[tuple[Scheme, bytes, object]],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    flip: int,
    which: int,
) -> None:
    scheme, whole, known = partials[which]
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= flip
    journal = tmp_path_factory.mktemp("flipped") / "partial"
    journal.write_bytes(damaged)
    with pytest.warns(MeasureWarning, match=r"partial: is (damaged|of another measurement)"):
        assert contents(table_of(checkpoint, scheme, journal)) == known
    assert contents(table_of(checkpoint, scheme, journal)) == known


@given(entries, st.integers(0, 1 << 12))
def test_a_record_gives_back_the_entries_before_a_cut_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, dict[str, NDArray[np.float64]]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("record") / "partial"
    record = Record(path, "job")
    ends = [0]
    for name, arrays in written.items():
        record.add(name, arrays)
        ends.append(path.stat().st_size)
    if not written:
        assert not path.exists()
        return
    record.close()
    cut %= ends[-1] + 1
    path.write_bytes(path.read_bytes()[:cut])
    head = len(MAGIC + b"job\n")
    with warned(0 < cut < head or (cut > head and cut not in ends)):
        again = Record(path, "job")
    whole = [name for name, end in zip(written, ends[1:], strict=True) if end <= cut]
    assert [name for name in written if name in again] == whole
    assert len(again) == len(whole)
    for name in whole:
        arrays = dict(again.take(name))
        assert {part: array.tobytes() for part, array in arrays.items()} == {
            part: array.tobytes() for part, array in written[name].items()
        }
    again.close()


def test_a_record_that_somebody_else_cut_while_it_is_in_use(tmp_path: Path) -> None:
    record = Record(tmp_path / "partial", "job")
    for name in "ab":
        record.add(name, {"values": np.arange(4.0)})
    record.close()
    again = Record(tmp_path / "partial", "job")
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[:-1])
    assert again.take("a")["values"].tolist() == [0, 1, 2, 3]
    with pytest.raises(SourceError, match=naming("partial", "changed", "run again")):
        again.take("b")
    again.close()


def test_two_measurements_do_not_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = Record(tmp_path / "partial", "job")
    first.add("a", {"values": np.arange(4.0)})
    for job in ("job", "other"):
        with pytest.raises(SettingError, match=naming("partial", "another measurement", "wait", "name")):
            Record(tmp_path / "partial", job)
    first.close()
    assert recorded(tmp_path / "partial", "job") == 1


def test_entries_of_another_job_are_not_believed_under_this_ones_line(tmp_path: Path) -> None:
    for job in ("one", "two"):
        record = Record(tmp_path / job, job)
        record.add("a", {"values": np.arange(4.0)})
        record.close()
    head = len(MAGIC + b"one\n")
    mixed = (tmp_path / "one").read_bytes()[:head] + (tmp_path / "two").read_bytes()[head:]
    (tmp_path / "one").write_bytes(mixed)
    with pytest.warns(MeasureWarning, match="from 0 units"):
        assert recorded(tmp_path / "one", "one") == 0


def test_what_is_no_partial_file_is_set_aside_and_not_written_over(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "notes"
    journal.write_text("dear diary")
    known = contents(table_of(checkpoint, SCHEMES[1], None))
    with pytest.warns(MeasureWarning, match=naming("notes", "damaged", "notes.old")):
        assert contents(table_of(checkpoint, SCHEMES[1], journal)) == known
    assert (tmp_path / "notes.old").read_text() == "dear diary"
    assert contents(table_of(checkpoint, SCHEMES[1], journal)) == known
    journal.write_text("dear diary, again")
    with pytest.raises(SettingError, match=r"notes\.old: remove them"):
        table_of(checkpoint, SCHEMES[1], journal)
    assert journal.read_text() == "dear diary, again"


def test_what_is_measured_is_no_place_for_what_is_finished(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "model.pt")
    for source, journal in ((checkpoint, shard), (shard, shard), (tmp_path / "model.pt", tmp_path / "model.pt")):
        before = journal.read_bytes()
        with pytest.raises(SettingError, match="is what is measured; name another file"):
            table_of(source, SCHEMES[1], journal)
        assert journal.read_bytes() == before


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_below_the_right_line_are_believed_by_their_checksum_alone(
    tmp_path_factory: pytest.TempPathFactory, rubbish: bytes
) -> None:
    path = tmp_path_factory.mktemp("rubbish") / "partial"
    path.write_bytes(MAGIC + b"job\n" + rubbish)
    with warned(bool(rubbish)):
        assert recorded(path, "job") == 0


@pytest.mark.parametrize("change", ["bits", "metrics", "scheme", "per_channel", "weights", "skip"])
def test_the_partial_file_of_another_measurement_is_written_anew(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(tmp_path / "model", {f"{n}.weight": torch.randn(6, 8) for n in range(4)})
    journal = tmp_path / "table.partial"
    asked: dict[str, Any] = {
        "scheme": Affine(granularity="per_channel"), "bits": (2, 4), "metrics": ("mse",), "per_channel": False,
        "skip": (),
    }  # fmt: skip
    measure(source, **asked, journal=journal)
    if change == "weights":
        source = sharded(tmp_path / "other", {f"{n}.weight": torch.randn(6, 8) for n in range(4)})
    else:
        other = {
            "bits": (2, 5), "metrics": ("rmse",), "scheme": Affine(granularity="per_channel", symmetric=True),
            "per_channel": True, "skip": ("0",),
        }  # fmt: skip
        asked[change] = other[change]
    expected = contents(measure(source, **asked))
    with pytest.warns(MeasureWarning, match=naming("table.partial", "another measurement", "from the start")):
        assert contents(measure(source, **asked, journal=journal)) == expected
    counted = Counted(monkeypatch)
    assert contents(measure(source, **asked, journal=journal)) == expected  # it is this measurement's now
    assert counted.calls == 0


def test_a_shard_written_since_is_not_believed_to_be_the_same(tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.randn(6, 8) for n in range(4)}
    source = sharded(tmp_path / "model", state)
    journal = tmp_path / "table.partial"
    table_of(source, SCHEMES[1], journal)
    shard = source / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 0x41  # a high byte of the last weight
    shard.write_bytes(content)
    with pytest.warns(MeasureWarning, match="another measurement"):
        found = table_of(source, SCHEMES[1], journal)
    assert contents(found) == contents(table_of(source, SCHEMES[1], None))


def test_weights_in_memory_are_told_apart_to_the_byte(tmp_path: Path) -> None:
    net = torch.nn.Linear(16, 8)
    journal = tmp_path / "table.partial"
    measure(net, journal=journal)
    with torch.no_grad():
        net.weight[0, 0] = 3.0
    with pytest.warns(MeasureWarning, match="another measurement"):
        found = measure(net, journal=journal)
    assert contents(found) == contents(measure(net))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size`, in the middle of a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_full_disk_is_said_and_what_was_written_before_is_used(
    checkpoint: Path,
    partials: list[tuple[Scheme, bytes, object]],
    scheme: Scheme,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, whole, known = partials[SCHEMES.index(scheme)]
    journal = tmp_path / "table.partial"
    with (
        largest_file(int(share * len(whole))),
        pytest.raises(SourceError, match=naming("table.partial", "cannot write", "run again")),
    ):
        table_of(checkpoint, scheme, journal)
    assert journal.stat().st_size <= share * len(whole)
    counted = Counted(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasureWarning)  # of the entry that did not fit
        kept = recorded(journal, whole.splitlines()[1].decode())
        assert contents(table_of(checkpoint, scheme, journal)) == known
    assert counted.calls == recorded(journal, job_of(journal)) - kept
    assert (kept > 0) == (share >= 0.5)


def test_a_folder_in_the_way_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is in the way, and no ordinary file; remove it"):
        table_of(checkpoint, SCHEMES[0], tmp_path)
