"""A plan as a compressed-tensors checkpoint, which transformers and vLLM load: the plan's codes and scales, packed.

    exported = compressed_tensors.export(source, plan, output)     # symmetric, and fused layers alike, for vLLM
    compressed_tensors.export(source, plan, output, runtime="transformers")     # whatever transformers loads
    compressed_tensors.verify(output, plan, source)

Linear layers alone are quantized; embeddings stay in float, as the format has it.
"""

from .checks import CAPABILITIES, RUNTIMES, check
from .verification import verify
from .writing import export

__all__ = [
    "CAPABILITIES",
    "RUNTIMES",
    "check",
    "export",
    "verify",
]
