"""Modules whose checkpoints do not say what they hold: every kind of layer, and what only looks like one in a file."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn


class Borrower(nn.Module):
    """A buffer and a parameter that are called weight, as blurring layers and tables have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 1, 3, 3))
        self.scale = nn.Parameter(torch.randn(3, 3))


class Scale(nn.Module):
    """A matrix of weights that no layer of ours holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(5, 5, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, 3),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "up1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "up2d": lambda: nn.ConvTranspose2d(6, 4, 2, groups=2),
    "up2d square": lambda: nn.ConvTranspose2d(4, 4, 3, bias=False),
    "up3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 4),
    "embedding bag": lambda: nn.EmbeddingBag(9, 4),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "layer norm": lambda: nn.LayerNorm((3, 4, 5)),
    "layer norm without bias": lambda: nn.LayerNorm((4, 5), bias=False),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "lstm": lambda: nn.LSTM(4, 3),
    "buffer": Borrower,
    "parameter": Scale,
}
QUANTIZABLE = [kind for kind in LAYERS if kind.split()[0] in ("linear", "conv1d", "conv2d", "conv3d", "embedding")]
QUANTIZABLE.remove("embedding bag")
# Names that mean something to a reader of files, and that a model may give to anything.
NAMES = ("fc", "conv", "norm", "embed", "mask", "mean", "proj", "block", "lm_head", "model", "net", "c_attn", "experts")


@st.composite
def odd_modules(draw: st.DrawFn) -> nn.Module:
    """A module of one to six parts, two deep, at least one of which can be quantized."""
    kinds = [draw(st.sampled_from(QUANTIZABLE)), *draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=5))]
    names = draw(st.lists(st.sampled_from(NAMES), min_size=len(kinds), max_size=len(kinds), unique=True))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    root, inner = nn.Module(), nn.Module()
    for kind, name in zip(kinds, names, strict=True):
        parent = inner if draw(st.booleans()) else root
        parent.add_module(name, LAYERS[kind]())
    root.add_module("inner", inner)
    with torch.no_grad():
        for tensor in root.state_dict().values():
            if tensor.is_floating_point():  # norms of ones would be quantized to themselves
                tensor.normal_()
    return root.eval()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict, each tensor one of its own."""
    return {name: value.clone() for name, value in module.state_dict().items()}
