"""Checkpoints that mlx-lm loads and runs packed, and what is stored against the plan's codes, unpacked bit by bit."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_plugins import Affine, LayerChoice, Plan, SettingError, VerifyError, apply, legalise
from mpq_plugins.adapters import mlx
from mpq_plugins.simulation.layer import simulate_layer
from tests.adapters.llamas import CHANNELS, FULL, GROUPS, IDS, load, logits, plan_of, save_llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and mlx-lm warn of is their own

WIDTHS = (2, 3, 4, 5, 6, 8)
ASYMMETRIC = replace(GROUPS, symmetric=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


def mixed(path: Path, scheme: Affine = GROUPS, skip: tuple[str, ...] = ()) -> Plan:
    return plan_of(path, scheme, lambda place, _: WIDTHS[place % 6], skip)


def unpacked(words: torch.Tensor, bits: int, count: int) -> np.ndarray[Any, Any]:
    """As the format is described: code i takes bits i b to (i + 1) b - 1 of a row's stream, lowest first."""
    stream = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, bitorder="little")
    codes = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    made: np.ndarray[Any, Any] = (codes << np.arange(bits)).sum(2)
    return made


def weight(tensors: Mapping[str, torch.Tensor], layer: LayerChoice) -> torch.Tensor:
    scales, biases = (tensors[f"{layer.name}.{kind}"].double() for kind in ("scales", "biases"))
    assert layer.bits is not None
    codes = torch.from_numpy(unpacked(tensors[f"{layer.name}.weight"], layer.bits, layer.shape[1])).double()
    size = layer.shape[1] // scales.shape[1]
    return scales.repeat_interleave(size, 1) * codes + biases.repeat_interleave(size, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scheme", [GROUPS, ASYMMETRIC, CHANNELS, Affine(), replace(ASYMMETRIC, group_size=64), FULL], ids=str
)
def test_what_is_stored_is_the_plans_weight(tmp_path: Path, dtype: torch.dtype, scheme: Affine) -> None:
    source = save_llama(tmp_path / "source", dtype, intermediate_size=192)
    plan = mixed(source, scheme)
    written = mlx.export(source, plan, tmp_path / "out")
    assert len(mlx.verify(written.path, plan, source)) == written.layers == 16
    tensors, original = load_file(tmp_path / "out/model.safetensors"), load_file(source / "model.safetensors")
    for layer in plan.layers:
        planned = simulate_layer(original[f"{layer.name}.weight"].float(), layer).double()
        assert torch.allclose(weight(tensors, layer), planned, rtol=0, atol=2e-7 * float(planned.abs().max()))
    others = {name for name in original if not name.endswith(("proj.weight", "tokens.weight", "head.weight"))}
    assert all(torch.equal(tensors[name], original[name]) for name in others)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [GROUPS, ASYMMETRIC, CHANNELS, FULL], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_runs_it_packed(tmp_path: Path, scheme: Affine, tied: bool) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    source = save_llama(tmp_path / "source", tie_word_embeddings=tied)
    plan = mixed(source, scheme)
    mlx.export(source, plan, tmp_path / "out")
    model, _ = utils.load_model(tmp_path / "out")
    assert type(model.model.embed_tokens).__name__ == "QuantizedEmbedding"
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "QuantizedLinear"
    found = torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))
    expected = logits(apply(load(source), plan))
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * scale
    assert float((logits(load(source)) - expected).abs().max()) > 1e-2 * scale


