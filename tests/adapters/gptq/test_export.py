"""GPTQ checkpoints against an unpacker of the test's own: word by word, as loaders of the format shift and mask."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpq_plugins import Affine, LayerChoice, Plan, SettingError, VerifyError, legalise
from mpq_plugins.adapters import gptq
from mpq_plugins.simulation.layer import simulate_layer
from tests.adapters.llamas import CHANNELS, FULL, GROUPS, fused_bits, plan_of, save_llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is its own

WIDTHS = (2, 3, 4, 8)
ASYMMETRIC = replace(GROUPS, symmetric=False)
# Of 32 codes of three bits in three words: where each begins, those that cross from one word to the next apart.
WHOLE = [[*range(0, 30, 3)], [*range(1, 31, 3)], [*range(2, 32, 3)]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


def mixed(path: Path, scheme: Affine) -> Plan:
    return plan_of(path, scheme, lambda place, _: WIDTHS[place % 4])


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes down the columns of words (n, columns)."""
    words = words.long() & 0xFFFFFFFF
    if bits != 3:
        shifts = torch.arange(0, 32, bits).view(1, -1, 1)
        codes: Tensor = ((words[:, None] >> shifts) & (2**bits - 1)).reshape(-1, words.shape[1])
        return codes
    first, second, third = words.view(-1, 3, words.shape[1]).unbind(1)
    rows = [(first >> shift) & 7 for shift in WHOLE[0]]
    rows.append((first >> 30) & 3 | (second & 1) << 2)
    rows += [(second >> shift) & 7 for shift in WHOLE[1]]
    rows.append((second >> 31) & 1 | (third & 3) << 1)
    rows += [(third >> shift) & 7 for shift in WHOLE[2]]
    return torch.stack(rows, 1).reshape(-1, words.shape[1])


def weight(tensors: Mapping[str, Tensor], layer: LayerChoice, version: str) -> Tensor:
    assert layer.bits is not None
    of = {kind: tensors[f"{layer.name}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")}
    codes = unpacked(of["qweight"], layer.bits)
    zeros = unpacked(of["qzeros"].T.contiguous(), layer.bits).T + (version == "gptq")
    groups = of["g_idx"].long()
    return ((codes - zeros[groups]).double() * of["scales"].double()[groups]).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme", [GROUPS, ASYMMETRIC, CHANNELS, replace(CHANNELS, symmetric=False), Affine(symmetric=True), FULL], ids=str
)
def test_what_is_stored_is_the_plans_weight_within_float16_scales(
    tmp_path: Path, dtype: torch.dtype, scheme: Affine
) -> None:
    source = save_llama(tmp_path / "source", dtype)
    plan = mixed(source, scheme)
    written = gptq.export(source, plan, tmp_path / "out")
    assert len(gptq.verify(written.path, plan, source)) == written.layers == 14
    tensors, original = load_file(tmp_path / "out/model.safetensors"), load_file(source / "model.safetensors")
    section = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert section["checkpoint_format"] == ("gptq" if scheme.symmetric else "gptq_v2")
    for layer in plan.layers:
        planned = simulate_layer(original[f"{layer.name}.weight"].float(), layer).double()
        found = weight(tensors, layer, section["checkpoint_format"])
        assert torch.allclose(found, planned, rtol=2**-11, atol=0), layer.name  # half a step of float16
        assert tensors[f"{layer.name}.qweight"].nbytes * 8 == layer.code_bits
    others = {name for name in original if not name.endswith("proj.weight")}
    assert all(torch.equal(tensors[name], original[name]) for name in others)
    assert scheme.scale_dtype != "float32" or "change, at most by" in written.notes[0]


