"""How values become codes at a given bit-width: frozen values, free of torch, shared by plan and quantizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from .errors import SettingError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
RangeName = Literal["minmax", "mse"]

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("minmax", "mse")
INTEGER_BITS = range(1, 9)
FLOAT_BITS = (16, 32)  # a layer left in floating point


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer in 1..8, else raise SettingError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in INTEGER_BITS:
        raise SettingError(f"{name}: {bits!r} is not allowed; 1 to 8")
    return bits


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Uniform integer codes: w' = (code - zero_point) * scale, one scale per region of the weight.

    A region is the whole tensor, an output channel, or `group_size` neighbours along the input axis of one
    output channel (times the kernel's positions). With bits b on [lo, hi], lo <= 0 <= hi:
    asymmetric scale = (hi - lo) / (2^b - 1); symmetric scale = max|w| / (2^(b-1) - 1) with codes in
    +-(2^(b-1) - 1). b = 1 is binary, +-mean|w|. `range` picks [lo, hi]: the extremes, or the clipping with
    the least squared error.

    Raises SettingError on a value outside what is listed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Literal["affine"] = "affine"
    symmetric: bool = False
    granularity: Granularity = "per_tensor"
    group_size: int | None = None
    range: RangeName = "minmax"

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise SettingError(f"granularity: {self.granularity!r} is not allowed; {', '.join(GRANULARITIES)}")
        if self.range not in RANGES:
            raise SettingError(f"range: {self.range!r} is not allowed; {', '.join(RANGES)}")
        if self.name != "affine":
            raise SettingError(f"scheme: {self.name!r} is not allowed; affine")
        if not isinstance(self.symmetric, bool):
            raise SettingError(f"symmetric: {self.symmetric!r} is not allowed; True or False")
        if self.granularity == "per_group" and (type(self.group_size) is not int or self.group_size < 1):
            raise SettingError(f"group_size: {self.group_size!r} is not allowed with per_group; 1 or more")
        if self.granularity != "per_group" and self.group_size is not None:
            raise SettingError(f"group_size: {self.group_size} means nothing with {self.granularity}; leave it out")

    def __str__(self) -> str:
        grain = f"per_group({self.group_size})" if self.granularity == "per_group" else self.granularity
        return f"{'symmetric' if self.symmetric else 'asymmetric'} {grain} {self.range}"

    def regions_per_channel(self, shape: Sequence[int], channel_axis: int, layer: str) -> int:
        """How many scales one output channel has by itself (0 where a scale spans channels).

        `shape` is the weight's. Raises SettingError, naming `layer`, where the input axis does not divide
        into groups.
        """
        if self.granularity == "per_tensor":
            return 0
        if self.granularity == "per_channel":
            return 1
        inputs = next((n for axis, n in enumerate(shape) if axis != channel_axis), 1)
        assert self.group_size is not None
        if inputs % self.group_size:
            raise SettingError(
                f"layer {layer!r}: {inputs} inputs do not divide into groups of {self.group_size}. "
                f"Use a group_size that divides {inputs}, or skip the layer."
            )
        return inputs // self.group_size

    def scale_count(self, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> int:
        """How many scales `channels` of this weight's output channels need together."""
        return max(1, channels * self.regions_per_channel(shape, channel_axis, layer)) if math.prod(shape) else 0
