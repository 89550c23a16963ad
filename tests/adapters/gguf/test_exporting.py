"""Plans as GGUF files: the package gguf reads what the plan says, all else to the byte; what no file holds is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_plugins import GGML, Affine, MismatchError, Plan, SettingError, SourceError, Uniform, VerifyError, measure
from mpq_plugins.adapters import gguf as adapter
from mpq_plugins.adapters.gguf.blocks import BlockCodes, packed, unpacked
from mpq_plugins.checkpoints.gguf_header import read_gguf
from mpq_plugins.plans.ggml import TYPES
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.simulation.integers import integer_weight
from tests.conftest import Ran
from tests.helpers.ggufs import SHAPES, read_back, tiny, values, write_gguf

Mpq = Callable[..., Ran]
LAYERS = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) > 1]
FLOAT = {name.replace(".", "__"): {"bits": 32} for name in LAYERS}
PLAIN: dict[tuple[Any, int], str] = {
    (True, 4): "q4_0",
    (True, 5): "q5_0",
    (True, 8): "q8_0",
    (False, 4): "q4_1",
    (False, 5): "q5_1",
}
PLAIN |= {("full", bits): kind for (symmetric, bits), kind in PLAIN.items() if symmetric}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "net.gguf", tiny())


def planned(source: Path, scheme: Any, bits: int, **options: Any) -> Plan:
    return Uniform(bits=bits)(measure(source, scheme, bits=(bits,), **options))


def with_choices(plan: Plan, **changes: dict[str, Any]) -> Plan:
    """The plan with other schemes and bits for some layers; `__` for a dot."""
    named = {name.replace("__", "."): change for name, change in changes.items()}
    layers = tuple(LayerChoice.model_validate({**dict(layer), **named.get(layer.name, {})}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


def weight(name: str) -> torch.Tensor:
    return torch.from_numpy(tiny()[f"{name}.weight"])


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "nvfp4"])
def test_a_type_is_what_the_file_holds(file: Path, tmp_path: Path, kind: Any) -> None:
    scheme = GGML(type=kind)
    plan = planned(file, scheme, scheme.bits)
    seen: list[tuple[str, int, int]] = []
    exported = adapter.export(file, plan, tmp_path / "out.gguf", progress=lambda *told: seen.append(told))
    found = read_back(exported.path)
    for name in LAYERS:
        held, rows = found[f"{name}.weight"]
        assert held == kind
        assert rows.tobytes() == fake_quantize(weight(name), scheme.bits, scheme).numpy().tobytes()
    checks = adapter.verify(exported.path, plan, file)
    assert [(check.layer, check.stored) for check in checks] == [(name, kind) for name in LAYERS]
    assert exported.layers == len(LAYERS)
    assert exported.layer_bytes * 8 == plan.size().total_bits
    assert exported.total_bytes == exported.layer_bytes + 3 * 64 * 4
    assert seen[-1][1] == seen[-1][2] == sum(layer.numel for layer in plan.layers)


@pytest.mark.parametrize(("symmetric", "bits"), list(PLAIN))
@pytest.mark.parametrize("group", [None, 32, 64])
def test_the_plans_codes_come_out_with_scales_of_half_precision(
    file: Path, tmp_path: Path, symmetric: Any, bits: int, group: int | None
) -> None:
    scheme = Affine(
        symmetric=symmetric, granularity="per_group" if group else "per_channel", group_size=group, range="mse"
    )
    plan = planned(file, scheme, bits)
    exported = adapter.export(file, plan, tmp_path / "out.gguf")
    assert any("half precision" in note for note in exported.notes)
    found = read_back(exported.path)
    for layer in plan.layers:
        held, rows = found[f"{layer.name}.weight"]
        assert held == PLAIN[symmetric, bits]
        exact = integer_weight(weight(layer.name), layer)
        scale = (
            exact.scale.numpy().astype(np.float16).astype(np.float32).repeat(layer.shape[1] // exact.scale.shape[1], 1)
        )
        zero = exact.zero_point.numpy().repeat(layer.shape[1] // exact.scale.shape[1], 1)
        shift = 0 if symmetric else 2 ** (bits - 1)
        minimum = (-(zero + shift) * scale).astype(np.float16).astype(np.float32)
        assert np.array_equal(rows, (exact.codes.numpy() + shift) * scale + (0 if symmetric else minimum))
        step = exact.scale.numpy().max()
        assert np.abs(rows - exact.dequantized().numpy()).max() <= step * 2**bits * 2.0**-10
    assert {check.stored for check in adapter.verify(exported.path, plan, file)} == {PLAIN[symmetric, bits]}


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_blocks_of_codes_mean_what_the_package_reads(kind: str, data: st.DataObject) -> None:
    top = 255 if kind == "q8_0" else 31 if "5" in kind else 15
    codes = np.array(data.draw(st.lists(st.integers(0, top), min_size=64, max_size=64)), np.uint8).reshape(2, 32)
    halves = st.floats(-8, 8, width=16)
    scale, minimum = (np.array([data.draw(halves), data.draw(halves)], np.float16) for _ in range(2))
    blocks = BlockCodes(codes, scale, minimum if kind.endswith("_1") else None)
    bytes_of = packed(blocks, kind)
    assert bytes_of.shape == (2, TYPES[kind].size)
    assert unpacked(bytes_of, kind).same_as(blocks)
    whole = codes.view(np.int8).astype(np.float32) if kind == "q8_0" else codes.astype(np.float32)
    offset = {"q4_0": 8, "q5_0": 16}.get(kind, 0)
    expected = (whole - offset) * scale.astype(np.float32)[:, None]
    if blocks.minimum is not None:
        expected += minimum.astype(np.float32)[:, None]
    assert np.array_equal(gguf.quants.dequantize(bytes_of, gguf.GGMLQuantizationType[kind.upper()]), expected)


def test_a_mix_of_types_float_and_what_is_skipped(file: Path, tmp_path: Path) -> None:
    plan = with_choices(
        planned(file, GGML(type="q8_0"), 8, skip=["token_embd"]),
        blk__0__attn_q={"scheme": GGML(type="q5_0"), "bits": 5},
        blk__0__ffn_down={"scheme": GGML(type="q4_k"), "bits": 4},
        blk__0__attn_k={"bits": 16}, blk__0__attn_v={"bits": 32},
        blk__0__ffn_up={"scheme": Affine(symmetric=True, granularity="per_group", group_size=32), "bits": 4},
    )  # fmt: skip
    exported = adapter.export(file, plan, tmp_path / "out.gguf")
    found = {
        name.removeprefix("blk.0.").removesuffix(".weight"): held for name, held in read_back(exported.path).items()
    }
    assert {name: kind for name, (kind, _) in found.items() if not name.endswith("norm")} == {
        "token_embd": "f32", "attn_q": "q5_0", "attn_k": "f16", "attn_v": "f32", "attn_output": "q8_0",
        "ffn_gate": "q8_0", "ffn_up": "q4_0", "ffn_down": "q4_k",
    }  # fmt: skip
    assert found["token_embd"][1].tobytes() == tiny()["token_embd.weight"].tobytes()
    assert found["attn_k"][1].tobytes() == tiny()["blk.0.attn_k.weight"].astype(np.float16).astype(np.float32).tobytes()
    assert len(adapter.verify(exported.path, plan, file)) == exported.layers == 5


def test_metadata_and_order_are_the_sources(file: Path, tmp_path: Path) -> None:
    adapter.export(file, planned(file, GGML(type="q8_0"), 8), tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(file), gguf.GGUFReader(tmp_path / "out.gguf")
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    assert set(before.fields) - set(after.fields) == {"general.file_type"}
    assert set(after.fields) - set(before.fields) == {"general.quantization_version"}
    for key, field in before.fields.items():
        if key in after.fields and not key.startswith("GGUF."):
            assert after.fields[key].contents() == field.contents()
    assert all(t.data_offset % 32 == 0 for t in after.tensors)


def test_tensors_quantized_already_are_copied_or_made_anew(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny(), {"blk.0.attn_q.weight": "q4_1", "blk.0.attn_v.weight": "q5_0"})
    plan = planned(path, GGML(type="q8_0"), 8, skip=["blk.0.attn_v"])
    exported = adapter.export(path, plan, tmp_path / "out.gguf")
    assert any("quantized already" in note for note in exported.notes)
    before, after = read_back(path), read_back(exported.path)
    assert after["blk.0.attn_v.weight"][0] == "q5_0"
    assert after["blk.0.attn_v.weight"][1].tobytes() == before["blk.0.attn_v.weight"][1].tobytes()
    assert after["blk.0.attn_q.weight"][0] == "q8_0"
    assert np.abs(after["blk.0.attn_q.weight"][1] - before["blk.0.attn_q.weight"][1]).max() < 0.002


def moe(path: Path) -> Path:
    stacks = {f"blk.0.ffn_{part}_exps.weight": values((3, 32, 64), seed) for seed, part in enumerate(("gate", "up"))}
    return write_gguf(path, tiny() | stacks)


def test_experts_are_one_tensor_of_one_type(tmp_path: Path) -> None:
    path = moe(tmp_path / "moe.gguf")
    plan = planned(path, GGML(type="q4_0"), 4)
    exported = adapter.export(path, plan, tmp_path / "out.gguf")
    kind, experts = read_back(exported.path)["blk.0.ffn_up_exps.weight"]
    assert kind == "q4_0"
    wanted = [fake_quantize(torch.from_numpy(one), 4, GGML(type="q4_0")).numpy() for one in values((3, 32, 64), 1)]
    assert np.array_equal(experts, np.stack(wanted))
    assert len(adapter.verify(exported.path, plan, path)) == len(LAYERS) + 6
    odd = with_choices(plan, blk__0__ffn_up_exps__1={"scheme": GGML(type="q8_0"), "bits": 8})
    with pytest.raises(
        SettingError, match=r"'blk.0.ffn_up_exps' are one tensor of one type.*q4_0, q8_0.*--tie experts"
    ):
        adapter.check(odd, path)


def hugging_face(plan: Plan) -> Plan:
    """The plan by transformers' names."""
    names = {"token_embd": "model.embed_tokens", "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
             "blk.0.ffn_up": "model.layers.0.mlp.up_proj", "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
             "blk.0.attn_output": "model.layers.0.self_attn.o_proj"}  # fmt: skip
    names |= {f"blk.0.attn_{one}": f"model.layers.0.self_attn.{one}_proj" for one in "qkv"}
    return plan.renamed(names)


