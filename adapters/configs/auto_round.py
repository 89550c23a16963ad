"""A plan as AutoRound's `layer_config`: the widths of layers by exact names.

layer_config = json.loads(auto_round.config(plan, source))
AutoRound(model, tokenizer, layer_config=layer_config, disable_model_free=True, ...)
"""

import json
from pathlib import Path
from typing import Any

from mpq_plugins.common.checks import path_of
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.capabilities import Capabilities
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

from .plans import named_layers

CAPABILITIES = Capabilities(
    backend="auto_round",
    bits=(2, 3, 4, 8),
    kinds=("linear",),
    symmetric=(False, True, "full"),
    granularities=("per_channel", "per_group"),
    stochastic=False,
)


def config(plan: Plan, source: Path) -> str:
    """Make the configuration, layers left in float at 16 bits, which AutoRound leaves alone.

    Args:
        plan: The plan.
        source: The float checkpoint, a directory with its config.json.

    Returns:
        JSON, a settings object a layer.

    Raises:
        SettingError: AutoRound cannot say the plan, or does not load what it makes of it. The message names layers and
            the remedy.
        MismatchError: The plan is another model's.
        SourceError: The checkpoint cannot be read, or is quantized already.
    """
    layers = named_layers(plan, path_of("source", source), CAPABILITIES)
    by_symmetry = {_symmetric(choice): name for name, choice in layers.items() if choice is not None}
    if len(by_symmetry) > 1:
        raise SettingError(
            f"layer {by_symmetry[False]!r} is asymmetric and {by_symmetry[True]!r} is not: AutoRound loads such a "
            "mixture with weights at random. Plan all of them one way (--symmetric)"
        )
    return json.dumps({name: _settings(choice) for name, choice in layers.items()}, indent=2, ensure_ascii=False) + "\n"


def _settings(choice: LayerChoice | None) -> dict[str, Any]:
    if choice is None:
        return {"bits": 16}
    return {"bits": choice.bits, "group_size": choice.scheme.group_size or -1, "sym": _symmetric(choice)}


def _symmetric(choice: LayerChoice) -> bool:
    scheme = choice.scheme.as_affine
    return scheme is not None and bool(scheme.symmetric)
