"""A model quantized by Neural Compressor with a plan. Importing this module registers our configurations with it."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.plan import Plan

from ..shared.compressor_quiet import quiet, quiet_import
from ..shared.folded import check_types
from .config import PlanConfig
from .quantizing import register

with quiet_import():
    from neural_compressor.torch.quantization import quantize


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> nn.Module:
    """A copy of the model, quantized by Neural Compressor with the plan; the model is unchanged.

    batches: weights alone are quantized, which needs none. Raises MismatchError (another model) and SettingError
    (quantized activations), naming layers and remedy.
    """
    check_types(plan, model)
    with quiet():
        return cast(nn.Module, quantize(duplicate(model), PlanConfig(plan)))


register()
