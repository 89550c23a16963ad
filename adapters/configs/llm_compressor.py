"""A plan as a recipe of llm-compressor: a group of layers for each width and scheme, by exact names.

oneshot(model=..., recipe="recipe.json")     # with what llm_compressor.config(plan, source) gives
"""

import json
from pathlib import Path
from typing import Any

from mpq_plugins.common.checks import path_of
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from .plans import named_layers

CAPABILITIES = Capabilities(
    backend="llm_compressor",
    bits=tuple(range(2, 9)),
    kinds=("linear",),
    symmetric=(True, "full"),  # asymmetric packed checkpoints, which it writes, do not load
    granularities=("per_tensor", "per_channel", "per_group"),
    stochastic=False,
)


def config(plan: Plan, source: Path) -> str:
    """Make the recipe, with layers left in float under `ignore`.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.

    Returns:
        JSON, which llm-compressor reads from a file that ends in .json.

    Raises:
        SettingError: The recipe cannot say the plan. The message names layers and the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.
    """
    layers = named_layers(plan, path_of("source", source), CAPABILITIES)
    groups: dict[str, dict[str, Any]] = {}
    for name, choice in layers.items():
        if choice is not None:
            weights = _weights(choice)
            groups.setdefault(repr(weights), {"targets": [], "weights": weights})["targets"].append(name)
    modifier = {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        "ignore": [name for name, choice in layers.items() if choice is None],
    }
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    return json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"


def _weights(choice: LayerChoice) -> dict[str, Any]:
    strategies = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}
    return {
        "num_bits": choice.bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategies[choice.scheme.granularity],
        "group_size": choice.scheme.group_size,
        "dynamic": False,
    }
