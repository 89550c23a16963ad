"""Layers and their weights by name: a model that is itself a layer has no name, and its weight is called `weight`."""


def layer_name(parameter: str) -> str:
    """`conv1.weight` -> `conv1`."""
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


def weight_name(layer: str) -> str:
    """`conv1` -> `conv1.weight`."""
    return f"{layer}.weight" if layer else "weight"


def is_weight(parameter: str) -> bool:
    """Whether a parameter is called as layers' weights are."""
    return parameter == "weight" or parameter.endswith(".weight")
