"""What an MLX checkpoint holds, and what is refused by name."""

from pathlib import Path

from mpq_plugins.errors import SettingError
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan

from ..shared.float_checkpoint import FloatCheckpoint, open_float, require_plain
from ..shared.folded import INTEGER_SCHEMES
from .experts import require_experts_alike
from .tensors import SIZES, group_size

CAPABILITIES = Capabilities(
    backend="mlx",
    bits=(2, 3, 4, 5, 6, 8),
    kinds=("linear", "embedding"),
    schemes=INTEGER_SCHEMES,
    symmetric=(False, True, "full"),
    granularities=("per_tensor", "per_channel", "per_group"),
    group_sizes=SIZES,
)


def check(plan: Plan, source: Path) -> None:
    """Check that the plan of this checkpoint can be exported.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.

    Raises:
        SettingError: MLX cannot hold the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.

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
        >>> mlx.check(plan, source)
    """
    checked(plan, source)


def checked(plan: Plan, source: Path) -> FloatCheckpoint:
    """The checkpoint, of which the plan can be exported."""
    check_plan(plan)
    require_legal(plan, CAPABILITIES)
    opened = open_float(plan, source)
    require_plain(opened, "MLX")
    for _, choice in opened.coded_weights:
        if group_size(choice) is None:
            raise SettingError(
                f"layer {choice.name!r}: {choice.shape[1]} inputs divide into no groups of "
                f"{', '.join(map(str, SIZES))}, without which MLX has no codes; skip the layer, or pin it "
                f"to float (--pin {choice.name}=32)"
            )
        if choice.name.endswith(".kv_b_proj"):
            raise SettingError(
                f"layer {choice.name!r}: mlx-lm makes other matrices of it as it loads it; skip it "
                "(--skip '*.kv_b_proj')"
            )
    require_experts_alike(opened)
    return opened
