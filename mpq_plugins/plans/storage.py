"""What a backend keeps of a plan in memory and in its own files, which need not be the plan's widths."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..common.public import public
from .layers import LayerChoice
from .plan import Plan


@public
@dataclass(frozen=True)
class Storage:
    """How a backend keeps the weights that it has quantized; layers in float keep the model's own dtype.

    Attributes:
        words: That in a few words, as `int8, a byte a weight`.
        bits: Of every quantized weight, whatever its width in the plan; None where a weight keeps the model's dtype.
        scale_bits: Of each scale, of which an output channel has one, or one for each of its groups.
        zero_point_bits: Of each zero point; there are as many.
        one_scale: Whether a layer that has one scale in the plan keeps one.
    """

    words: str
    bits: int | None = None
    scale_bits: int = 0
    zero_point_bits: int = 0
    one_scale: bool = False


def stored_bytes(plan: Plan, storage: Storage, dtype_bits: Mapping[str, int]) -> int:
    """Bytes of all planned layers' weights as a backend keeps them, with their scales and zero points.

    dtype_bits: layer -> bits of a weight in the model's own dtype.
    """
    return sum(-(-_layer_bits(layer, storage, dtype_bits[layer.name]) // 8) for layer in plan.layers)


def _layer_bits(layer: LayerChoice, storage: Storage, dtype_bits: int) -> int:
    if storage.bits is None or layer.in_float:
        return layer.numel * dtype_bits
    scheme = layer.scheme
    one = storage.one_scale and scheme.granularity == "per_tensor" and layer.bits is not None
    per_channel = max(1, scheme.groups_per_channel(layer.shape, layer.channel_axis, layer.name))
    groups = 1 if one else layer.channels * per_channel
    return layer.numel * storage.bits + groups * (storage.scale_bits + storage.zero_point_bits)
