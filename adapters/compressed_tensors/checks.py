"""What a compressed-tensors checkpoint holds, and what is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mpq_plugins.common.checks import shown
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan

from ..shared.float_checkpoint import FloatCheckpoint, open_float, require_plain
from ..shared.folded import INTEGER_SCHEMES
from ..shared.fused import require_fused_alike, require_own_scales
from .tensors import is_symmetric

CAPABILITIES = Capabilities(
    backend="compressed_tensors",
    bits=tuple(range(1, 9)),
    kinds=("linear",),
    schemes=(*INTEGER_SCHEMES, "nvfp4"),
    symmetric=(True, "full"),
    granularities=("per_tensor", "per_channel", "per_group"),
)
RUNTIMES: Mapping[str, Capabilities] = {
    "vllm": CAPABILITIES,
    "transformers": replace(CAPABILITIES, symmetric=(False, *CAPABILITIES.symmetric)),
}
FOR_TRANSFORMERS = "for transformers alone, export with --runtime transformers"


def check(plan: Plan, source: Path, *, runtime: str = "vllm") -> None:
    """Check that the plan of this checkpoint can be exported.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.
        runtime: What is to load it. vLLM has one scheme for layers that it fuses, one scale of the layer too (nvfp4),
            and packed codes alone, which are symmetric; transformers takes every layer by itself, and asymmetric ones
            at one byte a weight.

    Raises:
        SettingError: The runtime cannot load the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.

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
        >>> compressed_tensors.check(plan, source)
    """
    checked(plan, source, runtime)


def checked(plan: Plan, source: Path, runtime: str) -> FloatCheckpoint:
    """The checkpoint, of which the plan can be exported."""
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise SettingError(f"runtime: {shown(runtime)} is not allowed; {', '.join(RUNTIMES)}")
    check_plan(plan)
    if runtime == "vllm":
        _require_symmetric(plan)
    require_legal(plan, RUNTIMES[runtime])
    opened = open_float(plan, source)
    require_plain(opened, "compressed-tensors")
    if runtime == "vllm":
        require_fused_alike(opened, "vLLM", FOR_TRANSFORMERS)
        require_own_scales(opened, "vLLM", FOR_TRANSFORMERS)
    return opened


def _require_symmetric(plan: Plan) -> None:
    layers = [layer for layer in plan.layers if layer.kind == "linear" and not layer.in_float]
    asymmetric = [layer.name for layer in layers if not is_symmetric(layer)]
    if asymmetric:
        raise SettingError(
            f"layer {asymmetric[0]!r}, one of {len(asymmetric)} such, has zero points, with which packed checkpoints "
            "do not load. Plan with --symmetric, or export with --runtime transformers, at one byte a weight"
        )
