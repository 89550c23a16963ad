"""Readers of rows, against the whole tensor."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins.checkpoints.buffers import LARGE, Scratch, chunk_buffer
from mpq_plugins.checkpoints.readers import DTYPES, FileColumns, FileRows, MemoryRows, RowReader, safetensors_tensors
from mpq_plugins.errors import SourceError
from tests.helpers.says import naming

MATRICES = (5, 7, 4)
SOME = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]


def bits(tensor: Tensor) -> bytes:
    """To the last bit, NaN included."""
    raw: bytes = tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()
    return raw


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def sent(reader: Any) -> Any:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(reader))  # noqa: S301  # our own


def stored(folder: Path, tensor: Tensor) -> FileRows:
    """A reader of the tensor in a file that holds others before and after."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(3), "t": tensor.contiguous(), "z": torch.ones(5)}, folder / "model.safetensors")
    reader = safetensors_tensors(folder / "model.safetensors")["t"].read_rows
    assert isinstance(reader, FileRows)
    return reader


@given(st.data(), st.sampled_from(SOME), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_rows_of_a_file_and_of_memory_are_those_of_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype, shape: list[int]
) -> None:
    tensor = values(tuple(shape), dtype)
    whole = tensor.reshape(shape[0], -1)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    first = data.draw(st.integers(0, shape[0]))
    last = data.draw(st.integers(first, shape[0]))
    reader: RowReader
    for reader in (stored(tmp_path_factory.mktemp("rows"), tensor), MemoryRows(tensor)):
        found = reader(start, stop)
        assert found.dtype == dtype
        assert bits(found) == bits(whole[start:stop])
        now = reader.at_once(start, stop, chunk_buffer)
        assert now is None or bits(now) == bits(whole[start:stop])
        part = reader.cut(first, last)
        assert bits(part(0, last - first)) == bits(whole[first:last])
        if first < last:
            assert bits(sent(part)(0, last - first)) == bits(whole[first:last])


@given(st.data(), st.sampled_from(SOME), st.tuples(*[st.integers(1, 6)] * 3), st.booleans())
def test_a_part_is_one_matrix_by_rows_or_by_columns(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    transposed: bool,
) -> None:
    tensor = values(shape, dtype)
    index = data.draw(st.integers(0, shape[0] - 1))
    expected = tensor[index].T if transposed else tensor[index]
    first = data.draw(st.integers(0, len(expected)))
    last = data.draw(st.integers(first, len(expected)))
    start = data.draw(st.integers(first, last))
    for whole in (stored(tmp_path_factory.mktemp("part"), tensor), MemoryRows(tensor)):
        reader: RowReader = whole.part(index, transposed)
        assert bits(reader(0, len(expected))) == bits(expected)
        assert bits(reader(start, last)) == bits(expected[start:last])
        part = reader.cut(first, last)
        assert bits(part.cut(start - first, last - first)(0, last - start)) == bits(expected[start:last])
        if first < last:
            assert bits(sent(part)(0, last - first)) == bits(expected[first:last])


def test_a_single_weight_of_a_wide_tensor_travels_too() -> None:
    """torch calls it contiguous whatever its strides are."""
    tensor = torch.randn(3, 4)[2:, 1::3][:, :1]
    assert tensor.stride() == (4, 3)
    assert sent(MemoryRows(tensor))(0, 1).item() == tensor.item()
    assert MemoryRows(tensor).signature() == MemoryRows(torch.tensor([[tensor.item()]])).signature()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_a_reader_of_nothing_travels_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = sent(MemoryRows(torch.empty(shape, dtype=dtype)))(0, shape[0])
    assert (found.shape[0], found.numel(), found.dtype) == (shape[0], 0, dtype)


