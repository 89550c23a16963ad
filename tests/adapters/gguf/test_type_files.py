"""Files of types for llama-quantize: as that program reads them, every tensor gets the plan's type."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import GGML, Affine, Codebook, Minifloat, SettingError, Uniform, measure
from mpq_plugins.adapters.gguf import config, types_file
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from tests.helpers.ggufs import SHAPES, tiny, values, write_gguf
from tests.helpers.plans import linear, plan_of

LAYERS = [name for name, shape in SHAPES.items() if len(shape) > 1]


def heeded(text: str, tensor: str) -> str | None:
    """As llama-quantize goes by it: patterns are lower-cased and searched for, and the first that is found wins."""
    for line in text.split():
        pattern, kind = line.rsplit("=", 1)
        if re.search(pattern.lower(), tensor):
            return kind
    return None


def planned(source: Path, scheme: Any, bits: int, **options: Any) -> Plan:
    return Uniform(bits=bits)(measure(source, scheme, bits=(bits,), **options))


def with_skipped(plan: Plan, *names: str) -> Plan:
    return plan.model_copy(update={"skipped": names})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "net.gguf", tiny() | {"output.weight": values((40, 64))})


def test_every_tensor_gets_its_own_type(file: Path) -> None:
    plan = planned(file, GGML(type="q5_0"), 5, skip=["blk.0.attn_q"])
    layers = tuple(
        LayerChoice.model_validate({**dict(layer), "scheme": GGML(type="q8_0"), "bits": 8})
        if layer.name == "output" else layer for layer in plan.layers
    )  # fmt: skip
    text = config(plan.model_copy(update={"layers": layers}), file)
    assert {tensor: heeded(text, tensor) for tensor in (*LAYERS, "output.weight")} == {
        tensor: "f32" if "attn_q" in tensor else "q5_0" for tensor in LAYERS
    } | {"output.weight": "q8_0"}
    assert heeded(text, "blk.0.attn_output.weight") == "q5_0"  # not the head's
    assert all(
        heeded(text, tensor) is None for tensor in ("blk.10.attn_v.weight", "xoutput.weight", "output_norm.weight")
    )
    assert text == text.lower()
    assert len(text.splitlines()) == len(LAYERS) + 1


def test_the_same_of_a_checkpoint_by_transformers_names(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors = {f"model.layers.0.self_attn.{one}_proj.weight": torch.randn(64, 64) for one in "qkvo"}
    save_file(tensors | {"model.embed_tokens.weight": torch.randn(40, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "num_hidden_layers": 1}))
    text = config(planned(folder, GGML(type="q4_1"), 5, skip=["*.o_proj"]), folder)
    assert {tensor: heeded(text, tensor) for tensor in LAYERS if "ffn" not in tensor} == {
        tensor: "f16" if "attn_output" in tensor else "q4_1" for tensor in LAYERS if "ffn" not in tensor
    }


def test_experts_of_transformers_are_one_tensor() -> None:
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w1" for expert in range(3)]
    plan = plan_of(*(linear(name, 8, 64, GGML(type="q4_0"), 4) for name in names))
    assert types_file(plan, "llama", 2) == r"^blk\.1\.ffn_gate_exps\.weight$=q4_0" "\n"
    odd = plan_of(
        linear(names[0], 8, 64, GGML(type="q4_0"), 4), linear(names[1], 8, 64, GGML(type="q5_0"), 5),
    )  # fmt: skip
    with pytest.raises(
        SettingError, match=r"is one tensor with 'blk.1.ffn_gate_exps.0', of q4_0, and the plan has q5_0"
    ):
        types_file(odd, "llama", 2)


@pytest.mark.parametrize(
    ("scheme", "bits", "kind"),
    [
        (Affine(symmetric=True, granularity="per_channel"), 4, "q4_0"), (Affine(), 4, "q4_1"), (Affine(), 5, "q5_1"),
        (Affine(symmetric=True), 8, "q8_0"), (Affine(), 8, "q8_0"), (Affine(), 2, "q2_k"), (Affine(), 3, "q3_k"),
        (Affine(), 6, "q6_k"), (GGML(type="iq4_xs"), 4, "iq4_xs"), (Affine(), 16, "f16"), (Affine(), 32, "f32"),
    ],
)  # fmt: skip
def test_widths_are_types(scheme: Any, bits: int, kind: str) -> None:
    assert heeded(types_file(plan_of(linear("blk.0.attn_q", 8, 256, scheme, bits))), "blk.0.attn_q.weight") == kind


def test_what_is_skipped_is_named_too() -> None:
    plan = with_skipped(plan_of(linear("blk.0.attn_q", 8, 64, GGML(type="q4_0"), 4)), "output", "blk.0.ffn_gate_inp")
    text = types_file(plan)
    assert heeded(text, "output.weight") == "f16"
    assert heeded(text, "blk.0.ffn_gate_inp.weight") is None  # which llama-quantize keeps by itself


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (linear("blk.0.ffn_gate_inp", 8, 64, GGML(type="q4_0"), 4), "keeps tensors of this name in floating point"),
        (linear("altup_proj", 8, 64, GGML(type="q4_0"), 4), "has no name in GGUF files"),
        (linear("blk.0.altup_router", 8, 64, GGML(type="q4_0"), 4), "keeps tensors of this name in floating point"),
        (linear("blk.0.ssm_conv1d", 8, 64, GGML(type="q4_0"), 4), "keeps tensors of this name in floating point"),
        (linear("blk.0.attn_q", 8, 256, GGML(type="iq2_xs"), 2), "refuses iq2_xs without --imatrix"),
        (linear("blk.0.attn_q", 8, 64, Affine(), 7), "ggml has no type of 7 bits"),
        (linear("blk.0.attn_q", 8, 64, Affine(), 3), "no whole blocks of q3_k, for which llama-quantize takes q4_0"),
        (linear("blk.0.attn_q", 8, 40, Affine(), 4), "no whole blocks of q4_1, for which llama-quantize takes f16"),
        (linear("blk.0.attn_Q", 8, 64, Affine(), 4), "lower-cases patterns"),
        (linear("blk.0.attn_q", 2, 64, Affine(), {4: (0,), 5: (1,)}), "its channels differ in width"),
        (linear("model.layers.0.mlp.odd", 8, 64, Affine(), 4), "has no name in GGUF files of 'llama'"),
    ],
)
def test_what_llama_quantize_would_not_heed_is_an_error(layer: LayerChoice, message: str) -> None:
    with pytest.raises(SettingError, match=f"^layer {layer.name!r}.*{message}"):
        types_file(plan_of(layer), "llama", 1)


def test_a_plan_of_a_gguf_file_needs_no_table_of_names() -> None:
    names = ("blk.0.attn_q", "token_embd", "per_layer_token_embd", "v.blk.3.attn_q", "rope_short")
    text = types_file(plan_of(*(linear(name, 8, 64, GGML(type="q4_0"), 4) for name in names)), "no such model", 1)
    assert {heeded(text, f"{name}.weight") for name in names} == {"q4_0"}
    assert heeded(types_file(plan_of(linear("output", 8, 64, GGML(type="q8_0"), 8))), "output.weight") == "q8_0"


def test_an_importance_matrix_allows_what_needs_it() -> None:
    plan = plan_of(linear("blk.0.attn_q", 8, 256, GGML(type="iq2_xs"), 2))
    assert heeded(types_file(plan, imatrix=True), "blk.0.attn_q.weight") == "iq2_xs"
    head = plan_of(linear("output", 8, 256, GGML(type="iq2_xs"), 2))
    assert heeded(types_file(head), "output.weight") == "iq2_xs"


def test_an_architecture_that_nobody_knows_is_told() -> None:
    with pytest.raises(SettingError, match="architecture: 'lama' is none of those that gguf has names for"):
        types_file(plan_of(linear("model.layers.0.mlp.up_proj", 8, 64, Affine(), 4)), "lama", 1)


def test_schemes_that_are_no_types_of_ggmls_are_refused_and_not_replaced() -> None:
    for scheme, bits in ((Minifloat(format="mxfp4"), 4), (Codebook(granularity="per_channel"), 4)):
        plan = plan_of(linear("blk.0.ffn_up", 32, 64, scheme, bits))
        with pytest.raises(SettingError, match="is no type of ggml's, and none comes near it"):
            types_file(plan)


def test_weights_that_are_rounded_stochastically_are_refused() -> None:
    plan = plan_of(linear("blk.0.ffn_up", 32, 64, Affine(symmetric=True, stochastic=7), 8))
    with pytest.raises(SettingError, match=r"layer 'blk.0.ffn_up': .*stochastic.*llama-quantize rounds to nearest"):
        types_file(plan)


def test_a_skipped_expert_of_a_planned_stack_is_refused() -> None:
    plan = plan_of(linear("blk.0.ffn_gate_exps.0", 32, 256, GGML(type="q4_k"), 4))
    with pytest.raises(SettingError, match=r"layer 'blk.0.ffn_gate_exps.1': is skipped, and one tensor with"):
        types_file(plan.model_copy(update={"skipped": ("blk.0.ffn_gate_exps.1",)}))
