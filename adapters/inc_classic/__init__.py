"""Plans in the classic Intel Neural Compressor, up to 3.7: tuning strategies for `quantization.fit`.

    from mpq_plugins.adapters import inc_classic           # registers the strategies mixquant, ptilmpq and plan
    conf = PostTrainingQuantConfig(
        approach="weight_only", quant_level=1,
        tuning_criterion=inc_classic.TuningCriterion("mixquant", {"qem": [4, 3, 2, 1.5]}),
    )
    q_model = quantization.fit(model, conf, eval_func=accuracy)      # or inc_classic.fit, the same without the chatter
    inc_classic.verify(q_model, inc_classic.plan_of(q_model), model)

approach="weight_only": weights are the plan's, to the bit those of `mpq.apply`, convolutions and channel parts
included. approach="static": the classic API has int8 and fp32 alone there, so a layer that the plan gives fewer than
`int8_below` bits (8) becomes int8 by the compressor's own scales, and the others stay in fp32.
"""

from ..shared.compressor_plans import CAPABILITIES, check
from .criterion import TuningCriterion
from .fitting import apply, fit, plan_of, tune, tuning_of
from .strategy import MixQuantTuneStrategy, PlanTuneStrategy, PTILMPQTuneStrategy, register
from .verification import verify

__all__ = [
    "CAPABILITIES",
    "MixQuantTuneStrategy",
    "PTILMPQTuneStrategy",
    "PlanTuneStrategy",
    "TuningCriterion",
    "apply",
    "check",
    "fit",
    "plan_of",
    "register",
    "tune",
    "tuning_of",
    "verify",
]
