"""Plans in Intel Neural Compressor 3.8 and later: registered configurations, tuning, and its own weight-only configs.

    from mpq_plugins.adapters import inc                            # registers MixQuantConfig and its kin
    quantized = quantize(model, inc.MixQuantConfig(qem=2.0))        # Neural Compressor's own quantize
    tuned = inc.autotune(model, TuningConfig(config_set=inc.MixQuantConfig(qem=[4, 3, 2])), eval_fn=accuracy)
    inc.verify(tuned, inc.plan_of(tuned), model)
    inc.save(tuned, "saved")                                        # inc.load("saved", model)

What is quantized by a plan keeps its modules; their weights are the plan's, to the bit those of `mpq.apply`.
"""

from typing import cast

from torch import nn

from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.plan import Plan

from .folded import check_types
from .inc_config import CONFIGS, MixQuantConfig, PlanConfig, PTILMPQConfig
from .inc_files import load, save
from .inc_native import RTN_CAPABILITIES, to_inc
from .inc_plan import CAPABILITIES
from .inc_quantize import plan_of, register
from .inc_quiet import quiet, quiet_import
from .inc_tune import autotune, tune, tuning_of
from .inc_verify import LayerCheck, verify

with quiet_import():
    from neural_compressor.torch.quantization import quantize

__all__ = [
    "CAPABILITIES",
    "CONFIGS",
    "RTN_CAPABILITIES",
    "LayerCheck",
    "MixQuantConfig",
    "PTILMPQConfig",
    "PlanConfig",
    "apply",
    "autotune",
    "load",
    "plan_of",
    "register",
    "save",
    "to_inc",
    "tune",
    "tuning_of",
    "verify",
]


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model, quantized by Neural Compressor with the plan; the model is unchanged.

    Raises MismatchError (another model) and SettingError (quantized activations), naming layers and remedy.
    """
    check_types(plan, model)
    with quiet():
        return cast(nn.Module, quantize(duplicate(model), PlanConfig(plan)))


register()
