"""What GPTQModel and vLLM read: the usual width, and a rule for every layer."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import NUMBERED, layer_name
from mpq_plugins.weights.roles import is_head

from ..shared.exporting import configured
from ..shared.float_checkpoint import FloatCheckpoint, left_in_float
from .tensors import is_symmetric

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
         "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
         "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj"}  # fmt: skip
"""What vLLM calls the layer that it makes of several, and looks for a rule of."""


def version(source: FloatCheckpoint) -> int:
    """Of the format: the first stores zero points less one, which those at 0 do not survive."""
    return 1 if all(is_symmetric(choice) for _, choice in source.coded_weights) else 2


def files(source: FloatCheckpoint) -> dict[str, dict[str, Any]]:
    """config.json, and quantize_config.json, which holds the same section."""
    layers = {layer_name(parameter): _layer(choice) for parameter, choice in source.coded_weights}
    usual = Counter((layer["bits"], layer["group_size"], layer["sym"]) for layer in layers.values()).most_common(1)
    (bits, size, symmetric), _ = usual[0] if usual else ((4, 128, True), 0)
    section = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version(source) == 1 else "gptq_v2",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": any(is_head(name) for name in layers),
        "pack_dtype": "int32",
        "dynamic": _rules({**layers, **dict.fromkeys(left_in_float(source), None)}),
    }
    return {**configured(source, quantization_config=section), "quantize_config.json": section}


def _layer(choice: LayerChoice) -> dict[str, Any]:
    return {"bits": choice.bits, "group_size": choice.scheme.group_size or -1, "sym": is_symmetric(choice)}


def _rules(layers: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """For exact names, float ones too; names of fused layers come last, where all of their parts agree."""
    settings: dict[str, list[dict[str, Any] | None]] = {}
    for name, layer in layers.items():
        for fused in _fused(name):
            settings.setdefault(fused, []).append(layer)
    together = {name: parts[0] for name, parts in settings.items() if all(part == parts[0] for part in parts)}
    return dict(_rule(name, layer) for name, layer in {**layers, **together}.items())


def _rule(name: str, layer: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    return f"{'-' if layer is None else '+'}:^{re.escape(name)}$", layer or {}


def _fused(name: str) -> Iterator[str]:
    block, dot, last = name.rpartition(".")
    experts = NUMBERED.search(name)
    if experts is not None:
        yield name[: experts.start()] + "experts"
    elif last in FUSED:
        yield f"{block}{dot}{FUSED[last]}"
