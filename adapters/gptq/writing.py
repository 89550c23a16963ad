"""Writing a checkpoint with the plan's codes as GPTQ keeps them."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mpq_plugins.checkpoints.readers import StoredTensor
from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from ..contract import Exported
from ..shared.exporting import write_directory
from .checks import checked
from .config import files, version
from .tensors import encode


def export(
    source: Path, plan: Plan, output: Path, *, runtime: str = "gptqmodel", progress: Progress | None = None
) -> Exported:
    """Write the checkpoint with the plan's codes; an interruption leaves nothing half written.

    Scales are rounded to float16, as the format has it; the notes say by how much weights change.

    Args:
        source: The float checkpoint, a directory with its config.json.
        plan: The plan.
        output: The new directory to write.
        runtime: What is to load it, as `check` has it.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        What was written.

    Raises:
        SettingError: As `check`; float16 does not hold a layer's scales; or the output cannot be there.
        MismatchError: As `check`.
        SourceError: As `check`; or writing fails.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from mpq_plugins.adapters import gptq
        >>> source = Path("net")
        >>> source.mkdir(exist_ok=True)
        >>> save_file({"fc.weight": torch.randn(32, 64)}, source / "model.safetensors")
        >>> (source / "config.json").write_text("{}")
        2
        >>> scheme = mpq.Affine(granularity="per_channel", symmetric=True)
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(source, scheme))
        >>> gptq.export(source, plan, Path("net-exported")).layers
        1
    """
    opened = checked(plan, path_of("source", source), runtime)
    own_version, off = version(opened), dict[str, float]()

    def encoded(parameter: str, choice: LayerChoice, stored: StoredTensor) -> dict[str, Tensor]:
        layer = encode(parameter, choice, stored, own_version)
        off[choice.name] = layer.off
        return layer.tensors

    def notes() -> Iterator[str]:
        rounded = {name: share for name, share in off.items() if share}
        if rounded:
            worst = max(rounded, key=lambda name: rounded[name])
            yield (
                f"scales are in float16, by which weights of {len(rounded)} layers change, at most by "
                f"{rounded[worst]:.2g} of a layer's largest ({worst})"
            )
        if len({choice.bits for _, choice in opened.coded_weights}) > 1:
            yield "transformers' own loader takes one width for all layers; GPTQModel takes these"

    return write_directory(opened, path_of("output", output), encoded, files(opened), notes=notes, progress=progress)
