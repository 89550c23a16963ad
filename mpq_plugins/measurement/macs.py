"""Multiply-accumulates per layer for one example input, counted by torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import SettingError
from ..models.kinds import layer_kind
from ..models.running import evaluating


def count_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Module name -> multiply-accumulates of a forward pass of `example_input` (a tensor or a tuple of arguments).

    A module called twice counts twice; one that multiplies nothing by itself, such as a look-up or a layer whose
    weight somebody else uses, is not listed.
    Raises SettingError where the model does not run on the input.
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), torch.no_grad(), counter:
            model(*arguments)
    except Exception as error:  # a user's forward may raise anything on a wrong input
        raise SettingError(
            f"example_input: {type(model).__name__} does not run on it ({type(error).__name__}: {error})"
        ) from error
    root = type(model).__name__
    # torch counts a multiplication and an addition as two operations.
    counted = {
        path.removeprefix(root).removeprefix("."): sum(operations.values()) // 2
        for path, operations in counter.get_flop_counts().items()
    }
    return {name: macs - _of_layers_inside(name, model, counted) for name, macs in counted.items()}


def _of_layers_inside(name: str, model: nn.Module, counted: Mapping[str, int]) -> int:
    """What a layer's count holds of layers inside it, such as a subclass's low-rank branch, which count themselves."""
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None or layer_kind(module) is None:
        return 0
    prefix = f"{name}." if name else ""
    inside = [inner for inner, layer in module.named_modules() if inner and layer_kind(layer) is not None]
    outermost = [inner for inner in inside if not any(inner.startswith(f"{other}.") for other in inside)]
    return sum(counted.get(f"{prefix}{inner}", 0) for inner in outermost)
