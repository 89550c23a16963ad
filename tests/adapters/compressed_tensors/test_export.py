"""Checkpoints that compressed-tensors' own code, inside transformers, loads as the plan's weights to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpq_plugins import (
    Affine,
    MismatchError,
    Plan,
    SettingError,
    SourceError,
    VerifyError,
    WeightError,
    apply,
    legalise,
)
from tests.adapters.llamas import CHANNELS, FULL, GROUPS, fused_bits, load, logits, plan_of, save_llama

transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("mpq_plugins.adapters.compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is its own

ALIKE = fused_bits(4, 8, 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    plan = plan_of(source, GROUPS, ALIKE)
    output = tmp_path_factory.mktemp("exported") / "out"
    compressed_tensors.export(source, plan, output)
    return output, plan


def weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)


def same_as_applied(source: Path, plan: Plan, output: Path) -> None:
    planned, found = apply(load(source), plan), load(output)
    expected = logits(planned)
    assert torch.equal(logits(found), expected)  # which also decodes what is decoded when it first runs
    for layer in plan.layers:
        assert torch.equal(weight(found, layer.name), weight(planned, layer.name)), layer.name
    assert not torch.equal(expected, logits(load(source)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [GROUPS, CHANNELS, Affine(symmetric=True), replace(GROUPS, range="mse"), FULL], ids=str
)
def test_transformers_loads_symmetric_plans_as_apply_makes_them(source: Path, tmp_path: Path, scheme: Affine) -> None:
    plan = plan_of(source, scheme, lambda place, _: range(1, 9)[place % 8])
    written = compressed_tensors.export(source, plan, tmp_path / "out", runtime="transformers")
    assert len(compressed_tensors.verify(written.path, plan, source)) == written.layers == 14
    same_as_applied(source, plan, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_zero_points_take_a_byte_a_weight_for_transformers(source: Path, tmp_path: Path, granularity: Any) -> None:
    scheme = Affine(granularity=granularity, group_size=32 if granularity == "per_group" else None)
    plan = plan_of(source, scheme, lambda place, _: range(1, 9)[place % 8])
    written = compressed_tensors.export(source, plan, tmp_path / "out", runtime="transformers")
    assert "12 asymmetric layers take one byte" in " ".join(written.notes)
    compressed_tensors.verify(tmp_path / "out", plan, source)
    same_as_applied(source, plan, tmp_path / "out")


def test_packed_sizes_are_the_plans(exported: tuple[Path, Plan]) -> None:
    output, plan = exported
    tensors = load_file(output / "model.safetensors")
    for layer in plan.layers:
        assert 8 * tensors[f"{layer.name}.weight_packed"].nbytes == layer.code_bits


def test_the_configuration_names_every_layer(exported: tuple[Path, Plan], source: Path) -> None:
    output, plan = exported
    config = json.loads((output / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    groups = quantization["config_groups"].values()
    widths = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    assert widths == {layer.name: layer.bits for layer in plan.layers}
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["version"]
    assert (output / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_layers_in_float_are_ignored_by_name_and_at_16_bits_in_float16(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, lambda _, name: 16 if ".0." in name else 32 if "down" in name else 4)
    compressed_tensors.export(source, plan, tmp_path / "out")
    compressed_tensors.verify(tmp_path / "out", plan, source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {layer.name for layer in plan.layers if layer.in_float} | {"lm_head"} == {*config["ignore"]}
    same_as_applied(source, plan, tmp_path / "out")


def test_a_tied_head_is_ignored_though_the_file_has_none(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", tie_word_embeddings=True)
    plan = plan_of(source, GROUPS, ALIKE)
    compressed_tensors.export(source, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    same_as_applied(source, plan, tmp_path / "out")


def test_scales_that_the_models_dtype_does_not_hold_are_kept_in_float32_and_said(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", torch.bfloat16)
    plan = plan_of(source, GROUPS, ALIKE)
    written = compressed_tensors.export(source, plan, tmp_path / "out")
    compressed_tensors.verify(tmp_path / "out", plan, source)
    scales = {t.dtype for name, t in load_file(tmp_path / "out/model.safetensors").items() if name.endswith("_scale")}
    assert scales == {torch.float32}
    assert any("scales of 14 layers are in float32" in note for note in written.notes)


def test_what_vllm_fuses_must_agree_and_the_tie_is_named(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, lambda _, name: 3 if "k_proj" in name else 8 if "gate" in name else 4)
    with pytest.raises(SettingError, match=r"at 3 bits.* and 3 others alike. Plan with --tie qkv --tie gate_up"):
        compressed_tensors.export(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressed_tensors.check(plan, source, runtime="transformers")
    partly = plan_of(source, GROUPS, lambda _, name: 32 if "k_proj" in name else 4)
    with pytest.raises(SettingError, match=r"k_proj' in float.*--tie qkv"):
        compressed_tensors.check(partly, source)


def test_zero_points_are_refused_for_vllm_with_both_remedies(source: Path) -> None:
    plan = plan_of(source, Affine(granularity="per_channel"), ALIKE)
    with pytest.raises(SettingError, match=r"one of 14 such, has zero points.*--symmetric, or.* transformers"):
        compressed_tensors.check(plan, source)
    legal, changes = legalise(plan, compressed_tensors.CAPABILITIES)
    assert len(changes) == 14
    compressed_tensors.check(legal, source)


def test_embeddings_stay_in_float(source: Path) -> None:
    plan = plan_of(source, GROUPS, 4, skip=())
    with pytest.raises(SettingError, match=r"'model.embed_tokens'.*does not quantize embedding layers"):
        compressed_tensors.check(plan, source)
    legal, _ = legalise(plan, compressed_tensors.CAPABILITIES)
    compressed_tensors.check(legal, source)


def test_a_packed_head_is_said_for_vllm(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, 4, skip=("role:embeddings",))
    for runtime in compressed_tensors.RUNTIMES:
        written = compressed_tensors.export(source, plan, tmp_path / runtime, runtime=runtime)
        assert any("'lm_head' is packed" in note for note in written.notes) == (runtime == "vllm")
    same_as_applied(source, plan, tmp_path / "transformers")


@pytest.mark.parametrize("runtime", ["llama.cpp", "", 3])
def test_other_runtimes_are_refused(source: Path, runtime: Any) -> None:
    with pytest.raises(SettingError, match=r"runtime: .* is not allowed; vllm, transformers"):
        compressed_tensors.check(plan_of(source), source, runtime=runtime)


def test_sources_and_plans_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, ALIKE)
    with pytest.raises(SourceError, match=r"no directory.*tokenizer"):
        compressed_tensors.check(plan, source / "model.safetensors")
    other = save_llama(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(MismatchError, match="another model"):
        compressed_tensors.check(plan, other)
    (other / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config.json: cannot be read"):
        compressed_tensors.check(plan, other)
    with pytest.raises(SettingError, match="no Plan"):
        compressed_tensors.check("plan.json", source)


def test_what_is_quantized_already_is_refused(exported: tuple[Path, Plan], tmp_path: Path) -> None:
    output, plan = exported
    with pytest.raises(SourceError, match="'quantization_config', so the checkpoint is quantized already"):
        compressed_tensors.export(output, plan, tmp_path / "out")


@pytest.mark.parametrize("where", ["itself", "inside", "full", "file"])
def test_outputs_that_are_in_the_way_are_refused(source: Path, tmp_path: Path, where: str) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "kept").write_text("kept")
    file.write_text("kept")
    output = {"itself": source, "inside": source / "out", "full": full, "file": file}[where]
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(SettingError, match="output: "):
        compressed_tensors.export(source, plan_of(source, GROUPS, ALIKE), output)
    assert (full / "kept").read_text() == file.read_text() == "kept"
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_weight_that_cannot_be_quantized_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, ALIKE)
    broken = save_llama(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"model.layers.1.mlp.up_proj"):
        compressed_tensors.export(broken, plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def damaged(kind: str, output: Path, to: Path) -> Path:
    to.mkdir()
    for path in output.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(to / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if kind == "code":
        tensors[f"{name}_packed"][1, 1] ^= 1
    elif kind == "scale":
        tensors[f"{name}_scale"][1, 1] *= 1.0000001
    elif kind == "float":
        tensors["model.norm.weight"][1] += 1e-7
    elif kind == "missing":
        del tensors[f"{name}_packed"]
    elif kind == "shape":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:, :1].clone()
    elif kind == "extra":
        tensors["lm_head.weight_scale"] = torch.ones(2)
    elif kind == "config":
        (to / "config.json").write_text((to / "config.json").read_text().replace('"num_bits": 3', '"num_bits": 2'))
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "'model.layers.0.self_attn.q_proj' has 1 of 4096 codes that are not the plan's"),
        ("scale", "'model.layers.0.self_attn.q_proj' has other scales"),
        ("float", "'model.norm.weight' is not the model's own"),
        ("missing", "'model.layers.0.self_attn.q_proj.weight_packed' is missing"),
        ("shape", r"q_proj.weight_scale' is torch.float32 of shape \[64, 1\], not torch.float32 of \[64, 2\]"),
        ("extra", "'lm_head.weight_scale' is no tensor of the export"),
        ("config", "config.json is not what the export writes"),
    ],
)
def test_what_does_not_hold_the_plan_is_found(
    exported: tuple[Path, Plan], source: Path, tmp_path: Path, kind: str, said: str
) -> None:
    output, plan = exported
    compressed_tensors.verify(output, plan, source)
    with pytest.raises(VerifyError, match=said):
        compressed_tensors.verify(damaged(kind, output, tmp_path / "damaged"), plan, source)
