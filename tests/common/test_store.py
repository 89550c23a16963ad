"""A store gives back what was written whole, to its own job, and nothing else; it goes when it is needed no more."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpq_plugins import Store
from mpq_plugins.common import store_file
from mpq_plugins.common.checksum import sealed
from mpq_plugins.common.store import Finished
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError

JOB = {"model": "sha256:test", "seed": "0"}
OTHER = {"model": "sha256:test", "seed": "1"}
ROOT = Path(__file__).parents[2]
names = st.text(max_size=5)
numbers = st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), min_size=1)
values = hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=3), elements=st.floats(allow_nan=False))
arrays = st.dictionaries(st.sampled_from("ab"), values, min_size=1)


class StopError(Exception):
    """What ends a block early."""


@pytest.fixture(autouse=True)
def small_pages() -> Iterator[None]:
    """So that files are small, and units take several pages and pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_file, "PAGE", 512)
        patch.setattr(store_file, "PIECE", 700)
        patch.setattr(store_file, "FLUSHED", ("OFF", "OFF"))
        yield


def kept(path: Path, units: dict[str, bytes], job: dict[str, str] = JOB, kind: str = "work") -> Path:
    """A store that an interrupted run left."""
    with suppress(StopError), Store(path) as store:
        finished = store.job(kind, job)
        for name, data in units.items():
            finished.add(name, data)
        raise StopError
    return path


def read(path: Path, job: dict[str, str] = JOB, kind: str = "work") -> dict[str, bytes]:
    """Its units; the store is left as it is."""
    found = {}
    with suppress(StopError), Store(path) as store:
        finished = store.job(kind, job)
        found = {name: finished.take(name) for name in finished}
        assert len(finished) == len(found)
        raise StopError
    return found


