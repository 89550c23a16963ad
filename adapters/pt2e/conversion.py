"""A model quantized by PT2E from end to end: exported, prepared, calibrated and converted."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.export
import torch.fx
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from mpq_plugins.common.text import what_it_said
from mpq_plugins.errors import SourceError
from mpq_plugins.models.running import call_model, own_copy, run_model
from mpq_plugins.plans.plan import Plan

from ..shared.batches import needed_batches
from ..shared.input_ranges import found_ranges, taken_ranges
from .checks import check
from .quantizer import PlanQuantizer


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> torch.fx.GraphModule:
    """Make a converted copy of the model, exported for inputs of the first batch's shapes.

    To export in another way, use PlanQuantizer with torch's own export, prepare_pt2e and convert_pt2e.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Inputs, each a tensor, or a tuple or mapping of arguments; the first one's shapes are exported. With
            8-bit activations all are run, and have these shapes: ranges of inputs are found on them as the plan says,
            unless the model carries them.

    Returns:
        What torchao's `convert_pt2e` makes.

    Raises:
        SettingError: As PlanQuantizer; or there is no batch, or one that the model does not run on.
        MismatchError: As PlanQuantizer.
        SourceError: torch.export fails.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import pt2e
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> converted = pt2e.apply(net, plan, [torch.randn(2, 8)])
        >>> pt2e.verify(converted, plan, net)[0].bits
        ((4, 8),)
    """
    bare, ranges = taken_ranges(plan, model)
    check(plan, bare)
    given = needed_batches(batches, "PT2E exports the model by one")
    exported = _exported(bare, given[0])
    if plan.quantizes_inputs and not ranges:
        ranges = found_ranges(bare, plan, given, uncalled=True)
    prepared = cast(nn.Module, prepare_pt2e(exported, PlanQuantizer(plan, bare, ranges)))
    if plan.quantizes_inputs:
        with torch.no_grad():
            for batch in given:
                call_model(prepared, batch)
    return cast(torch.fx.GraphModule, convert_pt2e(prepared))


def _exported(model: nn.Module, batch: Any) -> nn.Module:
    example = own_copy(batch)  # for an exported program keeps its example, and of a view all that it is a view of
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = () if kwargs else tuple(example) if isinstance(example, list | tuple) else (example,)
    try:
        return torch.export.export(model, args, kwargs).module()
    except Exception as error:  # whatever a user's forward makes of it
        run_model(model, batch)  # raises SettingError where it is the batch that is wrong
        raise SourceError(
            f"{type(model).__name__}: torch.export cannot export it ({what_it_said(error)}). Rewrite what depends on "
            "values, or use mpq_plugins.apply or the torchao adapter, which do not export"
        ) from error
