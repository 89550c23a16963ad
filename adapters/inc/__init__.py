"""Plans in Intel Neural Compressor 3.8 and later: registered configurations, tuning, and its own weight-only configs.

    from mpq_plugins.adapters import inc                            # registers MixQuantConfig and its kin
    quantized = quantize(model, inc.MixQuantConfig(qem=2.0))        # Neural Compressor's own quantize
    tuned = inc.autotune(model, TuningConfig(config_set=inc.MixQuantConfig(qem=[4, 3, 2])), eval_fn=accuracy)
    inc.verify(tuned, inc.plan_of(tuned), model)
    inc.save(tuned, "saved")                                        # inc.load("saved", model)

What is quantized by a plan keeps its modules; their weights are the plan's, to the bit those of `mpq.apply`.
"""

from ..shared.compressor_plans import CAPABILITIES
from .checks import check
from .config import CONFIGS, MixQuantConfig, PlanConfig, PTILMPQConfig
from .conversion import apply
from .files import load, save
from .marks import plan_of
from .native import RTN_CAPABILITIES, to_inc
from .quantizing import register
from .tuning import autotune, tune, tuning_of
from .verification import verify

__all__ = [
    "CAPABILITIES",
    "CONFIGS",
    "RTN_CAPABILITIES",
    "MixQuantConfig",
    "PTILMPQConfig",
    "PlanConfig",
    "apply",
    "autotune",
    "check",
    "load",
    "plan_of",
    "register",
    "save",
    "to_inc",
    "tune",
    "tuning_of",
    "verify",
]