def quietly(path: Path, job: dict[str, str] = JOB) -> dict[str, bytes] | SettingError | SourceError:
    """What is read, or the error; a damaged store warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasureWarning)
        try:
            return read(path, job)
        except (SettingError, SourceError) as error:
            return error


UNITS = {"a": b"x" * 2000, "b": b"", "ü": bytes(range(256)) * 5, "d" * 300: b"1"}


@given(st.dictionaries(names, st.binary(max_size=3000), max_size=5))
@settings(max_examples=50)
def test_what_was_written_is_there_again(tmp_path_factory: pytest.TempPathFactory, units: dict[str, bytes]) -> None:
    path = kept(tmp_path_factory.mktemp("store") / "out.partial", units)
    assert path.exists() == bool(units)
    assert read(path) == units
    assert [left.name for left in path.parent.iterdir()] == [path.name] * bool(units)


@given(st.dictionaries(names, numbers, max_size=4), st.dictionaries(names, arrays, max_size=4))
@settings(max_examples=50)
def test_rows_and_arrays_are_there_again_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Any], tables: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("store") / "out.partial"
    with suppress(StopError), Store(path) as store:
        for name, row in rows.items():
            store.job("rows", JOB).add_row(name, row)
        for name, table in tables.items():
            store.job("tables", JOB).add_arrays(name, table)
        raise StopError
    with Store(path) as store:
        assert len(store) == len(rows) + len(tables)
        assert {name: store.job("rows", JOB).row(name) for name in store.job("rows", JOB)} == rows
        finished = store.job("tables", JOB)
        assert {*finished} == {*tables}
        for name, table in tables.items():
            again = finished.arrays(name)
            assert again is not None
            assert {part: (array.shape, array.tobytes()) for part, array in again.items()} == {
                part: (array.shape, array.tobytes()) for part, array in table.items()
            }
        assert (finished.row("none"), finished.arrays("none"), "none" in finished) == (None, None, False)
    assert not path.exists()


@pytest.mark.parametrize(
    "data", [b"", b"5", b"[]", b"{}", b'{"a": "1"}', b'{"a": NaN}', b'{"a": true}', b"[" * 100_000]
)
def test_what_is_no_row_is_none(tmp_path: Path, data: bytes) -> None:
    with Store(kept(tmp_path / "out.partial", {"a": data})) as store:
        finished = store.job("work", JOB)
        assert (finished.row("a"), finished.arrays("a")) == (None, None)


def test_it_is_there_from_the_beginning_and_goes_at_a_good_end(tmp_path: Path) -> None:
    with Store(tmp_path / "out.partial") as store:
        assert store.path.exists()
        store.job("work", JOB).add("a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_badly_with_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    for begins in (False, True):
        with suppress(KeyboardInterrupt), Store(tmp_path / "out.partial") as store:
            if begins:
                store.job("work", JOB)
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []


def test_a_unit_may_be_written_again(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS)
    with suppress(StopError), Store(path) as store:
        store.job("work", JOB).add("a", b"y")
        raise StopError
    assert read(path) == UNITS | {"a": b"y"}


def test_several_jobs_share_a_store(tmp_path: Path) -> None:
    path = kept(kept(tmp_path / "out.partial", {"a": b"1"}), {"a": b"2"}, OTHER, "more")
    assert (read(path), read(path, OTHER, "more")) == ({"a": b"1"}, {"a": b"2"})


def test_what_this_run_did_not_ask_for_outlasts_it(tmp_path: Path) -> None:
    path = kept(kept(tmp_path / "out.partial", {"a": b"1"}), {"a": b"2"}, OTHER, "more")
    with Store(path) as store:
        store.job("work", JOB).add("b", b"3")
    assert read(path) == {}
    assert read(path, OTHER, "more") == {"a": b"2"}


def test_another_jobs_units_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS)
    before = path.read_bytes()
    for job, said in (
        (OTHER, "seed"), (JOB | {"more": ""}, "more"), ({"seed": "0"}, "model"),
        ({"model": "x", "seed": "y"}, "model, seed"),
    ):  # fmt: skip
        match = rf"out\.partial: holds what another job finished \(it differs in {said}\); remove it"
        with pytest.raises(SettingError, match=match):
            read(path, job)
        assert path.read_bytes() == before
    assert read(path) == UNITS


def test_a_store_in_which_nothing_is_finished_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    killed_at(path, "store.job('work', {'seed': '1'})")
    assert path.exists()
    assert read(path) == {}


def test_units_of_another_job_are_not_believed_under_this_ones_name(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS, OTHER)
    mine = kept(tmp_path / "mine.partial", {"a": b"1"})
    with closing(sqlite3.connect(mine)) as one:
        (row,) = one.execute("SELECT * FROM job").fetchall()
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE job SET facts = ?, checksum = ?", row[1:])
        other.commit()
    with pytest.warns(MeasureWarning, match=r"out\.partial: is damaged; 0 of its units are whole and used"):
        assert read(path) == {}


def test_the_folders_on_the_way_are_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new" / "out.partial"
    assert read(kept(path, UNITS)) == UNITS
    assert [left.name for left in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "where", ["a\0b", "a\0b/out", "x" * 300, f"{'x' * 300}/out", "file/out", "circle", "circle/out"]
)
def test_where_nothing_can_be_nothing_is_said_to_stay(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())
    said = r"cannot write there \(.*\)\. Choose another path\.$"
    with pytest.raises(SourceError, match=said), Store(tmp_path / where):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_it_is_used_in_a_block(tmp_path: Path) -> None:
    store = Store(tmp_path / "out.partial")
    with pytest.raises(SettingError, match="is not open; use it in a block"):
        store.job("work", JOB)
    assert list(tmp_path.iterdir()) == []


# ---- what else may lie there


DATABASE = sqlite3.connect(":memory:")
DATABASE.execute("CREATE TABLE notes (text TEXT)")
EMPTY_DATABASE = sqlite3.connect(":memory:")
EMPTY_DATABASE.execute("VACUUM")
FOREIGN = {
    "nothing": b"", "a byte": b"\n", "no tables": EMPTY_DATABASE.serialize(), "short": b"\0" * 511,
    "notes": b"my notes", "list": b"[1]", "plan": b'{"format": "mpq-plan"}', "zeros": b"\0" * 5000,
    "cut": b"SQLite format 3\0", "database": DATABASE.serialize(),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out.partial"
    path.write_bytes(FOREIGN[what])
    with pytest.raises(SettingError, match="is in the way, and no store of finished work, or damaged; move it away"):
        read(path)
    assert path.read_bytes() == FOREIGN[what]
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["-wal", "-journal", "-shm"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("text", ["my notes", ""])
def test_a_strangers_file_beside_is_left_alone(tmp_path: Path, suffix: str, there: bool, text: str) -> None:
    path = tmp_path / "out.partial"
    if there and suffix != "-wal":  # which beside a store is its own
        kept(path, UNITS)
    other = tmp_path / f"out.partial{suffix}"
    other.write_text(text)
    with suppress(SettingError), Store(path) as store:
        store.job("work", JOB)
    assert other.read_text() == text


def test_a_file_that_is_in_the_way_of_a_log_is_named(tmp_path: Path) -> None:
    for suffix in ("-wal", "-journal"):
        other = tmp_path / f"out.partial{suffix}"
        other.symlink_to("nowhere")
        with pytest.raises(SettingError, match=f"out.partial{suffix}: is in the way.*; move it away"):
            read(tmp_path / "out.partial")
        assert sorted(tmp_path.iterdir()) == [other]
        other.unlink()


def test_a_log_whose_store_was_removed_is_nothing_to_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    killed_at(path, f"store.job('work', {JOB!r}).add('a', b'1')")
    log = path.with_name("out.partial-wal")
    assert log.stat().st_size
    path.unlink()
    assert read(path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_was_put_in_its_place_meanwhile_stays(tmp_path: Path, ends_well: bool) -> None:
    path = tmp_path / "out"
    with suppress(StopError), Store(path) as store:
        store.job("work", JOB).add("a", b"1")
        (tmp_path / "new").write_bytes(b"the result")
        (tmp_path / "new").replace(path)
        if not ends_well:
            raise StopError
    assert path.read_bytes() == b"the result"
    if ends_well:
        assert [left.name for left in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    path, target = tmp_path / "link", tmp_path / "folder" / "out"
    path.symlink_to(target)
    kept(path, UNITS)
    assert read(path) == UNITS == read(target)
    with Store(path) as store:
        with pytest.raises(SettingError, match="another run is writing it"):
            read(target)
        store.job("work", JOB)
    assert path.is_symlink()
    assert list(target.parent.iterdir()) == []


def test_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "endless"):
        with pytest.raises(SettingError, match="is in the way, and no ordinary file"):
            read(tmp_path / name)


def test_a_newer_versions_store_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(SettingError, match="is of a newer mpq-plugins"):
        read(path)


def test_a_store_with_more_in_it_than_we_put_there_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TRIGGER mine AFTER INSERT ON unit BEGIN DELETE FROM unit; END")
    with pytest.raises(SettingError, match="no store of finished work"):
        read(path)


def old_folder(path: Path) -> None:
    path.mkdir()
    (path / "job.json").write_text(json.dumps({"model": "sha256:1", "plan": "{}", "settings": "steps=5"}))
    (path / "00000.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


OLD: dict[str, tuple[Callable[[Path], object], str]] = {
    "journal": (
        lambda path: path.write_text(
            f"{json.dumps(sealed({'version': 2, 'job': JOB}))}\n{json.dumps(sealed({'key': 'a', 'row': {'b': 1.0}}))}\n"
        ),
        "a journal of finished rows",
    ),
    "first journal": (
        lambda path: path.write_text('{"job": {"model": "x"}}\n{"key": "a", "row": {"score": 1.0}}\n'),
        "a journal of finished rows",
    ),
    "arrays": (lambda path: path.write_bytes(b"mpq-partial 1\n{}\n" + bytes(99)), "a partial file of a measurement"),
    "folder": (old_folder, "a folder of finished blocks"),
}


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("name", ["out.partial", "out.kl.partial", "out.measure.partial"])
def test_what_an_earlier_version_left_is_refused_and_left_alone(tmp_path: Path, kind: str, name: str) -> None:
    make, said = OLD[kind]
    path = tmp_path / name
    make(path)
    files = [path] if path.is_file() else sorted(path.iterdir())
    before = [file.read_bytes() for file in files]
    match = rf"{name}: is {said} that an earlier mpq-plugins left, .*remove it to start"
    with pytest.raises(SettingError, match=match), Store.beside(tmp_path / "out"):
        pass
    assert [file.read_bytes() for file in files] == before
    assert [left.name for left in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", OLD)
def test_another_results_store_is_none_of_ours(tmp_path: Path, kind: str) -> None:
    for name in ("other", "out.pt", "out.mpqt", "out.more", "out.pt.measure", "out.safetensors.kl", "out2", "ou"):
        OLD[kind][0](tmp_path / f"{name}.partial")
    kept(tmp_path / "out.csv.partial", UNITS)
    with Store.beside(tmp_path / "out") as store:
        assert store.path == tmp_path / "out.partial"


# ---- damage


def test_a_changed_unit_is_done_again_and_said(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", UNITS)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE unit SET data = zeroblob(3) WHERE name = ?", (b"a",))
        connection.commit()
    with pytest.warns(MeasureWarning, match=r"out\.partial: is damaged; 3 of its units are whole and used, the others"):
        found = read(path)
    assert found == {name: data for name, data in UNITS.items() if name != "a"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path) == found  # it was mended


def check(found: dict[str, bytes] | SettingError | SourceError) -> None:
    """Nothing was read that nobody wrote."""
    if isinstance(found, dict):
        assert all(UNITS[name] == data for name, data in found.items())
    else:
        assert "\n" not in str(found)


@given(st.data())
@settings(max_examples=200)
def test_damage_anywhere_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = kept(tmp_path_factory.mktemp("store") / "out.partial", UNITS)
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    found = quietly(path)
    check(found)
    if isinstance(found, dict):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what was left is whole again
            assert read(path) == found
    else:
        assert path.read_bytes() == damaged


@given(st.data())
@settings(max_examples=100)
def test_a_store_that_was_cut_or_written_into_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = kept(tmp_path_factory.mktemp("store") / "out.partial", UNITS)
    whole = path.read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    path.write_bytes(whole[:begin] + data.draw(st.binary(max_size=40)) + data.draw(st.sampled_from([b"", whole[end:]])))
    check(quietly(path))


def test_a_unit_that_somebody_else_changed_while_it_is_in_use(tmp_path: Path) -> None:
    path = kept(tmp_path / "out.partial", {"a": b"1", "b": b"q" * 3_000_000})  # more than SQLite keeps in memory
    with suppress(StopError), Store(path) as store:
        finished = store.job("work", JOB)
        with path.open("r+b") as file:
            content = file.read()
            file.seek(content.rindex(b"q" * 300))
            file.write(b"p")
        with pytest.raises(SourceError, match=r"out\.partial: was changed by somebody else while in use; run again"):
            finished.take("b")
        assert finished.take("a") == b"1"
        raise StopError


# ---- several runs, and runs that end in the middle


def test_two_runs_do_not_write_one_store(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    with Store(path) as store:
        store.job("work", JOB).add("a", b"1")
        with pytest.raises(SettingError, match=r"out\.partial: another run is writing it; wait for that, or name"):
            read(path)
        code = f"from mpq_plugins import Store\nwith Store({str(path)!r}): pass"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert "another run is writing it" in ran.stderr
        store.job("work", JOB).add("b", b"2")
    assert not path.exists()


def killed_at(path: Path, *lines: str) -> None:
    """Run the lines in a process of their own, which is then killed."""
    code = [
        "import os, signal", "from mpq_plugins import Store", "from mpq_plugins.common import store_file",
        "store_file.PAGE, store_file.PIECE = 512, 700", f"store = Store({str(path)!r}).__enter__()", *lines,
        "os.kill(os.getpid(), signal.SIGKILL)",
    ]  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, check=False)
    assert ran.returncode == -signal.SIGKILL


def test_a_killed_run_holds_nothing_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    lines = (f"job = store.job('work', {JOB!r})", "for n in range(40): job.add(str(n), bytes([n]) * 50 * n)")
    killed_at(path, *lines)
    assert read(path) == {str(n): bytes([n]) * 50 * n for n in range(40)}
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@given(st.integers(0, 1 << 20))
@settings(max_examples=100)
def test_whatever_of_a_write_reached_the_file_what_was_finished_before_is_there(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """As a process killed in the middle of writing leaves it: the log is cut anywhere."""
    folder = tmp_path_factory.mktemp("log")
    units = {str(n): bytes([n]) * 300 * n for n in range(6)}
    with Store(folder / "whole.partial") as store:
        finished = store.job("work", JOB)
        before = (folder / "whole.partial-wal").stat().st_size
        ends = []
        for name, data in units.items():
            finished.add(name, data)
            ends.append((folder / "whole.partial-wal").stat().st_size)
        main, log = (folder / "whole.partial").read_bytes(), (folder / "whole.partial-wal").read_bytes()
    length = before + cut % (len(log) - before + 1)
    (folder / "out.partial").write_bytes(main)
    (folder / "out.partial-wal").write_bytes(log[:length])
    there = [name for name, end in zip(units, ends, strict=True) if end <= length]
    assert read(folder / "out.partial") == {name: units[name] for name in there}


def test_a_full_disk_is_said_and_what_was_written_before_stays(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "out.partial"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    written: list[str] = []

    def fills() -> None:
        with Store(path) as store:
            finished = store.job("work", JOB)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
            try:
                for n in range(100):
                    finished.add(str(n), bytes(1000))
                    written.append(str(n))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(SourceError, match=r"out\.partial: cannot write there .*make room, and run again to go on"):
        fills()
    assert len(written) > 5
    assert read(path) == {name: bytes(1000) for name in written}


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(SourceError, match="cannot write there"), Store(tmp_path / "out.partial"):
            pass
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_where_a_file_system_has_no_locks_it_works_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sqlite3.connect
    asked: list[str] = []

    def connect(name: str, **named: Any) -> Any:
        asked.append(name.rpartition("/")[2])
        if "nolock" not in name:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = "SQLITE_IOERR_LOCK"
            raise error
        return whole(name, **named)

    monkeypatch.setattr(sqlite3, "connect", connect)
    path = kept(tmp_path / "out?#%20 ü.partial", UNITS)
    assert read(path) == UNITS
    assert asked[1].endswith("&nolock=1")
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_threads_share_it(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Store(tmp_path / "out.partial") as store:
        finished: Finished = store.job("work", JOB)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: finished.add(str(n), bytes([n])), range(100)))
            assert list(pool.map(lambda n: finished.take(str(n)), range(100))) == [bytes([n]) for n in range(100)]
