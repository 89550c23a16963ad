"""Tiny random Llamas as transformers saves them, and plans of them, for the exporters' tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq_plugins import Affine, Plan, Uniform, measure

GROUPS = Affine(symmetric=True, granularity="per_group", group_size=32)
CHANNELS = Affine(symmetric=True, granularity="per_channel")
FULL = Affine(symmetric="full", granularity="per_group", group_size=32, scale_dtype="float16", range="mse")
IDS = torch.arange(24).view(2, 12)


def save_llama(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model of two blocks with a head of its own, rope_theta not the default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rope_theta": 500000.0,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))
    model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text('{"not": "a real one"}')
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    loaded: nn.Module = model.eval()
    return loaded


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(IDS).logits
    return made


def plan_of(
    path: Path,
    scheme: Affine = GROUPS,
    bits: Callable[[int, str], int] | int = 4,
    skip: Sequence[str] = ("role:embeddings", "role:lm_head"),
) -> Plan:
    """A plan whose layers have these widths, by their place and name."""
    plan = Uniform(bits=4)(measure(path, scheme, range(1, 9), skip=skip))
    chosen = bits if callable(bits) else lambda *_: bits
    layers = tuple(
        layer.model_copy(update={"bits": chosen(position, layer.name)}) for position, layer in enumerate(plan.layers)
    )
    return plan.model_copy(update={"layers": layers})


def fused_bits(attention: int, mlp: int, others: int) -> Callable[[int, str], int]:
    """Widths that agree where engines fuse."""

    def bits(_: int, name: str) -> int:
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            return attention
        return mlp if name.endswith(("gate_proj", "up_proj")) else others

    return bits


def save_experts(path: Path, kind: str) -> Path:
    """A model of two blocks with four experts in each: mixtral, olmoe, qwen2_moe or qwen3_moe."""
    import transformers

    torch.manual_seed(0)
    name = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[kind]
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500000.0, "max_position_embeddings": 64,
        "num_experts_per_tok": 2, "eos_token_id": 1,
    }  # fmt: skip
    sizes |= {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4}
    if kind.startswith("qwen"):
        sizes |= {"moe_intermediate_size": 96, "decoder_sparse_step": 1}
    sizes |= {"shared_expert_intermediate_size": 64} if kind == "qwen2_moe" else {}
    sizes |= {"head_dim": 16, "norm_topk_prob": True} if kind == "qwen3_moe" else {}
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    model.save_pretrained(path)
    return path
