"""A model quantized by Neural Compressor with a plan. Importing this module registers our configurations with it."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.plan import Plan

from ..shared.compressor_quiet import quiet, quiet_import
from ..shared.folded import check_types, refuse_transformers_conv1d
from .config import PlanConfig
from .quantizing import register

with quiet_import():
    from neural_compressor.torch.quantization import quantize


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> nn.Module:
    """Make a copy of the model, quantized by Neural Compressor with the plan.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Weights alone are quantized, which needs none.

    Returns:
        The copy, which carries its plan.

    Raises:
        MismatchError: The plan is another model's. The message names layers and the remedy.
        SettingError: The plan quantizes activations.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> torch.equal(inc.apply(net, plan)[0].weight, mpq.apply(net, plan)[0].weight)
        True
    """
    check_types(plan, model)
    refuse_transformers_conv1d(plan, model)
    with quiet():
        return cast(nn.Module, quantize(duplicate(model), PlanConfig(plan)))


register()