def test_a_plan_in_transformers_names_is_mapped(file: Path, tmp_path: Path) -> None:
    ours = planned(file, GGML(type="q5_0"), 5, skip=["blk.0.attn_q"])
    plan = hugging_face(ours)
    assert plan.layers[0].name == "model.embed_tokens"
    assert plan.skipped == ("model.layers.0.self_attn.q_proj",)
    exported = adapter.export(file, plan, tmp_path / "out.gguf")
    assert {name: kind for name, (kind, _) in read_back(exported.path).items() if not name.endswith("norm.weight")} == {
        f"{name}.weight": "f32" if name == "blk.0.attn_q" else "q5_0" for name in LAYERS
    }
    assert [check.layer for check in adapter.verify(exported.path, plan, file)] == [
        name for name in LAYERS if name != "blk.0.attn_q"
    ]


def test_names_that_do_not_map_are_told(file: Path) -> None:
    plan = hugging_face(planned(file, GGML(type="q5_0"), 5)).renamed({"model.embed_tokens": "model.layers.0.odd_thing"})
    with pytest.raises(
        SettingError, match=r"^layer 'model.layers.0.odd_thing', one of 1 such, has no name in GGUF files"
    ):
        adapter.check(plan, file)


@pytest.mark.parametrize(
    ("scheme", "bits", "message"),
    [
        (Affine(granularity="per_channel"), 8, "layer 'token_embd': 8 bits, asymmetric .*are codes that no type"),
        (Affine(symmetric=True, granularity="per_channel"), 3, "layer 'token_embd': 3 bits, symmetric"),
        (Affine(symmetric=True, granularity="per_group", group_size=16), 4, "64 inputs, per_group.16., are no blocks"),
    ],
)
def test_codes_that_no_type_holds_are_refused_before_any_work(
    file: Path, tmp_path: Path, scheme: Affine, bits: int, message: str
) -> None:
    plan = planned(file, scheme, bits)
    with pytest.raises(SettingError, match=message):
        adapter.export(file, plan, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["net.gguf"]


def test_what_llama_cpp_keeps_in_float_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "net.gguf", tiny() | {"blk.0.ffn_gate_inp.weight": values((4, 64))})
    plan = planned(path, GGML(type="q4_0"), 4, only=["*"])
    with pytest.raises(
        SettingError, match=r"layer 'blk.0.ffn_gate_inp': llama.cpp keeps tensors of this name in float"
    ):
        adapter.check(plan, path)


