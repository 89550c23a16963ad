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
from ..shared.input_ranges import found_ranges, taken_ranges
from .checks import check_settings
from .inputs import set_inputs
from .preparation import check_ranges, needs_reduced_range, observed

EXAMPLE = "example_inputs: "  # what `prepare` calls the first batch


def apply(
    model: nn.Module, plan: Plan, batches: Iterable[Any] = (), *, activation_observer: str | None = None
) -> torch.fx.GraphModule:
    """Make a converted copy of the model, its activations' ranges set by the batches.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: A few hundred inputs in all, each a tensor or a tuple of arguments. Ranges of planned layers' inputs
            are found on them as the plan says, unless the model carries such ranges: then these are taken.
        activation_observer: As of `prepare`, in place of the plan's ranges.

    Returns:
        What torch's `convert_fx` makes.

    Raises:
        SettingError: As `prepare`; or there are no batches, or such that the model does not run on.
        MismatchError: As `prepare`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net)).with_activation_bits(8)
        >>> converted = fx.apply(net, plan, [torch.randn(32, 8)])
        >>> fx.verify(converted, plan, net)[0].bits
        ((4, 8),)
    """
    bare, ranges = taken_ranges(plan, model)
    check_settings(plan, bare)
    given = [_arguments(batch) for batch in needed_batches(batches, "FX sets the ranges of activations by them")]
    check_ranges(ranges, activation_observer)
    reduce = needs_reduced_range()
    try:
        prepared = observed(bare, plan, given[0], activation_observer, reduce)
    except SettingError as error:
        text = str(error)
        if not text.startswith(EXAMPLE):
            raise
        raise SettingError(f"batches: {text.removeprefix(EXAMPLE)}") from error
    if activation_observer is None:
        known = ranges or found_ranges(bare, plan, given)
        set_inputs(prepared, plan, known, exactly=bool(ranges), reduce=reduce)
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
