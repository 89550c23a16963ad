"""Layers and their weights by name: a model that is itself a layer has no name, and its weight is called `weight`."""

import re
from collections.abc import Iterable, Sequence

from ..common.checks import as_integer

EXPERTS = re.compile(r"(^|\.)((\w+_)?(experts?|exps)|(\w+_)?moe)(?=\.|$)")
NUMBERED = re.compile(r"experts?\.([0-9]{1,9})\.")
JOINED = re.compile(r"((?:^|\.))experts\.mlp\.(w1|v1|w2)$")
"""Experts' matrices that lie one below the other in one matrix, as DBRX has them."""
NO_MATRICES = re.compile(r"(^|_)(scales?|scale_inv|bias|norm|zero_points?|zeros|lora_\w+)$")


def layer_name(parameter: str) -> str:
    """`conv1.weight` -> `conv1`."""
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


def weight_name(layer: str) -> str:
    """`conv1` -> `conv1.weight`."""
    return f"{layer}.weight" if layer else "weight"


def is_weight(parameter: str) -> bool:
    """Whether a parameter is called as layers' weights are."""
    return parameter == "weight" or parameter.endswith(".weight")


def may_be_layer(parameter: str) -> bool:
    """Whether a bare file's tensor of this name, whatever its shape, may be taken for a layer's weight."""
    return is_weight(parameter) or are_experts(parameter, (2, 2, 2))


def are_experts(parameter: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a stack of experts' matrices, experts first: by its shape, its path and its own name."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        return False
    path = parameter.removesuffix(".weight")
    return (
        EXPERTS.search(path) is not None
        and NUMBERED.search(f"{path}.") is None
        and NO_MATRICES.search(path.rpartition(".")[2]) is None
    )


def stacks_of(names: Iterable[str]) -> set[str]:
    """The stacks of experts that layers of these names, NAME.0, NAME.1 ..., may be matrices of."""
    return {name.rpartition(".")[0] for name in names if as_integer(name.rpartition(".")[2]) is not None}
