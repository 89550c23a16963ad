"""A plan as a GPTQ checkpoint with a width for each layer, which GPTQModel loads: the plan's codes, float16 scales.

    exported = gptq.export(source, plan, output)
    gptq.verify(output, plan, source)

Linear layers at 2, 3, 4 and 8 bits. Nothing is rounded by GPTQ, whatever the format's name; GPTQModel is not needed.
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
