"""A plan in torchao: its own quantized tensors, built from the plan's integers.

    quantized = torchao.apply(model, plan)        # a copy; exact, channel parts included
    torchao.verify(quantized, plan, model)        # integer codes against the plan's
    quantize_(model, torchao.to_config(plan))     # stock torchao: the plan's widths, torchao's own scales

Importing this module teaches torchao's IntxUnpackedToInt8Tensor the one-dimensional convolution, so import it
before loading a model that has one. Nothing is packed: a weight of any width takes a byte.
"""

from .checks import CAPABILITIES, check
from .config import CONFIG_CAPABILITIES, to_config
from .tensors import apply
from .verification import verify

__all__ = [
    "CAPABILITIES",
    "CONFIG_CAPABILITIES",
    "apply",
    "check",
    "to_config",
    "verify",
]
