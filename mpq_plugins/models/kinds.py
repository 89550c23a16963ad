"""Which modules are layers that we quantize, and where their output channels are."""

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
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)


def channel_axis_of(kind: str) -> int:
    """The output axis of a weight: 1 for transposed convolutions (in, out/groups, ...), else 0."""
    return 1 if kind.startswith("conv_transpose") else 0


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
