"""Proof that a checkpoint holds the plan's codes, read back from its files."""

from functools import partial
from pathlib import Path

from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.plans.plan import Plan

from ..contract import LayerCheck
from ..shared.exporting import Found, verify_directory
from ..shared.float_checkpoint import open_float
from .config import files
from .experts import StackedFound, stacks
from .tensors import decode


def verify(exported: Path, plan: Plan, source: Path, *, progress: Progress | None = None) -> tuple[LayerCheck, ...]:
    """Read the written files back and compare every code, scale and float tensor with the plan's of the checkpoint.

    Args:
        exported: What `export` wrote.
        plan: The plan.
        source: The float checkpoint.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        A check for each planned layer that is stored as codes.

    Raises:
        VerifyError: The files do not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SourceError: Files cannot be read.

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
        >>> exported = mlx.export(source, plan, Path("net-verified"))
        >>> mlx.verify(exported.path, plan, source)[0].bits
        ((4, 32),)
    """
    opened = open_float(plan, source)
    reading = partial(StackedFound, opened) if stacks(opened) else Found
    return verify_directory(
        path_of("exported", exported), opened, decode, files(opened), reading=reading, progress=progress
    )
