"""Writing a checkpoint with the plan's codes as compressed-tensors keeps them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.weights.roles import is_head

from ..contract import Exported
from ..shared.exporting import configured, write_directory
from ..shared.float_checkpoint import FloatCheckpoint
from .checks import checked
from .config import quantization_config
from .tensors import encode, is_symmetric


def export(
    source: Path, plan: Plan, output: Path, *, runtime: str = "vllm", progress: Progress | None = None
) -> Exported:
    """Write the checkpoint with the plan's codes; an interruption leaves nothing half written.

    Args:
        source: The float checkpoint, a directory with its config.json.
        plan: The plan.
        output: The new directory to write.
        runtime: What is to load it, as `check` has it.
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
        >>> from mpq_plugins.adapters import compressed_tensors
        >>> source = Path("net")
        >>> source.mkdir(exist_ok=True)
        >>> save_file({"fc.weight": torch.randn(32, 64)}, source / "model.safetensors")
        >>> (source / "config.json").write_text("{}")
        2
        >>> scheme = mpq.Affine(granularity="per_channel", symmetric=True)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(source, scheme))
        >>> compressed_tensors.export(source, plan, Path("net-exported")).layers
        1
    """
    opened = checked(plan, path_of("source", source), runtime)
    coarse: list[float] = []

    def encoded(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
        tensors = encode(parameter, choice, stored)
        scale = tensors[f"{parameter}_scale"]
        if scale.dtype == torch.float32 != stored.dtype:
            coarse.append(_rounding(scale, stored.dtype))
        return tensors

    def notes() -> Iterator[str]:
        yield from _notes(opened, runtime)
        if coarse:
            yield (
                f"scales of {len(coarse)} layers are in float32, and a loader that runs the model in its own 16 bits "
                f"rounds them: weights there are off by up to {max(coarse):.1g} of themselves. Load in float32"
            )

    files = configured(opened, quantization_config=quantization_config(opened))
    return write_directory(opened, path_of("output", output), encoded, files, notes=notes, progress=progress)


def _rounding(scale: Tensor, dtype: torch.dtype) -> float:
    """By how much of itself a scale changes at most, rounded to the dtype."""
    return float(
        ((scale.to(dtype).float() - scale).abs() / scale.abs().clamp(min=torch.finfo(torch.float32).tiny)).max()
    )


def _notes(source: FloatCheckpoint, runtime: str) -> Iterator[str]:
    coded = [choice for _, choice in source.coded_weights]
    bytewise = sum(not is_symmetric(choice) for choice in coded)
    binary = sum(choice.bits == 1 for choice in coded)
    odd = sorted({choice.bits for choice in coded if choice.bits not in (4, 8, None)} - {1})
    if bytewise:
        yield f"{bytewise} asymmetric layers take one byte a weight, whatever their width"
    if binary:
        yield f"{binary} layers of one bit take two bits a weight, for the format has no -1 and +1 in one"
    heads = [choice.name for choice in coded if is_head(choice.name)]
    if runtime == "vllm" and heads:
        yield f"{heads[0]!r} is packed, and vLLM has taken output heads in float alone; skip it (--skip role:lm_head)"
    if runtime == "vllm" and (odd or binary):
        yield f"{', '.join(map(str, odd or [2]))} bits need a recent vLLM; older ones took 4 and 8 bits alone"