def test_scales_that_float16_holds_are_exact_and_nothing_is_said(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("proj.weight"):  # of 4 bits, symmetric: scales of 2^-6
            rounded = torch.round(value.clamp(-0.1, 0.1) * 64)
            rounded[:, ::32] = 7
            tensors[name] = rounded / 64
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = plan_of(source, GROUPS, 4)
    assert gptq.export(source, plan, tmp_path / "out").notes == ()
    written = load_file(tmp_path / "out/model.safetensors")
    for layer in plan.layers:
        assert torch.equal(weight(written, layer, "gptq"), tensors[f"{layer.name}.weight"].double())


def test_rules_are_exact_names_and_the_first_that_matches_is_the_layers(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, fused_bits(4, 8, 3))
    left = plan_of(source, GROUPS, lambda place, name: 32 if "layers.1.mlp" in name else plan.layers[place].bits or 0)
    gptq.export(source, left, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert config["lm_head"] is False

    def rule(name: str) -> tuple[str, dict[str, object]] | None:
        return next(((k[0], v) for k, v in config["dynamic"].items() if re.match(k[2:], name)), None)

    for layer in left.layers:
        expected = ("-", {}) if layer.in_float else ("+", {"bits": layer.bits, "group_size": 32, "sym": True})
        assert rule(layer.name) == expected
    assert rule("lm_head") == ("-", {})
    assert rule("model.layers.0.self_attn.qkv_proj") == ("+", {"bits": 4, "group_size": 32, "sym": True})
    assert rule("model.layers.0.mlp.gate_up_proj") == ("+", {"bits": 8, "group_size": 32, "sym": True})
    assert rule("model.layers.1.mlp.gate_up_proj") == ("-", {})
    assert rule("model.layers.10.self_attn.q_proj") is rule("xmodel.layers.0.self_attn.q_proj") is None


def test_a_fused_name_has_no_rule_where_its_parts_differ(source: Path, tmp_path: Path) -> None:
    gptq.export(source, plan_of(source, GROUPS, lambda _, name: 8 if "k_proj" in name else 4), tmp_path / "out")
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert not any("qkv_proj" in rule for rule in config["dynamic"])
    assert sum("gate_up_proj" in rule for rule in config["dynamic"]) == 2


def test_vllm_takes_4_and_8_bits_symmetric_and_fused_layers_alike(source: Path, tmp_path: Path) -> None:
    alike = plan_of(source, GROUPS, fused_bits(8, 4, 4))
    gptq.export(source, alike, tmp_path / "out", runtime="vllm")
    gptq.verify(tmp_path / "out", alike, source)
    for plan, said in (
        (plan_of(source, GROUPS, 3), "has no 3 bits, only 4, 8"),
        (plan_of(source, ASYMMETRIC, 4), "has only symmetric or full-range symmetric scales"),
        (plan_of(source, GROUPS, fused_bits(8, 4, 4)), ""),
        (plan_of(source, GROUPS, lambda _, name: 8 if "k_proj" in name else 4), "--tie qkv"),
    ):
        gptq.check(plan, source)
        if said:
            with pytest.raises(SettingError, match=said):
                gptq.check(plan, source, runtime="vllm")
    with pytest.raises(SettingError, match="runtime: 'tgi' is not allowed; gptqmodel, vllm"):
        gptq.check(alike, source, runtime="tgi")


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_widths_of_another_layout_are_refused_and_go_up(source: Path, bits: int) -> None:
    plan = plan_of(source, GROUPS, bits)
    with pytest.raises(SettingError, match=f"gptq has no {bits} bits, only 2, 3, 4, 8"):
        gptq.check(plan, source)
    legal, _ = legalise(plan, gptq.CAPABILITIES)
    assert {layer.bits for layer in legal.layers} == {2 if bits == 1 else 8}


def test_what_fills_no_words_is_refused_by_name(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", intermediate_size=72)
    gptq.check(plan_of(source, CHANNELS, 4), source)
    with pytest.raises(SettingError, match=r"gate_proj': 72 outputs are no multiple of 32, as GPTQ has it at 3 bits"):
        gptq.check(plan_of(source, CHANNELS, lambda _, name: 3 if "gate" in name else 4), source)
    with pytest.raises(SettingError, match=r"down_proj': 72 inputs are no multiple of 16, .* pin"):
        gptq.check(plan_of(source, CHANNELS, lambda _, name: 2 if "down" in name else 4), source)


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_scales_beyond_float16_are_refused_by_name(tmp_path: Path, factor: float) -> None:
    source = save_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= factor
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingError, match=r"'model.layers.1.mlp.up_proj': float16 does not hold its scales"):
        gptq.export(source, plan_of(source, GROUPS, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("qweight", "q_proj' has 1 of 4096 codes"),
        ("qzeros", "q_proj' has other zero points"),
        ("scales", "q_proj' has other scales"),
        ("g_idx", "q_proj' has inputs in other groups"),
        ("format", "config.json is not what the export writes"),
    ],
)
def test_what_does_not_hold_the_plan_is_found(source: Path, tmp_path: Path, kind: str, said: str) -> None:
    plan, output = plan_of(source, ASYMMETRIC, 4), tmp_path / "out"
    gptq.export(source, plan, output)
    tensors = load_file(output / "model.safetensors")
    if kind == "format":
        config = output / "config.json"
        config.write_text(config.read_text().replace("gptq_v2", "gptq"))
    elif kind == "scales":
        tensors["model.layers.0.self_attn.q_proj.scales"][0, 5] *= 1.01
    else:
        tensors[f"model.layers.0.self_attn.q_proj.{kind}"].view(-1)[5] ^= 1
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyError, match=said):
        gptq.verify(output, plan, source)
