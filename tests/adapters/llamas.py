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
