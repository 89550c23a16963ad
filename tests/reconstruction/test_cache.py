"""Cached tensors: the same rows come back wherever they are kept, and nothing is left on disk."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import SourceError
from mpq_plugins.reconstruction.cache import Cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def columns(draw: st.DrawFn) -> list[Tensor]:
    """Batches of rows of one shape and dtype, empty ones among them, some not contiguous."""
    shape = tuple(draw(st.lists(st.integers(0 if draw(st.booleans()) else 1, 4), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    found = []
    for count in draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)):
        rows = torch.randn(count, *shape, generator=generator).mul(3).to(dtype)
        strided = draw(st.booleans()) and shape
        found.append(rows.transpose(0, -1).contiguous().transpose(0, -1) if strided else rows)
    return found


def bytes_of(rows: Sequence[Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in rows)


@given(st.lists(columns(), min_size=1, max_size=3), st.data())
def test_rows_come_back_wherever_they_are_kept(several: list[list[Tensor]], data: st.DataObject) -> None:
    total = sum(map(bytes_of, several))
    limit = data.draw(st.integers(0, total + 1))
    with Cache(limit) as cache:
        kept = [cache.column() for _ in several]
        for k in range(max(map(len, several))):  # as calls come in: columns in turns
            for rows, column in zip(several, kept, strict=True):
                if k < len(rows):
                    column.append(rows[k])
        assert cache.spilled == (total > limit)
        for rows, column in zip(several, kept, strict=True):
            whole, again = column.tensor(), column.tensor()
            expected = torch.cat(rows)
            assert whole.dtype == expected.dtype
            assert whole.shape == expected.shape
            assert whole.equal(expected)
            assert again.equal(expected)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_the_cache_holds_copies(memory: int) -> None:
    rows = torch.ones(3, 2)
    with Cache(memory) as cache:
        column = cache.column()
        column.append(rows)
        rows.zero_()
        assert column.tensor().equal(torch.ones(3, 2))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_images_are_kept_channels_last(memory: int) -> None:
    with Cache(memory) as cache:
        column = cache.column()
        column.append(torch.randn(3, 5, 4, 2))
        assert column.tensor().is_contiguous(memory_format=torch.channels_last)


def test_files_are_removed_and_tensors_live_on(tmp_path: Path) -> None:
    rows = torch.randn(50, 40)
    with Cache(0, tmp_path) as cache:
        column = cache.column()
        column.append(rows)
        whole = column.tensor()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == bytes_of([rows])
    assert list(tmp_path.iterdir()) == []
    assert whole.equal(rows)


def test_files_are_removed_after_an_error(tmp_path: Path) -> None:
    def fill() -> None:
        with Cache(0, tmp_path) as cache:
            cache.column().append(torch.ones(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_what_fits_makes_no_folder(tmp_path: Path) -> None:
    with Cache(12, tmp_path) as cache:
        column = cache.column()
        column.append(torch.ones(3))
        assert not cache.spilled
        assert list(tmp_path.iterdir()) == []
        column.append(torch.ones(1))
        assert cache.spilled


def test_a_column_that_leaves_memory_makes_room_for_others(tmp_path: Path) -> None:
    with Cache(12, tmp_path) as cache:
        first, second = cache.column(), cache.column()
        first.append(torch.ones(2))
        first.append(torch.ones(2))
        second.append(torch.ones(3))  # all of the memory, which the first has left
        folder = next(tmp_path.iterdir())
        assert len(list(folder.iterdir())) == 1
        assert second.tensor().equal(torch.ones(3))


def test_rows_are_read_from_the_file_when_they_are_used(tmp_path: Path) -> None:
    with Cache(0, tmp_path) as cache:
        column = cache.column()
        column.append(torch.zeros(1000))
        whole = column.tensor()
        file = next(path for path in tmp_path.rglob("*") if path.is_file())
        whole += 1  # a private map: what a block changes does not reach the file
        assert not any(file.read_bytes())


class Full:
    """A file on a disk that is full."""

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(0, tmp_path) as cache:
        column = cache.column()
        monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
        with pytest.raises(SourceError, match=r"cannot keep the blocks' inputs there \(No space left on device\)"):
            column.append(torch.ones(3))
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    with Cache(0, tmp_path / "missing") as cache, pytest.raises(SourceError, match="missing"):
        cache.column().append(torch.ones(3))
