"""A model quantized by FX from end to end: prepared, calibrated and converted."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx

from mpq_plugins.errors import SettingError
from mpq_plugins.models.running import call_model
from mpq_plugins.plans.plan import Plan

from ..shared.batches import needed_batches
from .checks import check_settings
from .preparation import prepare

EXAMPLE = "example_inputs: "  # what `prepare` calls the first batch


def apply(
    model: nn.Module, plan: Plan, batches: Iterable[Any] = (), *, activation_observer: str = "mse"
) -> torch.fx.GraphModule:
    """A converted copy of the model, its activations' ranges set by the batches; the model is unchanged.

    batches: a few hundred inputs in all, each a tensor or a tuple of arguments. activation_observer: as of `prepare`.
    Raises as `prepare`; also SettingError for no batches, or such that the model does not run on.
    """
    check_settings(plan, model)
    given = [_arguments(batch) for batch in needed_batches(batches, "FX sets the ranges of activations by them")]
    try:
        prepared = prepare(model, plan, given[0], activation_observer=activation_observer)
    except SettingError as error:
        text = str(error)
        if not text.startswith(EXAMPLE):
            raise
        raise SettingError(f"batches: {text.removeprefix(EXAMPLE)}") from error
    with torch.no_grad():
        for arguments in given:
            call_model(prepared, arguments)
    converted: torch.fx.GraphModule = convert_fx(prepared)
    return converted


def _arguments(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, list | tuple):
        return tuple(batch)
    if isinstance(batch, torch.Tensor):
        return (batch,)
    raise SettingError(f"batches: holds a {type(batch).__name__}; FX takes a tensor, or a tuple of arguments")
