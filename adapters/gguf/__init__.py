"""A plan as a GGUF file, which llama.cpp runs: ggml's own types, or the plan's codes in the plain ones.

    exported = gguf.export(source, plan, output)    # source: the model's GGUF file, best in floating point
    gguf.verify(output, plan, source)               # every block read back
    text = gguf.config(plan, source)                # for llama-quantize --tensor-type-file, which rounds itself
    text = gguf.types_file(plan, "llama", 32)       # the same without a file of the model

Layers under `GGML` are rounded by ggml. Affine codes keep their values: symmetric ones of 4, 5 and 8 bits become Q4_0,
Q5_0 and Q8_0, asymmetric ones of 4 and 5 bits Q4_1 and Q5_1, with scales of half precision.
"""

from .checks import CAPABILITIES, check
from .type_files import config, types_file
from .verification import verify
from .writing import export

__all__ = [
    "CAPABILITIES",
    "check",
    "config",
    "export",
    "types_file",
    "verify",
]
