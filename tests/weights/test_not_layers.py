"""What a bare file's names say is no layer, and what they say is looked up: both lists, so that neither grows alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import find_weights
from mpq_plugins.plans.names import may_be_layer
from mpq_plugins.weights.not_layers import is_embedding, why_no_layer

NORMS = (
    "norm", "norm1", "encoder.norm_2", "ln", "ln_f", "h.0.ln_1", "bn1", "LayerNorm", "layer_norm", "layernorm_before",
    "post_attention_layernorm", "input_layernorm", "q_norm", "rms_norm", "group_norm", "final_layer_norm", "norms.0",
    "layer_norms.2", "instance_norm", "batch_norm", "stem.gn2",
)  # fmt: skip
TABLES = (
    "mask", "causal_mask", "anchors", "anchor_grid", "running_mean", "running_var", "relative_position_index",
    "relative_position_bias_table", "freqs", "inv_freq.freqs", "priors", "pos_encoding", "positional.pe", "queue",
    "strides", "relative_coords_table",
)  # fmt: skip
LAYERS = (
    "fc", "conv", "proj", "0", "norm.linear", "norm1.proj", "layer_norm_proj", "mean_proj", "mask_conv", "bn_conv",
    "downsample.0", "attn.qkv", "attention.self.query", "mlp.gate", "adaLN_modulation.1", "time_embedding.linear_1",
    "embed", "lm_head", "normalizer_fc", "lnear", "bneck", "maskformer", "domain", "meaning", "varied",
)  # fmt: skip


@pytest.mark.parametrize("name", [*NORMS, *TABLES])
def test_norms_and_tables_are_left_alone_by_name(tmp_path: Path, name: str) -> None:
    state = {f"{name}.weight": torch.randn(4, 5), "fc.weight": torch.randn(4, 5)}
    save_file(state, tmp_path / "in.safetensors")
    found = find_weights(tmp_path / "in.safetensors")
    assert [weight.name for weight in found] == ["fc"]
    ((parameter, reason),) = found.left_alone
    assert parameter == f"{name}.weight"
    assert "by its name" in reason


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_not(name: str) -> None:
    assert why_no_layer(f"{name}.weight", (4, 5), {}) is None


@pytest.mark.parametrize("name", [*NORMS, *TABLES, *LAYERS])
def test_a_bias_for_each_output_makes_a_layer_of_any_name_and_one_of_several_dimensions_makes_none(name: str) -> None:
    assert why_no_layer(f"{name}.weight", (4, 5), {f"{name}.bias": (4,)}) is None
    assert (
        why_no_layer(f"{name}.weight", (4, 5), {f"{name}.bias": (4, 5)})
        == "its bias has several dimensions, as a norm's"
    )


@pytest.mark.parametrize("name", ["relative_position_bias_table", "mask", "A_log", "pos_embed", "fc.bias", "weight_v"])
def test_what_is_called_no_weight_is_none(name: str) -> None:
    assert why_no_layer(name, (4, 5), {}) == "its name does not end in .weight"
    assert not may_be_layer(name)


@pytest.mark.parametrize("name", [
    "embed", "embed_tokens", "embed_tokens_per_layer", "word_embeddings", "position_embeddings", "token_embedding",
    "wte", "wpe", "shared", "tok_embeddings", "embed_in", "embeddings",
])  # fmt: skip
def test_what_is_looked_up(name: str) -> None:
    assert is_embedding(f"model.{name}", (9, 4), {})
    assert not is_embedding(f"model.{name}", (9, 4), {f"model.{name}.bias": (9,)})  # nothing is looked up with a bias
    assert not is_embedding(f"model.{name}", (9, 4, 3, 3), {})


@pytest.mark.parametrize(
    "name", ["embed_out", "gpt_neox.embed_out", "unembed", "embed_proj", "embedding_projection", "fc"]
)
def test_what_is_multiplied_by_though_its_name_says_embed(name: str) -> None:
    assert not is_embedding(name, (9, 4), {})
