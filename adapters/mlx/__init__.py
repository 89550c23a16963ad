"""A plan as an MLX checkpoint, which mlx-lm loads and runs packed: the plan's codes, a scale and a bias for each group.

    exported = mlx.export(source, plan, output)
    mlx.verify(output, plan, source)

Linear layers and embeddings, at 2, 3, 4, 5, 6 and 8 bits. MLX itself is not needed to write one.
"""

from .checks import CAPABILITIES, check
from .verification import verify
from .writing import export

__all__ = [
    "CAPABILITIES",
    "check",
    "export",
    "verify",
]
