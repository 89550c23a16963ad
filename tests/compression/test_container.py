"""The file: whatever is in it comes back, and whatever is wrong with it is said."""

import json
import lzma
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Codebook, Container, Plan, compress, decompress
from mpq_plugins.compression import container
from mpq_plugins.compression.header import CHECKSUM, FIELDS, FILTERS, PROLOGUE, VERSION
from mpq_plugins.errors import FormatError
from tests.helpers.plans import with_layer

Document = dict[str, Any]


def small(folder: Path, scheme: "Affine | Codebook | None" = None, kept: float = 0.1) -> Path:
    """A container of about a kilobyte: a pruned layer, one in float, biases, BatchNorm's statistics and a scalar."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.rand(6, 40) < kept)  # type: ignore[operator]
    plan = mpq.Uniform(bits=3)(mpq.measure(net, scheme or Affine(granularity="per_channel"), bits=(3,)))
    compress(net, with_layer(plan, "2", bits=16), folder / "small.mpq")
    return folder / "small.mpq"


def header_of(path: Path) -> Document:
    data = path.read_bytes()
    _, _, start, length, _, _ = FIELDS.unpack(data[: FIELDS.size])
    document: Document = json.loads(lzma.decompress(data[start : start + length], lzma.FORMAT_RAW, filters=FILTERS))
    return document


def with_header(path: Path, change: Callable[[Document], object]) -> Path:
    """The same file with another header, all checksums right."""
    document = header_of(path)
    change(document)
    data = path.read_bytes()
    start = FIELDS.unpack(data[: FIELDS.size])[2]
    text = json.dumps(document).encode()
    packed = lzma.compress(text, lzma.FORMAT_RAW, filters=FILTERS)
    fields = FIELDS.pack(data[:8], VERSION, start, len(packed), len(text), zlib.crc32(packed))
    path.write_bytes(fields + CHECKSUM.pack(zlib.crc32(fields)) + data[PROLOGUE:start] + packed)
    return path


def with_prologue(path: Path, **changes: int) -> Path:
    """The same file with other numbers in front, their checksum right."""
    names = ("magic", "version", "start", "length", "document_length", "checksum")
    data = path.read_bytes()
    values = dict(zip(names, FIELDS.unpack(data[: FIELDS.size]), strict=True)) | changes
    fields = FIELDS.pack(*values.values())
    path.write_bytes(fields + CHECKSUM.pack(zlib.crc32(fields)) + data[PROLOGUE:])
    return path


def read(path: Path) -> None:
    """All there is to read."""
    opened = Container.open(path)
    opened.check()
    opened.tensors()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "kept", "uses"),
    [(Affine(granularity="per_channel"), 0.1, "raw packed gaps"), (Codebook(), 0.4, "raw huffman")],
    ids=str,
)
def test_every_flip_of_a_byte_is_found(tmp_path: Path, scheme: "Affine | Codebook", kept: float, uses: str) -> None:
    path = small(tmp_path, scheme, kept)
    whole = path.read_bytes()
    assert len(whole) < 2000
    assert set(uses.split()) <= set(json.dumps(header_of(path)["tensors"]).split('"'))
    for position in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=str(path)):
                read(path)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_any_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "small.mpq"
    whole = path.read_bytes() if path.exists() else small(tmp_path).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for content in (bytes(damaged[:cut]), bytes(damaged), bytes(damaged) + b"\0"):
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(FormatError):
            read(path)
    path.write_bytes(whole)
    read(path)


def test_every_way_to_cut_it_short_is_found(tmp_path: Path) -> None:
    path = small(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut short|no container"):
            read(path)


def set_tensor(which: str, **values: object) -> Callable[[Document], object]:
    def change(document: Document) -> None:
        next(t for t in document["tensors"] if t["name"] == which).update(values)

    return change


def plan_of(document: Document) -> Document:
    plan: Document = document["plan"]
    return plan


def layer_shape(document: Document, shape: list[int], parts: bool = False, channels: str = "") -> None:
    layer = plan_of(document)["layers"][0]
    layer.update(shape=shape, numel=math.prod(shape))
    if parts or channels:
        del layer["bits"]
        layer["parts"] = [{"bits": 3, "channels": channels or "0"}]


def deep(levels: int) -> Document:
    found: Document = {}
    for _ in range(levels):
        found = {"x": found}
    return found


def stacked(document: Document, *members: str, same: bool = False) -> None:
    """Some tensors renamed to be a stack's."""
    for position, name in enumerate(members):
        next(t for t in document["tensors"] if t["name"] == name)["name"] = f"e.{position}"
    document["stacks"] = {"e": len(members)}
    if same:
        document["tensors"].append({"name": "z", "same": "e.0"})


