"""A plan as a ModelOpt recipe for quantization after training: the widths of weight quantizers, by exact names.

    text = modelopt.config(plan, source)     # YAML, for modelopt.recipe.load_recipe

`max` calibration has the grid of a symmetric `minmax` plan, so weights are the plan's but for rounding.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from mpq_plugins.common.checks import path_of
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from .plans import named_layers

CAPABILITIES = Capabilities(
    backend="modelopt",
    bits=tuple(range(2, 9)),
    kinds=("linear",),
    symmetric=(True,),
    granularities=("per_tensor", "per_channel", "per_group"),
    stochastic=False,
)


def config(plan: Plan, source: Path) -> str:
    """Make the recipe: everything is turned off, then each layer that the plan quantizes is turned on by its name.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.

    Returns:
        YAML, for block sizes have numbers for keys, which JSON has not.

    Raises:
        SettingError: ModelOpt's integers cannot say the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.
    """
    layers = named_layers(plan, path_of("source", source), CAPABILITIES)
    return "\n".join(_lines(layers)) + "\n"


def _lines(layers: dict[str, LayerChoice | None]) -> Iterator[str]:
    yield 'metadata: {recipe_type: ptq, description: "Widths by layer, of an mpq-plugins plan."}'
    yield "quantize:"
    yield "  algorithm: {method: max}"
    yield "  quant_cfg:  # later entries win"
    yield '    - {quantizer_name: "*", enable: false}'
    for name, choice in layers.items():
        quantizer = json.dumps(f"{_escaped(name)}.weight_quantizer")
        what = "enable: false" if choice is None else f"cfg: {{num_bits: {choice.bits}, {_granularity(choice)}}}"
        yield f"    - {{quantizer_name: {quantizer}, {what}}}"


def _granularity(choice: LayerChoice) -> str:
    if choice.scheme.group_size is not None:
        return f"block_sizes: {{-1: {choice.scheme.group_size}, type: static}}"
    return "axis: 0" if choice.scheme.granularity == "per_channel" else "axis: null"


def _escaped(name: str) -> str:
    """Names are patterns to ModelOpt."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
