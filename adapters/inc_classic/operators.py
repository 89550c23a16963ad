"""A plan's layers in the words of the classic API: its operators' configurations, its int8 and fp32."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from mpq_plugins.plans.affine import Affine
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan

INT8, FP32 = 8, 32


def matches(layer: LayerChoice, globs: Sequence[str]) -> bool:
    """Whether any of the globs is for the layer, under any of its names."""
    return any(fnmatchcase(name, pattern) for name in layer.names for pattern in globs)


def int8_or_fp32(plan: Plan, below: int) -> Plan:
    """What the static approach makes of a plan."""
    scheme = Affine(symmetric=True, granularity="per_channel")
    layers = tuple(
        layer.model_copy(
            update={
                "bits": INT8 if max(part.bits for part in layer.all_parts) < below else FP32,
                "parts": None,
                "coded_bytes": None,
                "scheme": scheme,
            }
        )
        for layer in plan.layers
    )
    return plan.model_copy(update={"layers": layers}).with_activation_bits(8)


def weight_items(layer: LayerChoice) -> dict[Any, Any]:
    """The choice in the compressor's words, as far as it has them; the plan beside has it all."""
    symmetric = getattr(layer.scheme, "symmetric", True)
    return {
        ("weight", "dtype"): "int",
        ("weight", "bits"): max(part.bits for part in layer.all_parts),
        ("weight", "group_size"): layer.scheme.group_size or -1,
        ("weight", "scheme"): "sym" if symmetric else "asym",
        ("weight", "algorithm"): "RTN",
    }