def test_columns_are_read_into_the_memory_that_is_given(tmp_path: Path) -> None:
    tensor = values(MATRICES, torch.bfloat16)
    reader = stored(tmp_path, tensor).part(3, transposed=True)
    assert isinstance(reader, FileColumns)
    buffer = bytearray(1000)
    found = reader(1, 3, lambda size: memoryview(buffer)[:size])
    assert found.equal(tensor[3].T[1:3])
    buffer[:] = bytes(1000)
    assert found.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_a_safetensors_file_may_have(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(8 * 8 * dtype.itemsize, dtype=torch.int64).to(torch.uint8)
    tensor = (raw % 2).view(torch.bool)[:64].view(8, 8) if dtype == torch.bool else raw.view(dtype).view(8, 8)
    reader = stored(tmp_path, tensor)
    assert reader.dtype == dtype
    assert bits(reader(2, 7)) == bits(tensor[2:7])


def test_what_travels_is_the_rows_and_no_others(tmp_path: Path) -> None:
    tensor = torch.randn(1000, 100)
    for axis in (0, 1):
        for part in (
            MemoryRows(tensor, axis).cut(10, 12),
            MemoryRows(torch.stack([tensor] * 2)).part(1, axis == 1).cut(10, 12),
        ):
            own = 4 * 2 * (100 if axis == 0 else 1000)
            assert len(pickle.dumps(part)) < own + 500
            assert sent(part)(0, 2).equal(tensor.movedim(axis, 0)[10:12])
    assert len(pickle.dumps(stored(tmp_path, tensor).cut(10, 900))) < 1000  # of a file, where they are


def test_a_parameter_travels_as_plain_values() -> None:
    reader = MemoryRows(torch.nn.Parameter(torch.randn(4, 3).bfloat16()), 1)
    found = sent(reader)
    assert not found.tensor.requires_grad
    assert found(0, 3).equal(reader(0, 3))


def test_signatures_tell_values_and_places_apart(tmp_path: Path) -> None:
    tensor = values(MATRICES, torch.float32)
    reader = stored(tmp_path, tensor)
    other_file = stored(tmp_path / "same", tensor)
    os.utime(other_file.path, ns=(reader.path.stat().st_mtime_ns,) * 2)
    assert reader.signature() != other_file.signature()  # copies keep times, and say nothing of what is in them
    parts = [reader.part(n, transposed=t).signature() for n in range(MATRICES[0]) for t in (False,)]
    assert len({*parts}) == MATRICES[0]
    before = reader.signature()
    os.utime(reader.path, ns=(0, 0))
    assert reader.signature() != before
    other = tensor.clone()
    other[4, 6, 3] += 1e-3
    assert MemoryRows(tensor).signature() == MemoryRows(tensor.clone()).signature() != MemoryRows(other).signature()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_file_that_is_gone_or_cut_short_is_named(tmp_path: Path, transposed: bool) -> None:
    reader = stored(tmp_path, values(MATRICES, torch.float32)).part(4, transposed)
    content = reader.path.read_bytes()
    reader.path.write_bytes(content[: reader.offset + 20])
    with pytest.raises(SourceError, match=r"model\.safetensors: tensor 't' is cut short"):
        reader(0, 4)
    assert reader.at_once(0, 4, chunk_buffer) is None
    reader.path.unlink()
    for read in (lambda: reader(0, 4), reader.signature):
        with pytest.raises(SourceError, match=naming("model.safetensors", "No such file")):
            read()


@pytest.mark.parametrize("dtype", ["F8_E8M0", "C64", "F4", "F6_E2M3"])
def test_a_tensor_of_a_dtype_that_is_not_read_is_there_and_refused_when_it_is_asked_for(
    tmp_path: Path, dtype: str
) -> None:
    size = {"F8_E8M0": 8, "C64": 64, "F4": 4, "F6_E2M3": 6}[dtype]
    header = json.dumps({"t": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    tensor = safetensors_tensors(tmp_path / "model.safetensors")["t"]
    assert (tensor.shape, tensor.foreign) == ((2, 4), dtype)
    with pytest.raises(SourceError, match=naming("'t'", dtype, "not supported")):
        tensor.tensor()


def test_a_reader_finds_its_file_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values((3, 4), torch.float32)
    stored(tmp_path, tensor)
    monkeypatch.chdir(tmp_path)
    reader = safetensors_tensors(Path("model.safetensors"))["t"].read_rows
    monkeypatch.chdir("/")
    assert reader(0, 3).equal(tensor)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3 * LARGE)), min_size=1, max_size=8))
@settings(max_examples=20)
def test_scratch_memory_is_used_again_for_the_same_purpose_only(takes: list[tuple[str, int]]) -> None:
    made: list[int] = []

    def allocate(size: int) -> bytearray:
        made.append(size)
        return bytearray(size)

    scratch = Scratch(allocate)
    most = {"a": 0, "b": 0}
    grown = 0
    for purpose, size in takes:
        taken = scratch.take(purpose, size)
        assert len(taken) == size
        taken[0] = taken[-1] = ord(purpose)
        grown += size > most[purpose]
        most[purpose] = max(most[purpose], size)
    assert len(made) == grown
    for purpose in dict(takes):
        assert scratch.take(purpose, 1)[0] == ord(purpose)
