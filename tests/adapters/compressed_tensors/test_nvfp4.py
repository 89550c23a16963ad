"""Layers of the type nvfp4, as compressed-tensors' own code decodes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpq_plugins import Minifloat, Plan, SettingError, Uniform, VerifyError, apply, legalise, measure
from mpq_plugins.plans.types import named_type
from mpq_plugins.simulation.layer import simulate_layer
from tests.adapters.llamas import GROUPS, load, logits, save_llama

transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("mpq_plugins.adapters.compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is its own

NVFP4 = Minifloat(format="nvfp4")
FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def uniform(source: Path, skip: Sequence[str] = ("role:embeddings", "role:lm_head")) -> Plan:
    return Uniform(bits=4)(measure(source, NVFP4, (4,), skip=skip))


def unfused(source: Path) -> Plan:
    """What vLLM fuses stays in float."""
    plan = uniform(source)
    layers = (layer.model_copy(update={"bits": 32}) if layer.name.endswith(FUSED) else layer for layer in plan.layers)
    return plan.model_copy(update={"layers": tuple(layers)})


def saved(path: Path, weight: Tensor) -> Path:
    path.mkdir()
    save_file({"fc.weight": weight}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "source", torch.bfloat16)


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    plan, output = uniform(source), tmp_path_factory.mktemp("exported") / "out"
    compressed_tensors.export(source, plan, output, runtime="transformers")
    return output, plan


def weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)


@pytest.mark.slow
def test_transformers_loads_what_apply_makes(source: Path, exported: tuple[Path, Plan]) -> None:
    output, plan = exported
    checks = compressed_tensors.verify(output, plan, source)
    assert {check.stored for check in checks} == {"nvfp4, two codes a byte, scales torch.float8_e4m3fn"}
    found, planned = load(output, torch.bfloat16), apply(load(source, torch.bfloat16), plan)
    assert logits(found).equal(logits(planned))
    for layer in plan.layers:
        assert weight(found, layer.name).equal(weight(planned, layer.name)), layer.name
    assert not logits(planned).equal(logits(load(source, torch.bfloat16)))


@pytest.mark.slow
def test_beside_integers_in_one_checkpoint(source: Path, tmp_path: Path) -> None:
    plan = uniform(source)
    layers = tuple(
        layer.model_copy(update={"scheme": GROUPS}) if "mlp" in layer.name else layer for layer in plan.layers
    )
    plan = plan.model_copy(update={"layers": layers})
    compressed_tensors.export(source, plan, tmp_path / "out", runtime="transformers")
    assert len(compressed_tensors.verify(tmp_path / "out", plan, source)) == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    found, planned = load(tmp_path / "out", torch.bfloat16), apply(load(source, torch.bfloat16), plan)
    logits(found)  # which decodes
    for layer in plan.layers:
        if layer.scheme == NVFP4:
            assert weight(found, layer.name).equal(weight(planned, layer.name)), layer.name


@pytest.mark.parametrize("kind", ["plain", "zeros", "outlier", "all zero", "small"])
def test_the_packages_decoder_gives_the_plans_weights(kind: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    given = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    if kind == "zeros":
        given[3], given[5, 3:40] = 0, 0
    elif kind == "outlier":
        given[7, 11] = 3e4
    elif kind == "all zero":
        given[:] = 0
    elif kind == "small":
        given *= 1e-30
    source = saved(tmp_path / "source", given)
    plan = uniform(source, skip=())
    compressed_tensors.export(source, plan, tmp_path / "out")
    compressed_tensors.verify(tmp_path / "out", plan, source)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "nvfp4-pack-quantized"
    values = unpack_fp4_from_uint8(tensors["fc.weight_packed"], 24, 64, torch.float32)
    found = dequantize(
        values, tensors["fc.weight_scale"].float(), args=QuantizationArgs(**group["weights"]), dtype=torch.float32,
        global_scale=tensors["fc.weight_global_scale"],
    )  # fmt: skip
    expected = simulate_layer(given, plan.layers[0])
    # The file has one over the layer's scale, whose rounding and that of the division are in the last bits.
    torch.testing.assert_close(found, expected, rtol=3 * 2.0**-24, atol=0)
    assert found.sign().equal(expected.sign())
    assert 8 * sum(tensor.nbytes for tensor in tensors.values()) == plan.size().total_bits


def test_what_vllm_fuses_has_one_scale_and_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"'model.layers.0.self_attn.\w_proj': vLLM fuses .* \(qkv\) .*nvfp4 gives"):
        compressed_tensors.export(source, uniform(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plan = unfused(source)
    compressed_tensors.export(source, plan, tmp_path / "out")
    assert {check.layer.rpartition(".")[2] for check in compressed_tensors.verify(tmp_path / "out", plan, source)} == {
        "o_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "fp8_e4m3", "ggml_nvfp4"])
def test_other_types_of_floating_point_are_refused_and_legalised(name: str, source: Path) -> None:
    kind = named_type(name)
    plan = uniform(source)
    layers = tuple(
        layer.model_copy(update={"scheme": kind.scheme, "bits": kind.bits})
        for layer in plan.layers
        if layer.shape[1] % 64 == 0
    )
    kept = plan.model_copy(update={"layers": layers})
    with pytest.raises(SettingError, match=f"compressed_tensors has no {kind.scheme.name} scheme"):
        legalise(kept, compressed_tensors.CAPABILITIES, "error")
    legal, changes = legalise(kept, compressed_tensors.CAPABILITIES)
    assert {layer.scheme.name for layer in legal.layers} == {"affine"}
    assert len(changes) == len(layers)
    assert legalise(plan, compressed_tensors.CAPABILITIES) == (plan, ())


def damaged(kind: str, output: Path, to: Path) -> Path:
    to.mkdir()
    for path in output.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(to / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if kind == "code":
        tensors[f"{name}_packed"][1, 1] ^= 16
        tensors[f"{name}_packed"][2, 1] ^= 3
    elif kind == "scale":
        tensors[f"{name}_scale"].view(torch.uint8)[1, 1] ^= 1
    elif kind == "layer":
        tensors[f"{name}_global_scale"] *= 1 + 2.0**-23
    elif kind == "missing":
        del tensors[f"{name}_global_scale"]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "'model.layers.0.self_attn.q_proj' has 2 of 4096 codes that are not the plan's"),
        ("scale", "'model.layers.0.self_attn.q_proj' has other scales than the plan's"),
        ("layer", "'model.layers.0.self_attn.q_proj' has another scale of the layer than the plan's"),
        ("missing", "'model.layers.0.self_attn.q_proj.weight_global_scale' is missing"),
    ],
)
def test_what_does_not_hold_the_plan_is_found(
    exported: tuple[Path, Plan], source: Path, tmp_path: Path, kind: str, said: str
) -> None:
    output, plan = exported
    with pytest.raises(VerifyError, match=said):
        compressed_tensors.verify(damaged(kind, output, tmp_path / "damaged"), plan, source)