@pytest.mark.slow
def test_mlx_lm_takes_positions_from_either_key(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8, "rope_theta": 500000.0}  # fmt: skip
    source = save_llama(tmp_path / "source", rope_parameters=scaling, rope_theta=None)
    plan = plan_of(source, GROUPS, 8)
    mlx.export(source, plan, tmp_path / "out")
    found = utils.load_model(tmp_path / "out")[0](mx.array(IDS.numpy()))
    expected = logits(apply(load(source), plan))
    assert float((torch.from_numpy(np.array(found)) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_configuration_has_every_layer_under_both_keys(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, GROUPS, lambda place, _: WIDTHS[place % 6] if place % 4 else 32, ("role:lm_head",))
    mlx.export(source, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    layers = {name: entry for name, entry in config["quantization"].items() if not isinstance(entry, int | str)}
    coded = {layer.name: layer.bits for layer in plan.layers if not layer.in_float}
    assert {name: entry["bits"] for name, entry in layers.items()} == coded
    assert {name for name, entry in config["quantization"].items() if entry is False} == {
        "lm_head", *(layer.name for layer in plan.layers if layer.in_float),
    }  # fmt: skip
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"rope_theta": 7.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
         {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
         {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}},
         {"rope_theta": 7.0, "rope_local_base_freq": 5.0}),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 7.0}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_positions_are_under_old_and_new_keys(
    source: Path, tmp_path: Path, given: dict[str, Any], added: dict[str, Any]
) -> None:
    plan = plan_of(source)
    copy = tmp_path / "source"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("rope")}
    (copy / "config.json").write_text(json.dumps({**config, **given, "text_config": given}))
    mlx.export(copy, plan, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    kept = {name: value for name, value in written.items() if name not in config and "quantization" not in name}
    assert kept == {**given, **added, "text_config": {**given, **added}}


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = mixed(source)
    mlx.export(source, plan, tmp_path / "out")
    mlx.verify(tmp_path / "out", plan, source)
    written = load_file(tmp_path / "out/model.safetensors")
    assert {name for name in written if name.endswith(".scales")} == {f"{layer.name}.scales" for layer in plan.layers}
    assert not any(name.startswith("lm_head") for name in written)


def test_widths_and_groups_that_mlx_has_not_are_refused_and_legalised(source: Path) -> None:
    plan = plan_of(source, replace(GROUPS, group_size=16), lambda place, _: (1, 7)[place % 2])
    with pytest.raises(SettingError, match=r"has no groups of 16, only of 32, 64, 128; mlx has no 1 bits"):
        mlx.check(plan, source)
    legal, _ = legalise(plan, mlx.CAPABILITIES)
    assert {(layer.bits, layer.scheme.group_size) for layer in legal.layers} == {(2, 32), (8, 32)}
    mlx.check(legal, source)


def test_inputs_that_are_no_multiple_of_32_are_refused_by_name(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", intermediate_size=80)
    with pytest.raises(SettingError, match=r"'model.layers.0.mlp.down_proj': 80 inputs divide into no groups of 32"):
        mlx.check(plan_of(source, CHANNELS), source)
    mlx.check(plan_of(source, CHANNELS, lambda _, name: 32 if "down" in name else 4), source)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "'model.layers.0.self_attn.q_proj' has 1 of 4096 codes"),
        ("scale", "'model.layers.0.self_attn.q_proj' has "),
        ("bias", "'model.layers.0.self_attn.q_proj' has biases that are no multiples of its scales"),
        ("bias of another", "'model.layers.0.self_attn.q_proj' has other zero points"),
        ("zero scale", "'model.layers.0.self_attn.q_proj' has "),
        ("missing", r"q_proj.biases' is missing"),
        ("extra", "'model.layers.0.self_attn.q_proj.bias' is no tensor of the export"),
    ],
)
def test_what_does_not_hold_the_plan_is_found(source: Path, tmp_path: Path, kind: str, said: str) -> None:
    plan, output = plan_of(source, ASYMMETRIC, 4), tmp_path / "out"
    mlx.export(source, plan, output)
    mlx.verify(output, plan, source)
    tensors = load_file(output / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    if kind == "code":
        tensors[f"{name}.weight"].view(torch.int32)[3, 3] ^= 1 << 30
    elif kind == "scale":
        tensors[f"{name}.scales"] *= 2
        tensors[f"{name}.biases"] *= 2
    elif kind == "bias":
        tensors[f"{name}.biases"][2, 1] *= 1.01
    elif kind == "bias of another":
        tensors[f"{name}.biases"] += tensors[f"{name}.scales"]
        tensors[f"{name}.biases"] = -tensors[f"{name}.scales"] * 9.0
    elif kind == "zero scale":
        tensors[f"{name}.scales"].zero_()
    elif kind == "missing":
        del tensors[f"{name}.biases"]
    else:
        tensors[f"{name}.bias"] = torch.zeros(64)
    save_file(tensors, output / "model.safetensors", {"format": "mlx"})
    with pytest.raises(VerifyError, match=said):
        mlx.verify(output, plan, source)