def part_of(document: Document) -> Document:
    part: Document = document["tensors"][0]["parts"][0]
    return part


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["plan"]["layers"][0].update(shape=[10**6, 10**6], numel=10**12), r"claims 1000000000000 values"),
        (set_tensor("0.bias", shape=[10**13]), r"'0.bias': claims 10000000000000 values, which cannot come out of"),
        (set_tensor("0.bias", shape=[10**400]), "header: "),
        (set_tensor("0.bias", data=["raw", 10**12]), "do not add up"),
        (set_tensor("0.bias", data=["raw", -1]), "header: tensors"),
        (set_tensor("0.bias", data=["zip", 24]), "header: tensors"),
        (set_tensor("0.bias", shape=[5]), r"tensor '0.bias': 24 bytes raw, not the 20 raw"),
        (set_tensor("0.bias", shape=[2, 3], dtype="F99"), "dtype 'F99' is not allowed"),
        (set_tensor("0.bias", name="0.weight"), "two tensors have the same name"),
        (set_tensor("0.bias", same="0.weight"), "do not add up"),
        (set_tensor("0.bias", data=None), "do not add up"),
        (set_tensor("0.weight", parts=None, data=["raw", 1]), "do not add up"),
        (set_tensor("0.weight", name="x.weight"), "'x.weight': is coded, and its plan has no such layer"),
        (set_tensor("2.weight", name="0.weight"), "two tensors have the same name"),
        (set_tensor("0.weight", dtype="I64x"), "dtype 'I64x'"),
        (lambda d: plan_of(d).update(version=99), "plan version 99"),
        (lambda d: plan_of(d).update(format="x"), "its plan: not a plan"),
        (lambda d: plan_of(d)["layers"][0].update(bits=4), "tables|codes|zero points"),
        (lambda d: plan_of(d)["layers"][0].update(bits=32), "has codes where its plan has floating point"),
        (lambda d: plan_of(d)["layers"][1].update(bits=4), "has codes where its plan has floating point, or the other"),
        (lambda d: plan_of(d)["layers"][0].update(scheme={"name": "codebook"}), "tables: |has zero points"),
        (lambda d: plan_of(d)["layers"].append(dict(plan_of(d)["layers"][0], name="y")), "lacks layers .*: 'y'"),
        (lambda d: d.update(stacks={"e": 3}), "tensor 'e': stacks 3 others, which are not all there"),
        (lambda d: d.update(joined=["e"]), "tensor 'e': is joined, and no stack of matrices"),
        (lambda d: d.update(stacks={"e": 10**15}), "tensor 'e': stacks"),
        (lambda d: d.update(extra=1), "header: extra"),
        (set_tensor("0.weight", dtype="I64"), "dtype 'I64' is not allowed for a layer"),
        (set_tensor("0.weight", dtype="F64"), "dtype 'F64' is not allowed for a layer"),
        (set_tensor("0.weight", shape=[6, 40]), "has a shape that others say"),
        (set_tensor("0.bias", name="__metadata__"), "safetensors files keep that name"),
        (set_tensor("0.bias", name="\ud800"), "its name is no text|header is none"),
        (set_tensor("0.bias", shape=[0, 10**12, 10**12]), "has a shape beyond any memory"),
        (lambda d: layer_shape(d, [10**12, 0]), "output channels"),
        (lambda d: layer_shape(d, [0, 10**12, 10**12]), "is beyond any memory"),
        (lambda d: layer_shape(d, [0, 10**30]), "is beyond any memory"),
        (lambda d: layer_shape(d, [10**12, 0], parts=True), "output channels"),
        (
            lambda d: layer_shape(d, [6, 40], channels=",".join(["0-16777214"] * 300)),
            "is no channel or run of channels that ascend|parts must cover",
        ),
        (
            lambda d: plan_of(d)["allocator"].update(parameters=deep(400)),
            "its header is none .nested more than 64 deep",
        ),
        (lambda d: d.update(stacks={"0": 1}), "stacks 1 others, which are not all there"),
        (lambda d: stacked(d, "1.weight", "1.running_mean"), None),
        (lambda d: stacked(d, "1.weight", "1.num_batches_tracked"), "stacks tensors of different shapes or dtypes"),
        (lambda d: d["tensors"].append({"name": "z", "same": "z"}), "is the same as 'z', which is not there"),
        (lambda d: d["tensors"].append({"name": "z", "same": "0.bias", "shape": [6]}), "has a shape that others say"),
        (lambda d: stacked(d, "1.weight", "1.bias", same=True), "is the same as 'e.0', which is not there"),
        (lambda d: part_of(d).pop("entries"), "has gaps without entries"),
        (lambda d: part_of(d).update(entries=3), "gaps: |codes: "),
        (lambda d: part_of(d).update(entries=10**15), "gaps: "),
        (lambda d: d.pop("tensors"), "header: tensors"),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, change: Callable[[Document], object], message: str | None
) -> None:
    path = with_header(small(tmp_path), change)
    if message is None:  # odd, and true
        read(path)
        return
    with pytest.raises(FormatError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "container version 3, and this mpq-plugins reads 1 to 2. Upgrade"),
        ({"version": 0}, "container version 0"),
        ({"start": 10**18}, "has .* bytes, and should have 1000000000000000"),
        ({"length": 10**18}, "and should have"),
        ({"start": 3}, "and should have"),
        ({"document_length": 10**18}, "its header claims 1000000000000000000 bytes"),
        ({"document_length": 7}, "its header is none|not as long as it says"),
        ({"document_length": 10**6}, "its header is not as long as it says"),
        ({"checksum": 1}, "its header is damaged"),
    ],
)
def test_prologues_that_lie_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(with_prologue(small(tmp_path), **changes))


