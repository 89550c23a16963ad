from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.errors import SourceError
from mpq_plugins.journal import Journal

JOB = {"weights": "sha256:test"}
rows = st.dictionaries(
    st.text(max_size=5), st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False)), max_size=5
)


@given(rows, st.integers(0, 400))
def test_what_was_written_whole_is_there_again(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, dict[str, float]], kept: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "sweep.partial"
    journal = Journal(path, JOB)
    assert journal.rows == {}
    assert not journal.stale
    for key, row in content.items():
        journal.add(key, row)
    assert Journal(path, JOB).rows == content
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])  # killed while writing
    again = Journal(path, JOB)
    assert all(content[key] == row for key, row in again.rows.items())
    assert len(again.rows) >= whole[:kept].count(b"\n") - 1
    again.add("one more", {})
    assert Journal(path, JOB).rows == {**again.rows, "one more": {}}


@pytest.mark.parametrize(
    "content", ["", "not JSON", "[1]", '{"job": {"weights": "sha256:other"}}\n{"key": "a", "row": {}}']
)
def test_another_jobs_file_is_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sweep.partial"
    path.write_text(content)
    journal = Journal(path, JOB)
    assert journal.rows == {}
    assert journal.stale
    journal.add("a", {"score": 1.0})
    assert Journal(path, JOB).rows == {"a": {"score": 1.0}}


def test_where_nothing_can_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot write there"):
        Journal(tmp_path / "no" / "sweep.partial", JOB)
