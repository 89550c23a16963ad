"""GGUF files as sources: what the package gguf wrote is read as it reads it, and what is damaged is refused."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq_plugins import GGML, Affine, MPQError, SourceError, find_weights, measure
from mpq_plugins.checkpoints import gguf_blocks
from mpq_plugins.checkpoints.checkpoint import open_checkpoint
from mpq_plugins.checkpoints.gguf_header import read_gguf
from mpq_plugins.plans.ggml import NUMBERS
from tests.conftest import Ran
from tests.helpers.ggufs import SHAPES, read_back, tiny, values, write_gguf

Mpq = Callable[..., Ran]
KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "net.gguf", tiny())


def test_types_have_the_numbers_that_the_package_has() -> None:
    assert {kind: int(gguf.GGMLQuantizationType[kind.upper()]) for kind in NUMBERS} == NUMBERS


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_tensors_are_read_as_the_package_reads_them(tmp_path: Path, kind: str | None) -> None:
    types = {} if kind is None else {name: kind for name, shape in SHAPES.items() if len(shape) > 1}
    path = write_gguf(tmp_path / "net.gguf", tiny(), types)
    expected = read_back(path)
    stored = open_checkpoint(path)
    assert list(stored) == list(SHAPES)
    for name, tensor in stored.items():
        assert tensor.shape == SHAPES[name]
        assert tensor.tensor().numpy().tobytes() == expected[name][1].tobytes()
        part = tensor.read_rows.cut(3, 9)(1, 4)
        assert part.numpy().tobytes() == expected[name][1][4:7].tobytes()
        sent = pickle.loads(pickle.dumps(tensor.read_rows))  # noqa: S301  # what a worker is sent
        assert sent(0, 2).equal(tensor.read_rows(0, 2))


@pytest.mark.parametrize(("dtype", "kept"), [(np.float16, torch.float16), (np.float32, torch.float32)])
def test_floats_keep_their_dtype(tmp_path: Path, dtype: type, kept: torch.dtype) -> None:
    path = write_gguf(tmp_path / "net.gguf", {"blk.0.attn_q.weight": values((8, 64)).astype(dtype)})
    (weight,) = find_weights(path)
    assert weight.dtype == kept
    assert weight.tensor().numpy().tobytes() == values((8, 64)).astype(dtype).tobytes()


def test_bfloat16_is_read(tmp_path: Path) -> None:
    wanted = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "llama")
    writer.add_tensor("a.weight", wanted.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (weight,) = find_weights(tmp_path / "net.gguf")
    assert weight.tensor().equal(wanted)


def test_the_header_is_what_the_package_reads(file: Path) -> None:
    header, reader = read_gguf(file), gguf.GGUFReader(file)
    assert header.architecture == "llama"
    assert header.metadata["llama.block_count"] == 1
    assert [field.key for field in header.fields] == [key for key in reader.fields if not key.startswith("GGUF.")]
    assert {e.name: header.data_start + e.offset for e in header.tensors} == {
        t.name: int(t.data_offset) for t in reader.tensors
    }


def test_layers_and_roles_go_by_ggufs_names(tmp_path: Path) -> None:
    tensors = tiny() | {
        "output.weight": values((40, 64)), "blk.0.ffn_gate_inp.weight": values((4, 64)),
        "blk.0.ffn_gate_exps.weight": values((4, 32, 64)), "blk.0.ffn_down_exps.weight": values((4, 64, 32)),
        "blk.0.ssm_conv1d.weight": values((16, 4)), "blk.0.ssm_a": values((16, 4)),
    }  # fmt: skip
    path = write_gguf(tmp_path / "moe.gguf", tensors)
    found = {weight.name: weight for weight in find_weights(path)}
    assert {found[f"blk.0.ffn_gate_exps.{expert}"].shape for expert in range(4)} == {(32, 64)}
    assert {found[f"blk.0.ffn_down_exps.{expert}"].channel_axis for expert in range(4)} == {0}
    assert found["token_embd"].kind == "embedding"
    left = dict(find_weights(path).left_alone)
    assert {name for name, why in left.items() if why.startswith("role:fragile")} == {
        "blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight",
    }  # fmt: skip
    assert left["blk.0.ssm_a"] == "its name does not end in .weight"
    assert [weight.name for weight in find_weights(path, only=["role:lm_head"])] == ["output"]
    assert [weight.name for weight in find_weights(path, only=["role:embeddings"])] == ["token_embd"]
    assert [weight.name for weight in find_weights(path, only=["role:fragile"])] == [
        "blk.0.ffn_gate_inp", "blk.0.ssm_conv1d",
    ]  # fmt: skip


def test_an_embedding_without_a_head_is_the_head(file: Path) -> None:
    assert [weight.name for weight in find_weights(file, only=["role:lm_head"])] == ["token_embd"]


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_weights_on_a_types_grid_lose_nothing_under_it(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny(), {name: kind for name in SHAPES if len(SHAPES[name]) > 1})
    scheme = GGML(type=kind)  # type: ignore[arg-type]
    table = measure(path, scheme, bits=(scheme.bits,), metrics=("mse", "max_abs"))
    scale = max(np.abs(array).max() for array in tiny().values())
    for layer in table.layers:
        assert table.error(layer, "max_abs", scheme.bits) < 1e-3 * scale
    finer = measure(path, Affine(granularity="per_channel"), bits=(3,))
    assert all(layer.errors["relative"][0] > 0.01 for layer in finer.layers)


def test_what_is_left_counts_as_it_is_stored(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny(), {"token_embd.weight": "q8_0"})
    table = measure(path, Affine(granularity="per_channel"), bits=(4,), skip=["token_embd"])
    assert table.rest_bytes == 40 * 64 // 32 * 34 + 3 * 64 * 4


def test_the_command_line_plans_it_and_says_what_is_rounded_already(mpq: Mpq, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny(), {"blk.0.attn_q.weight": "q4_1", "token_embd.weight": "q8_0"})
    done = mpq("plan", path, "--bits", "4", "-a", "uniform", "-o", tmp_path / "plan.json")
    assert done.code == 0, done.err
    assert "2 tensors are quantized already (1 in q8_0, 1 in q4_1)" in " ".join(done.err.split())
    refused = mpq("apply", path, tmp_path / "plan.json", "-o", tmp_path / "out.gguf")
    assert refused.code == 2
    assert f"mpq export PLAN {path} --to gguf" in " ".join(refused.err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.gguf", "plan.json"]


def test_a_part_of_several_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "net-00001-of-00003.gguf", tiny(), split__count=3)
    with pytest.raises(SourceError, match="one of 3 parts of a model; join them first: llama-gguf-split --merge"):
        find_weights(path)


def test_types_that_nobody_reads_are_left_alone(tmp_path: Path, file: Path) -> None:
    data = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (0,)
    struct.pack_into("<I", data, at, 41)  # Q1_0
    file.write_bytes(data)
    assert dict(find_weights(file).left_alone) == {"blk.0.attn_q.weight": "dtype ggml type 41"}


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny(), {"blk.0.attn_q.weight": "q4_1"})
    monkeypatch.setattr(gguf_blocks, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"tensor 'blk.0.attn_q.weight' is q4_1; .*needs gguf.*\[gguf\]"):
        measure(path, bits=(4,))
    assert len(measure(path, bits=(4,), skip=["blk.0.attn_q"]).layers) == 7  # float ones need no package


@pytest.mark.parametrize("at", ["header", "tensors"])
def test_a_file_that_is_cut_short_is_refused(file: Path, at: str) -> None:
    whole, start = file.read_bytes(), read_gguf(file).data_start
    for length in range(4, start, 7) if at == "header" else range(start, len(whole), 40_000):
        file.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"damaged GGUF file|a GGUF file"):
            find_weights(file)


@given(position=st.floats(0, 1), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_of_the_header_is_an_error_or_another_header(file: Path, position: float, byte: int) -> None:
    whole = file.read_bytes()
    at = int(position * (read_gguf(file).data_start - 1))
    changed = file.with_name("changed.gguf")
    changed.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    try:
        for weight in find_weights(changed, refuse=False):
            weight.tensor()
    except MPQError:
        return
