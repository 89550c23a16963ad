"""Writing a checkpoint with the plan's codes as MLX keeps them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from ..contract import Exported
from ..shared.exporting import write_directory
from ..shared.shard_writer import ShardWriter
from .checks import checked
from .config import files
from .experts import StackingWriter, stacks
from .tensors import encode


def export(source: Path, plan: Plan, output: Path, *, progress: Progress | None = None) -> Exported:
    """Write the checkpoint with the plan's codes; an interruption leaves nothing half written.

    Args:
        source: The float checkpoint, a directory with its config.json.
        plan: The plan.
        output: The new directory to write.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        What was written.

    Raises:
        SettingError: As `check`; or the output cannot be there.
        MismatchError: As `check`.
        SourceError: As `check`; or writing fails.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from mpq_plugins.adapters import mlx
        >>> source = Path("net")
        >>> source.mkdir(exist_ok=True)
        >>> save_file({"fc.weight": torch.randn(32, 64)}, source / "model.safetensors")
        >>> (source / "config.json").write_text("{}")
        2
        >>> scheme = mpq.Affine(granularity="per_channel", symmetric=True)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(source, scheme))
        >>> mlx.export(source, plan, Path("net-exported")).layers
        1
    """
    opened = checked(plan, path_of("source", source))
    wide: list[str] = []

    def encoded(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
        tensors = encode(parameter, choice, stored)
        if stored.dtype != torch.float32 and any(tensor.dtype == torch.float32 for tensor in tensors.values()):
            wide.append(parameter)
        return tensors

    def notes() -> Iterator[str]:
        if wide:
            yield (
                f"scales and biases of {len(wide)} layers are in float32, for the model's 16 bits do not hold them, "
                "and MLX computes in float32 after such a layer"
            )

    writing = partial(StackingWriter, opened) if stacks(opened) else partial(ShardWriter, metadata="mlx")
    return write_directory(
        opened, path_of("output", output), encoded, files(opened), notes=notes, writing=writing, progress=progress
    )
