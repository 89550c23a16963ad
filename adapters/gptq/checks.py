"""What a GPTQ checkpoint holds, and what is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mpq_plugins.common.checks import shown
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.arguments import check_plan
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan

from ..shared.float_checkpoint import FloatCheckpoint, open_float, require_plain
from ..shared.folded import INTEGER_SCHEMES
from ..shared.fused import require_fused_alike

CAPABILITIES = Capabilities(
    backend="gptq",
    bits=(2, 3, 4, 8),  # 5, 6 and 7 have another layout, in which a stream of bits is read wrong without an error
    kinds=("linear",),
    schemes=INTEGER_SCHEMES,
    symmetric=(False, True, "full"),
    granularities=("per_tensor", "per_channel", "per_group"),
)
SYMMETRIC = tuple(symmetric for symmetric in CAPABILITIES.symmetric if symmetric)
RUNTIMES: Mapping[str, Capabilities] = {
    "gptqmodel": CAPABILITIES,
    "vllm": replace(CAPABILITIES, bits=(4, 8), symmetric=SYMMETRIC),
}


def check(plan: Plan, source: Path, *, runtime: str = "gptqmodel") -> None:
    """Check that the plan of this checkpoint can be exported.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.
        runtime: What is to load it. vLLM takes 4 and 8 bits, symmetric, and one scheme for layers that it fuses.

    Raises:
        SettingError: The format or the runtime cannot hold the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.

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
        >>> gptq.check(plan, source)
    """
    checked(plan, source, runtime)


def checked(plan: Plan, source: Path, runtime: str) -> FloatCheckpoint:
    """The checkpoint, of which the plan can be exported."""
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise SettingError(f"runtime: {shown(runtime)} is not allowed; {', '.join(RUNTIMES)}")
    check_plan(plan)
    require_legal(plan, RUNTIMES[runtime])
    opened = open_float(plan, source)
    require_plain(opened, "GPTQ")
    for _, choice in opened.coded_weights:
        _require_whole_words(choice)
    if runtime == "vllm":
        require_fused_alike(opened, "vLLM", "for GPTQModel, export with the runtime gptqmodel")
    return opened


def _require_whole_words(choice: LayerChoice) -> None:
    """Refuse what does not fill words of 32 bits: codes along the inputs, zero points along the outputs."""
    assert choice.bits is not None, "one width a layer"
    multiple = 32 if choice.bits == 3 else 32 // choice.bits
    for side, count in zip(("outputs", "inputs"), choice.shape, strict=True):
        if count % multiple:
            raise SettingError(
                f"layer {choice.name!r}: {count} {side} are no multiple of {multiple}, as GPTQ has it at {choice.bits} "
                f"bits; pin the layer to a wider width or to float (--pin {choice.name}=32), or skip it"
            )
