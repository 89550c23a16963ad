"""What Neural Compressor calls to prepare, convert or quantize a model by one of our configurations."""

from collections.abc import Mapping
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from mpq_plugins.apply import apply as simulated
from mpq_plugins.errors import SettingError
from mpq_plugins.fold import fold_in_place
from mpq_plugins.plan import Plan
from mpq_plugins.weights import quantizable_weights

from .inc_config import CONFIGS, PlanningConfig, joint_plan
from .inc_files import save
from .inc_quiet import quiet_import

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


@torch.no_grad()
def quantize_entry(
    model: nn.Module, configs_mapping: Mapping[tuple[str, str], Any], *_: Any, mode: Any = Mode.QUANTIZE, **__: Any
) -> nn.Module:
    """Quantize the model itself, as Neural Compressor wants it; to prepare it is only to make sure that it will work.

    Nothing is changed before the whole plan and all weights are made, so that an error leaves the model as it was.
    Raises SettingError for a model quantized before, and what the configurations raise.
    """
    if hasattr(model, "mpq_plan"):
        raise SettingError(f"{type(model).__name__}: is quantized already; start from the float model, or a copy of it")
    configs = {name: config for (name, _), config in configs_mapping.items() if isinstance(config, PlanningConfig)}
    plan = joint_plan(model, configs)
    if mode == Mode.PREPARE:
        return model
    weights = quantizable_weights(simulated(model, plan))
    if plan.fold_bn:
        fold_in_place(model)
    for name, weight in quantizable_weights(model).items():
        weight.copy_(weights[name])
    own = cast(Any, model)
    own.mpq_plan, own.qconfig, own.save = plan, configs_mapping, MethodType(save, model)
    return model


def plan_of(quantized: nn.Module) -> Plan:
    """The plan that a model was quantized by. Raises SettingError where it was not by ours."""
    plan = getattr(quantized, "mpq_plan", None)
    if not isinstance(plan, Plan):
        raise SettingError(f"{type(quantized).__name__}: was not quantized by one of our configurations")
    return plan