@pytest.mark.parametrize("size", [1e9, 1e-9])
def test_a_scale_beyond_half_precision_is_an_error_and_leaves_nothing(tmp_path: Path, size: float) -> None:
    tensors = tiny()
    tensors["blk.0.attn_v.weight"] = tensors["blk.0.attn_v.weight"] * np.float32(size)
    path = write_gguf(tmp_path / "net.gguf", tensors)
    plan = planned(path, Affine(symmetric=True, granularity="per_channel"), 8)
    with pytest.raises(SettingError, match=r"layer 'blk.0.attn_v': a scale of .* is beyond half precision"):
        adapter.export(path, plan, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["net.gguf"]


def test_types_that_want_to_know_what_matters_are_noted(file: Path, tmp_path: Path) -> None:
    plan = with_choices(
        planned(file, GGML(type="q8_0"), 8), blk__0__ffn_down={"scheme": GGML(type="iq3_xxs"), "bits": 3}
    )
    notes = adapter.export(file, plan, tmp_path / "out.gguf").notes
    assert any(
        "blk.0.ffn_down.weight: of a type that llama.cpp rounds by an importance matrix" in note for note in notes
    )


@pytest.mark.parametrize(
    ("output", "message"), [("out.bin", "should end in .gguf"), ("net.gguf", "is the source itself")]
)
def test_outputs_that_cannot_be(file: Path, tmp_path: Path, output: str, message: str) -> None:
    with pytest.raises(SettingError, match=f"^output: .*{message}"):
        adapter.export(file, planned(file, GGML(type="q8_0"), 8), tmp_path / output)


def test_a_source_that_is_no_gguf_says_how_to_make_one(file: Path, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 32)}, tmp_path / "net.pt")
    with pytest.raises(
        SourceError, match=r"is no GGUF file. Convert the checkpoint, in floating.*convert_hf_to_gguf, --outtype"
    ):
        adapter.check(planned(file, GGML(type="q8_0"), 8), tmp_path / "net.pt")