@pytest.mark.slow
def test_a_header_that_would_fill_the_memory_is_cut_off(tmp_path: Path) -> None:
    path = small(tmp_path)
    data = path.read_bytes()
    start = FIELDS.unpack(data[: FIELDS.size])[2]
    bomb = lzma.compress(b"[" * (1 << 26), lzma.FORMAT_RAW, filters=FILTERS)  # 64 MiB in 10 kB
    for claimed, message in (
        (1000, "its header is none"),
        (1 << 26, "its header claims 67108864 bytes; [12][0-9]{6} is the most"),
    ):
        fields = FIELDS.pack(data[:8], VERSION, start, len(bomb), claimed, zlib.crc32(bomb))
        path.write_bytes(fields + CHECKSUM.pack(zlib.crc32(fields)) + data[PROLOGUE:start] + bomb)
        with pytest.raises(FormatError, match=message):
            Container.open(path)


def test_more_than_memory_holds_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path)

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(container, "decode", full)
    with pytest.raises(FormatError, match=r"tensor '0.weight': cannot be read .*not enough memory"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x89MPQ\r\n\x1a", b"PK\x03\x04 and so on", b"\x89MPQ\n\x1a\n" + bytes(60)]
)
def test_other_files_are_no_containers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError, match=r"no container|cut short"):
        Container.open(tmp_path / "x")
    with pytest.raises(FormatError, match="cannot read it"):
        Container.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"cannot read it .it is a directory."):
        Container.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match=r"cannot read it .it is no ordinary file."):
        Container.open(tmp_path / "pipe")


def test_what_the_documentation_says_of_the_layout(tmp_path: Path) -> None:
    path = small(tmp_path)
    data = path.read_bytes()
    magic, version, start, length, document_length, checksum, own = struct.unpack("<8sIQQQII", data[:44])
    assert (magic, version) == (b"\x89MPQ\r\n\x1a\n", 2)
    assert zlib.crc32(data[:40]) == own
    assert start + length == len(data)
    assert zlib.crc32(data[start:]) == checksum
    position = 44
    for record in Container.open(path).header.tensors:
        block = data[position : position + record.block_bytes]
        assert zlib.crc32(block[:-4]) == int.from_bytes(block[-4:], "little")
        position += record.block_bytes
    assert position == start
    text = lzma.decompress(data[start:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}])
    assert len(text) == document_length
    assert Plan.from_document(json.loads(text)["plan"], "x") == Container.open(path).plan


def test_version_1_kept_layers_at_16_bits_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    compress(net, with_layer(plan, "1", bits=32), tmp_path / "old.mpq")

    def as_it_was(document: Document) -> None:
        document["plan"]["layers"][1]["bits"] = 16

    found = decompress(with_prologue(with_header(tmp_path / "old.mpq", as_it_was), version=1))
    assert found["1.weight"].dtype == torch.float32
    assert found["1.weight"].equal(net[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("coding", ["smallest", "packed"])
def test_a_layer_at_16_bits_takes_2_bytes_a_weight(tmp_path: Path, coding: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 3))
    plan = with_layer(mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,))), "0", bits=16)
    written = compress(net, plan, tmp_path / "x.mpq", coding=coding)
    record = written.records["0.weight"]
    assert sum(length for _, length in record.streams) <= 2 * 2400
    found = decompress(written)
    assert found["0.weight"].dtype == torch.float16
    assert found["0.weight"].equal(net[0].weight.half())  # type: ignore[arg-type]
    again = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 3))
    again.load_state_dict(found)
    mpq.verify(again, plan, original=net)


def test_half_of_a_layer_takes_half_the_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60))
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    parts = ({"bits": 16, "channels": tuple(range(30))}, {"bits": 32, "channels": tuple(range(30, 60))})
    written = compress(net, with_layer(plan, "0", bits=None, parts=parts), tmp_path / "x.mpq", coding="packed")
    assert [length for _, length in written.records["0.weight"].streams] == [2 * 1200, 4 * 1200]
    found = decompress(written)["0.weight"]
    assert found.dtype == torch.float32
    assert found[:30].equal(net[0].weight[:30].half().float())  # type: ignore[index]
    assert found[30:].equal(net[0].weight[30:])  # type: ignore[index]


def test_progress_goes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = decompress(small(tmp_path), progress=lambda *step: seen.append(step))
    total = sum(tensor.numel() for tensor in found.values())
    assert [name for name, _, _ in seen] == [*found, ""]
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
