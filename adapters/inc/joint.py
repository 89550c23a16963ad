"""One plan for a model from the configurations of its layers."""

from collections.abc import Mapping

from torch import nn

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.measurement.error import weights_fingerprint
from mpq_plugins.models.kinds import layer_kind
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan
from mpq_plugins.weights.find import find_weights

from ..shared.compressor_plans import CAPABILITIES
from .config import PlanConfig, PlanningConfig


def joint_plan(model: nn.Module, configs: Mapping[str, PlanningConfig]) -> Plan:
    """One plan from the configuration of each layer, by name; layers that have none stay in float.

    Raises MismatchError and SettingError as the configurations do, and SettingError for layers of one weight that
    have different ones, or for a plan with quantized activations.
    """
    every = [name for name, module in model.named_modules() if layer_kind(module)]
    distinct: list[PlanningConfig] = []
    for config in configs.values():
        if config not in distinct:
            distinct.append(config)
    left_out = [] if isinstance(distinct[0], PlanConfig) else [name for name in every if name not in configs]
    plans = [config.plan_for(model, left_out) for config in distinct]
    if len(plans) == 1:
        require_legal(plans[0], CAPABILITIES)
        return plans[0]
    layers: list[LayerChoice] = []
    skipped: list[str] = []
    names = dict.fromkeys(name for plan in plans for layer in plan.layers for name in layer.names)
    done: set[str] = set()
    for name in (name for name in every if name in names and name not in done):
        config = configs[name]
        layer = plans[distinct.index(config)].by_any_name.get(name)
        tied = next(plan.by_any_name[name].names for plan in plans if name in plan.by_any_name)
        if any(configs.get(other, config) != config for other in tied):
            alike = first_few([repr(other) for other in tied], ", ")
            raise SettingError(f"set_local: {alike} share a weight; configure them alike")
        done |= {*tied}
        if layer is None:
            skipped.append(name)
        else:
            layers.append(layer)
    planned = {layer.name for layer in layers}
    skipped += [name for plan in plans for name in plan.skipped if name not in planned]
    weights = (weight for weight in find_weights(model, refuse=False) if weight.name in planned)
    update = {
        "layers": tuple(layers), "skipped": tuple(dict.fromkeys(skipped)), "model": weights_fingerprint(weights)
    }  # fmt: skip
    return plans[0].model_copy(update=update)
