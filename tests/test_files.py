from pathlib import Path

import pytest

from mpq_plugins.errors import SourceError
from mpq_plugins.files import atomic_path, write_text


def test_a_file_gets_its_content_and_an_ordinary_mode(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "new")
    (tmp_path / "b.json").touch()
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_interrupting_a_write_leaves_the_old_file_whole(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise failure

    with pytest.raises(failure):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere/a\.json: cannot write there"):
        write_text(tmp_path / "nowhere" / "a.json", "x")
    with pytest.raises(SourceError, match="is a directory"):
        write_text(tmp_path, "x")
