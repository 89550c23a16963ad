"""SmolLM2 as a plan's checkpoint, run as its users would run it, beside the plan's simulation.

By mlx-lm, packed (pip install mlx-lm, on Linux mlx-cpu too), and by transformers from compressed-tensors.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, from_numpy, nn

import mpq_plugins as mpq

Logits = Callable[[Tensor], Tensor]
"""Of windows (count, tokens), (count, tokens, words)."""


@dataclass(frozen=True)
class Packed:
    """What a stack computes from an export, beside what `mpq.apply` computes.

    difference: the largest of any logit; spread: from the least logit of the simulation to the largest; agreeing: the
    share of tokens whose likeliest next word is the same.
    """

    layers: int
    megabytes: float
    difference: float
    spread: float
    agreeing: float

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.megabytes:.1f} MB, written and read back; logits differ by at most "
            f"{self.difference:.2g} of {self.spread:.0f}; {self.agreeing:.0%} of likeliest words agree"
        )


def in_mlx(model: nn.Module, plan: mpq.Plan, given: Tensor) -> Packed:
    """Written for MLX, and run packed by mlx-lm: a second or two a token on a CPU without Metal."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from mpq_plugins.adapters import mlx

    def loaded(path: Path) -> Logits:
        network, _ = load_model(path)
        return lambda windows: from_numpy(np.array(network(mx.array(windows.numpy())).astype(mx.float32)))

    return _beside_the_simulation(mlx.export, mlx.verify, loaded, model, plan, given)


def in_transformers(model: nn.Module, plan: mpq.Plan, given: Tensor) -> Packed:
    """Written as compressed-tensors, and loaded by transformers; the embedding, which is the head, stays in float."""
    from transformers import AutoModelForCausalLM

    from mpq_plugins.adapters import compressed_tensors

    def loaded(path: Path) -> Logits:
        network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        network.eval()
        return lambda windows: network(windows).logits

    legal, _ = mpq.legalise(plan, compressed_tensors.CAPABILITIES, policy="up")
    write = partial(compressed_tensors.export, runtime="transformers")  # which takes q, k and v each by itself
    return _beside_the_simulation(write, compressed_tensors.verify, loaded, model, legal, given)


@torch.no_grad()
def _beside_the_simulation(
    write: Callable[[Path, mpq.Plan, Path], mpq.Exported],
    verify: Callable[[Path, mpq.Plan, Path], object],
    load: Callable[[Path], Logits],
    model: nn.Module,
    plan: mpq.Plan,
    given: Tensor,
) -> Packed:
    expected = mpq.apply(model, plan)(given).logits
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch) / "source")
        written = write(source, plan, Path(scratch) / "written")
        verify(written.path, plan, source)
        found = load(written.path)(given)
    return Packed(
        written.layers,
        written.total_bytes / 1e6,
        float((found - expected).abs().max()),
        float(expected.max() - expected.min()),
        float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def saved(model: Any, folder: Path) -> Path:
    """The model as a directory of transformers; its own way refuses models that come from GGUF."""
    folder.mkdir()
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    type(model.config).from_dict(config).save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
