"""A plan in PyTorch's FX graph mode quantization: `prepare_fx`, `convert_fx` and `convert_to_reference_fx`.

    quantized = fx.apply(model, plan, batches)           # all of what follows
    prepared = fx.prepare(model, plan, example_inputs)   # a copy; the model is not changed
    prepared(batch)                                      # calibrate: activations only, weights are the plan's
    quantized = convert_fx(prepared)                     # torch's own
    fx.verify(quantized, plan, model, batch=batch)       # integer codes against the plan's, outputs against apply's

Backends compute scales their own way, and their 4 bits are not ours. So BatchNorm is folded, the plan's integers
are worked out here, the weights are set to what those integers mean, and torch is handed observers that return the
stored scales and zero points. Kernels work on int8: nothing is packed, so a 4-bit layer takes 8 bits on disk.
Between planned layers, ReLU, sums and max pooling work on 8-bit codes too; everything else runs in float.
"""

from ..shared.folded import folded_integers
from .checks import CAPABILITIES
from .conversion import apply
from .inputs import PercentileObserver
from .preparation import (
    PlanWeight,
    bake,
    check,
    finish_qat,
    needs_reduced_range,
    prepare,
    qconfig_mapping,
)
from .verification import TOLERANCE, verify

__all__ = [
    "CAPABILITIES",
    "TOLERANCE",
    "PercentileObserver",
    "PlanWeight",
    "apply",
    "bake",
    "check",
    "finish_qat",
    "folded_integers",
    "needs_reduced_range",
    "prepare",
    "qconfig_mapping",
    "verify",
]
