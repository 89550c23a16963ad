"""What Neural Compressor calls to prepare, convert or quantize a model by one of our configurations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpq_plugins.common.text import what_it_said
from mpq_plugins.errors import SettingError
from mpq_plugins.models.folding import fold_in_place
from mpq_plugins.models.input_ranges import refuse_input_ranges
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.model import simulated

from ..shared.compressor_quiet import quiet_import
from ..shared.fitting import fitted
from .config import CONFIGS, PlanningConfig
from .files import save
from .joint import joint_plan
from .marks import mark

with quiet_import():
    from neural_compressor.common.base_config import register_config
    from neural_compressor.common.utils import Mode
    from neural_compressor.torch.utils import register_algo

PRIORITY = 10  # below Neural Compressor's own, which its default tuning then tries first


def register() -> None:
    """Make our algorithms known to Neural Compressor. Importing `inc` has done it; again does no harm."""
    for config in CONFIGS:
        register_config(framework_name="torch", algo_name=config.name, priority=PRIORITY)(config)
        register_algo(config.name)(quantize_entry)


@torch.inference_mode(False)
@torch.no_grad()
def quantize_entry(
    model: nn.Module, configs_mapping: Mapping[tuple[str, str], Any], *_: Any, mode: Any = Mode.QUANTIZE, **__: Any
) -> nn.Module:
    """Quantize the model itself, as Neural Compressor wants it; to prepare it is only to make sure that it will work.

    Nothing is changed before the whole plan and all weights are made, so that an error leaves the model as it was.
    Raises SettingError for a model quantized before, or that quantizes inputs, and what the configurations raise.
    """
    refuse_input_ranges(model)
    configs = {name: config for (name, _), config in configs_mapping.items() if isinstance(config, PlanningConfig)}
    plan = joint_plan(model, configs)
    if mode == Mode.PREPARE:
        return model
    exact = fitted(model, plan)
    made = quantizable_weights(_simulated(exact, plan))
    if plan.fold_bn:
        fold_in_place(model, plan.skipped)
    if exact is not model:
        _put_corrections(model, exact)
    choices = plan.by_any_name
    for name, weight in quantizable_weights(model).items():
        if name in choices and choices[name].bits != 32:
            _put(model, choices[name], weight, made[name].detach())
    mark(model, plan, configs_mapping, save)
    return model


def _put_corrections(model: nn.Module, exact: nn.Module) -> None:
    """Give the model the biases and statistics of a copy that was rounded on inputs; its weights come after."""
    own = dict(model.named_modules())
    for name, module in exact.named_modules():
        if "bias" in module._parameters and module.bias is not None:
            own[name].bias = module.bias
        for key, value in module._buffers.items():
            own[name]._buffers[key] = value


def _simulated(model: nn.Module, plan: Plan) -> nn.Module:
    try:
        return simulated(model, plan)
    except (TypeError, RuntimeError) as error:
        raise SettingError(f"{type(model).__name__}: cannot be copied ({what_it_said(error)})") from error


def _put(model: nn.Module, layer: LayerChoice, weight: Tensor, made: Tensor) -> None:
    """Give a layer its weight, in its memory where other processes look at that."""
    if weight.is_inference():  # made in inference_mode, and not to be changed outside
        parameter = nn.Parameter(made, requires_grad=weight.requires_grad)
        for name in layer.names:
            model.get_submodule(name).weight = parameter
    elif weight.device.type == "cpu" and weight.is_shared():
        weight.copy_(made)
    else:
        weight.data = made  # whatever memory it had in common, it has its own now, as in a copy
