"""What mlx-lm reads of config.json: each layer's width and groups, and positions as it expects them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.names import layer_name

from ..shared.exporting import configured
from ..shared.float_checkpoint import FloatCheckpoint, left_in_float
from .experts import stacked_name
from .tensors import group_size


def files(source: FloatCheckpoint) -> dict[str, dict[str, Any]]:
    """The configuration: the model's, the layers' under both keys that are read, and `rope_theta`.

    transformers 5 has positions under `rope_parameters` alone. mlx-lm's Llama reads `rope_theta` and `rope_scaling`,
    and without them computes nonsense, without an error.
    """
    quantization = _quantization(source)
    sections: dict[str, Any] = {"quantization": quantization, "quantization_config": quantization}
    sections |= {**_positions(source.config), **_experts(source.config)}
    text = source.config.get("text_config")
    if isinstance(text, dict):
        sections["text_config"] = {**text, **_positions(text), **_experts(text)}
    return configured(source, **sections)


def _quantization(source: FloatCheckpoint) -> dict[str, Any]:
    layers: dict[str, Any] = {_called(layer_name(p)): _layer(choice) for p, choice in source.coded_weights}
    usual = Counter((layer["group_size"], layer["bits"]) for layer in layers.values()).most_common(1)
    (size, bits), _ = usual[0] if usual else ((64, 4), 0)
    floats = dict.fromkeys(map(_called, left_in_float(source, embeddings=True)), False)
    return {"group_size": size, "bits": bits, "mode": "affine", **layers, **floats}


def _called(name: str) -> str:
    """A layer's name in mlx-lm."""
    place = stacked_name(name)
    return name if place is None else place[0]


def _layer(choice: LayerChoice) -> dict[str, Any]:
    return {"group_size": group_size(choice), "bits": choice.bits, "mode": "affine"}


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """How many there are, which transformers 5 calls otherwise for Qwen3-MoE."""
    known = "num_local_experts" in config and "num_experts" not in config
    return {"num_experts": config["num_local_experts"]} if known else {}


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys where there are newer ones alone, and the other way round."""
    newer = config.get("rope_parameters")
    if not isinstance(newer, dict):
        return _newer_positions(config)
    if any(isinstance(value, dict) for value in newer.values()):
        return _positions_by_kind(config, newer)
    older: dict[str, Any] = {}
    if "rope_theta" in newer and "rope_theta" not in config:
        older["rope_theta"] = newer["rope_theta"]
    scaling = {key: value for key, value in newer.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        older["rope_scaling"] = scaling
    if "partial_rotary_factor" in newer and "partial_rotary_factor" not in config:
        older["partial_rotary_factor"] = newer["partial_rotary_factor"]
    return older


def _newer_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_theta" not in config:
        return {}
    scaling = config.get("rope_scaling")
    scaling = {"rope_type": "default", **(scaling if isinstance(scaling, dict) else {})}
    return {"rope_parameters": {**scaling, "rope_theta": config["rope_theta"]}}


def _positions_by_kind(config: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Of models whose layers attend to all before them or to a window, as Gemma 3's do."""
    keys = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    thetas = {key: newer[kind].get("rope_theta") for kind, key in keys.items() if isinstance(newer.get(kind), dict)}
    return {key: theta for key, theta in thetas.items() if theta is not None and key not in config}