def test_another_models_plan_is_refused(file: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", {"blk.0.attn_q.weight": values((64, 32))})
    with pytest.raises(MismatchError, match="the plan was made for another model"):
        adapter.check(planned(file, GGML(type="q8_0"), 8), other)


@pytest.mark.parametrize("scheme", [GGML(type="q4_0"), Affine(symmetric=True, granularity="per_channel")])
def test_every_changed_byte_of_a_tensor_is_found(file: Path, tmp_path: Path, scheme: Any) -> None:
    plan = planned(file, scheme, 4, skip=["blk.0.attn_k"])
    exported = adapter.export(file, plan, tmp_path / "out.gguf").path
    whole, header = exported.read_bytes(), read_gguf(exported)
    for entry in header.tensors:
        at = header.data_start + entry.offset
        for place in (at, at + (entry.size or 0) // 2, at + (entry.size or 0) - 1):
            exported.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(VerifyError, match=f"does not hold the plan: '{entry.name}'"):
                adapter.verify(exported, plan, file)
    exported.write_bytes(whole)
    adapter.verify(exported, plan, file)


def test_other_types_metadata_and_tensors_are_found(file: Path, tmp_path: Path) -> None:
    plan = planned(file, GGML(type="q4_0"), 4)
    tensors = tiny()
    wrong = adapter.export(file, planned(file, GGML(type="q8_0"), 8), tmp_path / "q8.gguf").path
    with pytest.raises(VerifyError, match=r"'token_embd.weight' is Q8_0 of shape .40, 64., and should be Q4_0"):
        adapter.verify(wrong, plan, file)
    with pytest.raises(VerifyError, match="its metadata is not the source's"):
        adapter.verify(write_gguf(tmp_path / "more.gguf", tensors, odd__key=3), plan, file)
    del tensors["blk.0.ffn_down.weight"]
    with pytest.raises(VerifyError, match=r"'blk\.0\.ffn_down\.weight' is missing"):
        adapter.verify(write_gguf(tmp_path / "less.gguf", tensors), with_choices(plan, **FLOAT), file)


def test_the_command_line_writes_it_and_reads_it_back(mpq: Mpq, file: Path, tmp_path: Path) -> None:
    planned(file, GGML(type="q4_0"), 4).save(tmp_path / "plan.json")
    done = mpq("export", tmp_path / "plan.json", file, "--to", "gguf", "-o", tmp_path / "out.gguf")
    assert done.code == 0, done.err
    assert f"{len(LAYERS)} layers for gguf" in done.out
    assert {kind for kind, _ in read_back(tmp_path / "out.gguf").values()} == {"q4_0", "f32"}
    refused = mpq("export", tmp_path / "plan.json", file, "--to", "gguf", "-o", tmp_path / "out.bin")
    assert refused.code == 2
    assert not (tmp_path / "out.bin").exists()
