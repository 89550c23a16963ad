"""SmolLM2 as an MLX checkpoint of a plan, run packed by mlx-lm: pip install mlx-lm, on Linux mlx-cpu too."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, from_numpy, nn

import mpq_plugins as mpq
from examples.smollm_model import TOKENS
from mpq_plugins.adapters import mlx


def mlx_perplexity(model: nn.Module, plan: mpq.Plan, evaluated: Tensor) -> float:
    """As smollm_model.perplexity, of the plan's codes as mlx-lm multiplies with them."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch) / "source")
        written = mlx.export(source, plan, Path(scratch) / "mlx")
        mlx.verify(written.path, plan, source)
        print(f"written and read back: {written.layers} layers, {written.total_bytes / 1e6:.1f} MB")
        loaded, _ = load_model(written.path)
        loss = 0.0
        for window in evaluated:
            logits = from_numpy(np.array(loaded(mx.array(window[None].numpy())).astype(mx.float32)))
            loss += float(F.cross_entropy(logits[0, :-1], window[1:], reduction="sum"))
    return math.exp(loss / (len(evaluated) * (TOKENS - 1)))


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
