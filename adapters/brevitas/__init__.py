"""A plan in Brevitas: its own quantized layers on the plan's grid, and all that Brevitas does with them afterwards.

    quantized = brevitas.to_brevitas(model, plan)           # a new model; weights equal mpq_plugins.apply's to the bit
    brevitas.verify(quantized, plan, model)                 # read back, and compared
    quantized = brevitas.gptq(quantized, batches)           # or gpfq, learned_round, correct_bias, train
    brevitas.verify_tuned(quantized, plan)                  # bit-widths and levels, read back from the Brevitas model
    brevitas.save(quantized, plan, "net.safetensors")       # the file carries its plan
    brevitas.export(quantized, plan, "net.onnx", images, format="onnx_qcdq")

Who calls Brevitas themselves gets a drop-in `compute_layer_map`:

    layerwise_quantize(model, compute_layer_map=brevitas.layer_map(plan, model))

Layers that the plan leaves in float stay torch's own. Scales are parameters that start at the plan's; zero points and
widths are fixed.
"""

from .checks import CAPABILITIES, check
from .conversion import apply, to_brevitas
from .exporting import FORMATS, export
from .files import load, save
from .layer_maps import layer_map
from .rounding import learned_round
from .training import distillation, train
from .tuning import calibrate, correct_bias, gpfq, gptq
from .verification import verify, verify_tuned

__all__ = [
    "CAPABILITIES",
    "FORMATS",
    "apply",
    "calibrate",
    "check",
    "correct_bias",
    "distillation",
    "export",
    "gpfq",
    "gptq",
    "layer_map",
    "learned_round",
    "load",
    "save",
    "to_brevitas",
    "train",
    "verify",
    "verify_tuned",
]
