"""Transformers' own models, from configurations: each adapter runs them within 2 % at 8 bits, or names the layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, MismatchError, Uniform, measure
from mpq_plugins.models.running import run_model

transformers = pytest.importorskip("transformers")
brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
inc = pytest.importorskip("mpq_plugins.adapters.inc")
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")
torchao = pytest.importorskip("mpq_plugins.adapters.torchao")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = torch.arange(14).view(2, 7)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    return transformers.ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False)
    return transformers.MambaForCausalLM(config), {"input_ids": IDS}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=4, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": IDS}
    return transformers.WhisperForConditionalGeneration(config), inputs


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS}


def mixtral() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.MixtralConfig(
        **SIZES, vocab_size=20, num_key_value_heads=1, num_local_experts=2, use_cache=False
    )
    return transformers.MixtralForCausalLM(config), {"input_ids": IDS}


MODELS = [resnet, vit, t5, mamba, whisper, gpt2, mixtral]
# What computes in its own way, or is computed with from elsewhere, as transformers wrote it.
REFUSED = {
    ("mamba", "torchao"): "'backbone.layers.0.mixer.conv1d' lends its weight",
    ("mamba", "brevitas"): "'backbone.layers.0.mixer.conv1d' lends its weight",
    **{("gpt2", adapter): "transformers' Conv1D" for adapter in ("torchao", "brevitas", "inc", "pt2e")},
    ("whisper", "torchao"): "'model.decoder.embed_positions' is a WhisperPositionalEmbedding",
    ("whisper", "brevitas"): "'model.decoder.embed_positions' is a WhisperPositionalEmbedding",
}


def by_pt2e(model: nn.Module, plan: Any, inputs: dict[str, Tensor]) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(model, (), kwargs=inputs).module()
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    prepared(**inputs)
    return convert_pt2e(prepared)


ADAPTERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torchao": (lambda model, plan, _: torchao.apply(model, plan), torchao.verify),
    "brevitas": (lambda model, plan, _: brevitas.to_brevitas(model, plan), brevitas.verify),
    "inc": (lambda model, plan, _: inc.apply(model, plan), inc.verify),
    "pt2e": (by_pt2e, pt2e.verify),
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_runs_or_a_layer_is_named(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], adapter: str) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,)))
    convert, verify = ADAPTERS[adapter]
    refusal = REFUSED.get((make.__name__, adapter))
    if refusal is not None:
        with pytest.raises(MismatchError, match=refusal):
            convert(model, plan, inputs)
        return
    quantized = convert(model, plan, inputs)
    verify(quantized, plan, model, batch=inputs)
    with torch.no_grad():
        exact, found = run_model(model, inputs).logits, quantized(**inputs).logits
    assert (found - exact).norm() < 0.02 * exact.norm()
