"""Which modules are layers that we quantize, and where their output channels are."""

import sys
from typing import cast

from torch import Tensor, nn

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a quantizable module, or None."""
    kind = next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)
    return "linear" if kind is None and is_transformers_conv1d(module) else kind


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, as GPT-2 has them: a linear layer whose weight is (inputs, outputs).

    transformers is not imported for that: whoever has such a module has done so.
    """
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, cast(type[nn.Module], conv1d))


def output_axis(module: nn.Module) -> int:
    """The output axis of a layer's weight: 1 for transposed convolutions (in, out/groups, ...) and Conv1D, else 0."""
    return int((layer_kind(module) or "").startswith("conv_transpose") or is_transformers_conv1d(module))


def quantizable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's quantizable layers by layer name, tied ones under their first name."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = None if layer_kind(module) is None else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    return weights
