"""Honest size of a plan: the codes alone, which papers quote, and everything a file must hold."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..common.checks import shown
from ..common.public import public
from ..errors import SettingError
from .granular import FLOAT_BITS, LAYER_SCALE_BITS
from .layers import LayerChoice
from .scheme import group_bits, scale_bits_of, scales_per_layer


@public
@dataclass(frozen=True)
class LayerSize:
    """Bits of one layer, by what they are spent on.

    Attributes:
        numel: The number of weights.
        codes: Bits of their codes.
        intervals: The bit of every weight that tells its interval, where two intervals have b bits each.
        scales: Bits of scales.
        zero_points: Bits of zero points, which are codes, so they take b bits each.
        codebooks: Bits of centroids.
        part_map: Bits of the map that says which part each channel is in.
    """

    numel: int
    codes: int
    intervals: int
    scales: int
    zero_points: int
    codebooks: int
    part_map: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.intervals + self.scales + self.zero_points + self.codebooks + self.part_map


@public
@dataclass(frozen=True)
class PlanSize:
    """Sizes in bits and bytes of the planned layers, those at 16 and 32 bits among them.

    Biases, norms, buffers and skipped layers are in rest_bytes alone, where that is known, and in model_bytes.

    Attributes:
        layers: The size of each planned layer by name.
        rest_bytes: Bytes of all that the model stores beside them; None where that is not known.
        skipped: How many layers are skipped.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> size = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))).size()
        >>> size.weights_only_bytes, size.total_bits - size.weights_only_bits
        (32, 36)
    """

    layers: dict[str, LayerSize]
    rest_bytes: int | None = None
    skipped: int = 0

    @property
    def numel(self) -> int:
        """Number of planned weights."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def weights_only_bits(self) -> int:
        """Bits of the codes alone; the bit that tells a weight's interval is part of its code."""
        return sum(layer.codes + layer.intervals for layer in self.layers.values())

    @property
    def total_bits(self) -> int:
        """Bits of codes, interval bits, scales, zero points, codebooks and channel-to-part maps."""
        return sum(layer.total for layer in self.layers.values())

    @property
    def weights_only_bytes(self) -> int:
        """Bytes of the codes alone, rounded up."""
        return math.ceil(self.weights_only_bits / 8)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything, rounded up."""
        return math.ceil(self.total_bits / 8)

    @property
    def model_bytes(self) -> int | None:
        """Bytes of the whole model: everything of the planned layers, and the rest as it is stored; None if unknown."""
        return None if self.rest_bytes is None else self.total_bytes + self.rest_bytes

    @property
    def average_bits(self) -> float:
        """Bits of the codes per weight."""
        return self.weights_only_bits / max(1, self.numel)

    @property
    def total_average_bits(self) -> float:
        """Bits of everything per weight."""
        return self.total_bits / max(1, self.numel)

    @property
    def against_fp32(self) -> float:
        """How many times smaller, in total, than the same weights in 32 bits."""
        return 32 * self.numel / max(1, self.total_bits)

    @property
    def against_int8(self) -> float:
        """How many times smaller, in total, than the same weights in 8 bits without scales."""
        return 8 * self.numel / max(1, self.total_bits)


def plan_size(layers: Iterable[LayerChoice], scale_bits: int | None = None) -> PlanSize:
    """Size of every layer: codes numel x b, interval bits, scales, zero points (asymmetric), codebooks of 2^b
    centroids, the channel-to-part map.

    scale_bits: of a scale or centroid, 32 or 16; None for what each layer's scheme has. Raises SettingError on another.
    """
    if scale_bits is not None and scale_bits not in FLOAT_BITS:
        raise SettingError(f"scale_bits: {shown(scale_bits)} is not allowed; 16 or 32, or None for the scheme's own")
    return PlanSize({layer.name: layer_size(layer, scale_bits) for layer in layers})


def layer_size(layer: LayerChoice, scale_bits: int | None = None) -> LayerSize:
    """Size of one layer; see plan_size."""
    intervals = scales = zero_points = codebooks = 0
    scheme, per_channel = layer.scheme, layer.numel // max(1, layer.channels)
    of_layer = scales_per_layer(scheme) * (LAYER_SCALE_BITS if scale_bits is None else scale_bits)
    scale_bits = scale_bits_of(scheme) if scale_bits is None else scale_bits
    for bits, channels in layer.widths:
        if bits in FLOAT_BITS:
            continue
        count = scheme.group_count(layer.shape, layer.channel_axis, channels, layer.name)
        intervals += channels * per_channel * scheme.interval_bits(bits)
        scales += count * (scheme.scales_per_group * scale_bits + group_bits(scheme, bits)) + (of_layer if count else 0)
        zero_points += count * scheme.zero_point_bits(bits)
        codebooks += count * scheme.codebook_entries(bits) * scale_bits
    part_map = map_bits(layer.channels, len(layer.widths))
    return LayerSize(layer.numel, layer.code_bits, intervals, scales, zero_points, codebooks, part_map)


def map_bits(channels: int, parts: int) -> int:
    """Bits of the map that says which of so many parts each channel is in."""
    return channels * math.ceil(math.log2(parts)) if parts > 1 else 0
