"""What an exporter is told of a checkpoint: which tensors become codes, which are one, and what engines fuse."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq_plugins import Affine, Plan, SettingError, SourceError, Uniform, measure
from mpq_plugins.adapters.shared.float_checkpoint import FloatCheckpoint, left_in_float, open_float, require_plain
from mpq_plugins.adapters.shared.fused import require_fused_alike
from tests.helpers.plans import with_layer

CHANNELS = Affine(symmetric=True, granularity="per_channel")


def saved(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def planned(source: Path, **bits: int) -> Plan:
    plan = Uniform(bits=4)(measure(source, CHANNELS, (2, 4)))
    for name, width in bits.items():
        plan = with_layer(plan, name.replace("__", "."), bits=width)
    return plan


def test_a_head_stored_beside_its_embedding_is_one_layer(tmp_path: Path) -> None:
    weight = torch.randn(8, 4)
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, "model.fc.weight": torch.randn(4, 4)}
    tied = saved(tmp_path / "tied", tensors, tie_word_embeddings=True)
    opened = open_float(planned(tied), tied)
    assert [name for name, _ in opened.coded_weights] == ["model.embed_tokens.weight", "model.fc.weight"]
    assert [name for name in tensors if opened.is_copy(name)] == ["lm_head.weight"]
    apart = saved(tmp_path / "apart", tensors, tie_word_embeddings=False)
    opened = open_float(planned(apart), apart)
    assert [name for name, _ in opened.coded_weights] == sorted(tensors)
    assert not any(map(opened.is_copy, tensors))


def test_stacks_of_experts_are_found_where_one_of_them_has_codes(tmp_path: Path) -> None:
    source = saved(tmp_path / "moe", {"mlp.experts.up_proj": torch.randn(2, 4, 8), "fc.weight": torch.randn(4, 8)})
    opened = open_float(planned(source, mlp__experts__up_proj__0=32), source)
    assert opened.stacks == ["mlp.experts.up_proj"]
    with pytest.raises(SettingError, match=r"'mlp.experts.up_proj': one tensor stacks its experts.*--skip"):
        require_plain(opened, "the format")
    left = planned(source, mlp__experts__up_proj__0=32, mlp__experts__up_proj__1=16)
    opened = open_float(left, source)
    assert opened.stacks == []
    require_plain(opened, "the format")
    stack = opened.in_float("mlp.experts.up_proj")
    original = opened.tensors["mlp.experts.up_proj"].tensor()
    assert torch.equal(stack[0], original[0])
    assert torch.equal(stack[1], original[1].half().float())


def test_matrices_that_keep_inputs_first_are_refused(tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_attn.weight": torch.randn(4, 12), "h.0.attn.c_attn.bias": torch.zeros(12)}
    source = saved(tmp_path / "gpt2", tensors, model_type="gpt2")
    with pytest.raises(SettingError, match=r"'h.0.attn.c_attn': keeps inputs first.*skip it"):
        require_plain(open_float(planned(source), source), "the format")


@pytest.mark.parametrize("text", ["[]", "{", '{"quantization": {"bits": 4}}', ""])
def test_configurations_that_are_none_or_of_a_quantized_model_are_refused(tmp_path: Path, text: str) -> None:
    source = saved(tmp_path / "net", {"fc.weight": torch.randn(4, 8)})
    plan = planned(source)
    (source / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config.json: "):
        open_float(plan, source)


def mixtral(path: Path, **bits: int) -> FloatCheckpoint:
    names = [f"layers.{b}.experts.{e}.{w}" for b in range(2) for e in range(2) for w in ("w1", "w2", "w3")]
    names += [f"layers.{b}.self_attn.{w}" for b in range(2) for w in ("q_proj", "k_proj", "v_proj")]
    source = saved(path, {f"{name}.weight": torch.randn(4, 4) for name in names}, model_type="mixtral")
    return open_float(planned(source, **bits), source)


def test_blocks_may_differ_and_what_is_fused_in_them_may_not(tmp_path: Path) -> None:
    block = {f"layers__1__self_attn__{w}": 2 for w in ("q_proj", "k_proj", "v_proj")}
    experts = {f"layers__0__experts__{e}__{w}": 2 for e in range(2) for w in ("w1", "w2", "w3")}
    require_fused_alike(mixtral(tmp_path / "alike", **block, **experts), "the engine", "")
    for number, (name, tie) in enumerate(
        [
            ("layers__1__self_attn__v_proj", "qkv"),
            ("layers__1__experts__1__w1", "gate_up --tie experts"),
            ("layers__0__experts__0__w2", "experts"),
        ]
    ):
        opened = mixtral(tmp_path / str(number), **{name: 2})
        with pytest.raises(SettingError, match=f"the engine fuses .* Plan with --tie {tie}, and skip"):
            require_fused_alike(opened, "the engine", "do so")


def test_experts_left_in_float_keep_their_tensors_shape_and_16_bits_are_float16(tmp_path: Path) -> None:
    joined = "transformer.blocks.0.ffn.experts.mlp.w1"
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        joined: torch.randn(256, 32), "transformer.blocks.0.ffn.router.layer.weight": torch.randn(4, 32),
        stack: torch.randn(4, 64, 32), "model.fc.weight": torch.randn(4, 32),
    }  # fmt: skip
    source = saved(tmp_path / "source", tensors)
    plan = planned(source)
    in_float = tuple(
        layer.model_copy(update={"bits": 16 if layer.name.startswith(stack) else 32})
        if "experts" in layer.name
        else layer
        for layer in plan.layers
    )
    opened = open_float(plan.model_copy(update={"layers": in_float}), source)
    assert any(layer.name.startswith(joined) for layer in in_float)
    assert opened.in_float(joined).equal(tensors[joined])
    assert opened.in_float(stack).dtype == torch.float16
    assert opened.in_float(stack).equal(tensors[stack].half())


def test_a_layer_without_weights_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", {"fc.weight": torch.randn(32, 64), "gc.weight": torch.randn(0, 64)})
    with pytest.raises(SettingError, match="layer 'gc': has no weights"):
        require_plain(open_float(planned(source), source), "MLX")


def test_stacked_experts_in_float_are_told_to_engines(tmp_path: Path) -> None:
    stack, joined = "model.layers.0.mlp.experts.gate_up_proj", "transformer.blocks.0.ffn.experts.mlp.w1"
    tensors = {
        stack: torch.randn(4, 64, 32), joined: torch.randn(256, 32), "model.fc.weight": torch.randn(4, 32),
        "transformer.blocks.0.ffn.router.layer.weight": torch.randn(4, 32),
    }  # fmt: skip
    source = saved(tmp_path / "source", tensors)
    plan = Uniform(bits=4)(measure(source, CHANNELS, (4,), only=["model.fc"]))
    named = set(left_in_float(open_float(plan, source)))
    assert {stack, "model.layers.0.mlp.experts", joined, "transformer.blocks.0.ffn.experts"} <= named
    assert "model.fc" not in named


def test_what_deepseek_fuses_must_agree(tmp_path: Path) -> None:
    first, second = "model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa"
    source = saved(tmp_path / "source", {f"{name}.weight": torch.randn(32, 32) for name in (first, second)})
    plan = with_layer(planned(source), first, bits=2)
    with pytest.raises(SettingError, match="--tie qkv"):
        require_fused_alike(open_float(plan, source), "vLLM", "or not")
