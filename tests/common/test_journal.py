import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.common.checksum import sealed
from mpq_plugins.common.journal import Journal
from mpq_plugins.errors import MeasureWarning, SettingError, SourceError
from tests.helpers.says import naming

JOB = {"model": "sha256:test"}
HEAD = json.dumps(sealed({"version": 2, "job": JOB})) + "\n"
numbers = st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), min_size=1)
contents = st.dictionaries(st.text(max_size=5), numbers, max_size=5)


@given(contents, st.integers(0, 400))
def test_what_was_written_whole_is_there_again(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, dict[str, float]], kept: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "sweep.partial"
    journal = Journal(path, JOB)
    assert journal.rows == {}
    for key, row in content.items():
        journal.add(key, row)
    assert path.exists() == bool(content)
    assert Journal(path, JOB).rows == content
    if not content:
        return
    whole = path.read_bytes()
    path.write_bytes(whole[: len(HEAD) + kept])  # killed while writing a row
    again = Journal(path, JOB)
    assert all(content[key] == row for key, row in again.rows.items())
    assert len(again.rows) >= whole[: len(HEAD) + kept].count(b"\n") - 1
    again.add("one more", {"score": 1.0})
    assert Journal(path, JOB).rows == {**again.rows, "one more": {"score": 1.0}}


@pytest.mark.parametrize("content", ["", "my notes", "[1]", '{"format": "mpq-plan"}', "\x00\x01"])
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sweep.partial"
    path.write_text(content)
    with pytest.raises(SettingError, match=naming("no journal", "remove", "another output")):
        Journal(path, JOB)
    assert path.read_text() == content


def test_another_jobs_rows_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sweep.partial"
    Journal(path, {"model": "sha256:other"}).add("a", {"score": 1.0})
    before = path.read_bytes()
    with pytest.raises(SettingError, match="holds finished rows of another job"):
        Journal(path, JOB)
    assert path.read_bytes() == before


ROW = {"key": "a", "row": {"score": 1.0}}


@pytest.mark.parametrize(
    "line",
    [5, [], {"key": [1], "row": {"a": 1}}, {"key": "b", "row": 5}, {"key": "b", "row": {}},
     {"key": "b", "row": {"a": "1"}}, {"key": "b", "row": {"a": float("nan")}},
     {"key": "b", "row": {"a": 1}, "c": 1}, {"key": "b", "row": {"a": 1}, "checksum": "00000000"}, {"key": "b"}],
)  # fmt: skip
def test_damaged_rows_are_done_again_and_said(tmp_path: Path, line: Any) -> None:
    path = tmp_path / "sweep.partial"
    own = sealed(line) if isinstance(line, dict) and "checksum" not in line else line
    path.write_text(f"{HEAD}{json.dumps(sealed(ROW))}\n{json.dumps(own)}\n")
    with pytest.warns(MeasureWarning, match=naming("sweep.partial", 1, "damaged", "again")):
        assert Journal(path, JOB).rows == {"a": {"score": 1.0}}


def test_journals_of_the_version_without_checksums_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "sweep.partial"
    path.write_text('{"job": {"model": "sha256:test"}}\n{"key": "a", "row": {"score": 1.0}}\n{"key": "b", "ro')
    assert Journal(path, JOB).rows == {"a": {"score": 1.0}}
    assert path.read_text() == f"{HEAD}{json.dumps(sealed(ROW))}\n"
    path.write_text('{"job": {"model": "sha256:other"}}\n{"key": "a", "row": {"score": 1.0}}\n')
    with pytest.raises(SettingError, match="holds finished rows of another job"):
        Journal(path, JOB)


def test_where_nothing_can_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot write there"):
        Journal(tmp_path / "no" / "sweep.partial", JOB).add("a", {"score": 1.0})
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match="is in the way"):
        Journal(tmp_path / "folder", JOB)
