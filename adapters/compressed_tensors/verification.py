"""Proof that a checkpoint holds the plan's codes, read back from its files."""

from pathlib import Path

from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.plans.plan import Plan

from ..contract import LayerCheck
from ..shared.exporting import configured, verify_directory
from ..shared.float_checkpoint import open_float
from .config import quantization_config
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
        >>> from mpq_plugins.adapters import compressed_tensors
        >>> source = Path("net")
        >>> source.mkdir(exist_ok=True)
        >>> save_file({"fc.weight": torch.randn(32, 64)}, source / "model.safetensors")
        >>> (source / "config.json").write_text("{}")
        2
        >>> scheme = mpq.Affine(granularity="per_channel", symmetric=True)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(source, scheme))
        >>> exported = compressed_tensors.export(source, plan, Path("net-verified"))
        >>> compressed_tensors.verify(exported.path, plan, source)[0].bits
        ((4, 32),)
    """
    opened = open_float(plan, source)
    files = configured(opened, quantization_config=quantization_config(opened))
    return verify_directory(path_of("exported", exported), opened, decode, files, progress=progress)
