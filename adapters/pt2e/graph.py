"""Reading and changing an exported graph's nodes."""

import torch
from torch import Tensor, nn

from .folded import attribute

ANNOTATION = "quantization_annotation"


def is_operator(node: torch.fx.Node, operator: str) -> bool:
    """Whether a node quantizes or dequantizes, in the way whose name begins so."""
    return str(node.target).startswith(f"quantized_decomposed.{operator}")


def replace_weight(model: torch.fx.GraphModule, target: str, weight: Tensor) -> None:
    """Another tensor under the name: the exported module shares its parameters with the user's model."""
    parent, _, last = target.rpartition(".")
    is_parameter = isinstance(attribute(model, target), nn.Parameter)
    weight = weight.to(attribute(model, target))
    setattr(model.get_submodule(parent), last, nn.Parameter(weight, requires_grad=False) if is_parameter else weight)
