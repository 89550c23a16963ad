"""Small floating-point formats: OCP MX (Microscaling Formats 1.0), NVIDIA's NVFP4, and FP8 with a scale a channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ..common.checks import shown
from ..common.public import public
from ..errors import SettingError
from .granular import Granular, Granularity

MinifloatName = Literal[
    "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "fp8_e4m3",
    "fp8_e5m2",
]  # fmt: skip
MINIFLOATS: tuple[MinifloatName, ...] = get_args(MinifloatName)
MX_BLOCK = 32  # inputs that share a scale; OCP MX 1.0, section 5.2
NV_BLOCK = 16


@dataclass(frozen=True)
class Element:
    """One weight's format. name: as ml_dtypes calls it; largest: its greatest magnitude; values: how many it has."""

    name: str
    bits: int
    largest: float
    values: int


_E2M1 = Element("float4_e2m1fn", 4, 6.0, 15)
_E2M3 = Element("float6_e2m3fn", 6, 7.5, 63)
_E3M2 = Element("float6_e3m2fn", 6, 28.0, 63)
_E4M3 = Element("float8_e4m3fn", 8, 448.0, 253)  # two codes are NaN, two are 0
_E5M2 = Element("float8_e5m2", 8, 57344.0, 247)  # eight codes are NaN or infinity, two are 0
ELEMENTS: dict[MinifloatName, Element] = {
    "mxfp4": _E2M1, "mxfp6_e2m3": _E2M3, "mxfp6_e3m2": _E3M2, "mxfp8_e4m3": _E4M3, "mxfp8_e5m2": _E5M2,
    "nvfp4": _E2M1, "fp8_e4m3": _E4M3, "fp8_e5m2": _E5M2,
}  # fmt: skip


@public
@dataclass(frozen=True, kw_only=True)
class Minifloat(Granular):
    """Floating-point codes of 4, 6 or 8 bits times a scale.

    The `mx` formats have a power of two for every 32 inputs, stored in 8 bits: X = 2^(floor(log2 max|w|) - e), where e
    is the exponent of the format's greatest value, and what lies beyond that value is at it (OCP Microscaling Formats
    1.0, sections 5.2 and 6.3). The `fp8` formats have a float32 scale for every output channel, max|w| over the
    format's greatest value. `nvfp4` has two: a float32 scale s = max|w| / (448 * 6) for the layer, and for every 16
    inputs one in FP8 (E4M3), max|w| / 6 / s but no less than 2^-6; a weight is code * its block's scale * s, as torchao
    and vLLM compute it. Rounding is to nearest, ties to even.

    Attributes:
        name: `minifloat`.
        format: `mxfp4`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp8_e4m3`, `mxfp8_e5m2`, `nvfp4`, `fp8_e4m3` or `fp8_e5m2`.

    Raises:
        SettingError: There is no such format.

    Examples:
        >>> import mpq_plugins as mpq
        >>> scheme = mpq.Minifloat(format="mxfp4")
        >>> scheme.bits, scheme.granularity, scheme.group_size
        (4, 'per_group', 32)
    """

    name: Literal["minifloat"] = "minifloat"
    format: Annotated[MinifloatName, "format of the codes"] = "mxfp4"

    def __post_init__(self) -> None:
        if self.name != "minifloat":
            raise SettingError(f"scheme: {shown(self.name)} is not allowed; minifloat")
        if self.format not in MINIFLOATS:
            raise SettingError(f"format: {shown(self.format)} is not allowed; {', '.join(MINIFLOATS)}")

    def __str__(self) -> str:
        return str(self.format)

    @property
    def quantizer(self) -> str:
        """Where its quantizer is."""
        if self.format == "nvfp4":
            return "mpq_plugins.quantization.nvfp4:NVFP4Quantizer"
        return "mpq_plugins.quantization.minifloat:MinifloatQuantizer"

    @property
    def type(self) -> str:
        """The name of the type: its format."""
        return self.format

    @property
    def element(self) -> Element:
        """One weight's format."""
        return ELEMENTS[self.format]

    @property
    def bits(self) -> int:
        """The one width that there is."""
        return self.element.bits

    @property
    def microscaled(self) -> bool:
        """Whether scales are powers of two, one for every 32 inputs."""
        return self.format.startswith("mx")

    @property
    def granularity(self) -> Granularity:  # type: ignore[override]  # the type says it
        """What has a scale."""
        return "per_channel" if self.group_size is None else "per_group"

    @property
    def group_size(self) -> int | None:  # type: ignore[override]
        """Inputs that share a scale."""
        if self.format == "nvfp4":
            return NV_BLOCK
        return MX_BLOCK if self.microscaled else None

    @property
    def scale_bits(self) -> int:  # type: ignore[override,unused-ignore]
        """Bits of a scale: an exponent or an FP8 number, or a float32."""
        return 32 if self.group_size is None else 8

    @property
    def scales_per_layer(self) -> int:  # type: ignore[override]
        """How many float32 scales all groups of a layer have together."""
        return int(self.format == "nvfp4")

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Check that the type has that width.

        Args:
            bits: The width.
            name: What names the value in errors.

        Returns:
            The width.

        Raises:
            SettingError: The type has another.
        """
        if isinstance(bits, bool) or bits != self.bits:
            raise SettingError(f"{name}: {shown(bits)} is not allowed with {self.format}, which has {self.bits} bits")
        return bits

    def check_part(self, bits: int, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> None:
        """Check that a layer that has one scale for all of its groups has one width too.

        Args:
            bits: The width, one of the scheme's.
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            channels: How many of them have the width.
            layer: What names the layer in errors.

        Raises:
            SettingError: Others of its channels have another width.
        """
        if self.scales_per_layer and channels != shape[channel_axis]:
            raise SettingError(
                f"layer {layer!r}: {channels} of {shape[channel_axis]} channels are {self.format}, which has a scale "
                "for the whole layer. Give all channels of the layer one width."
            )

    def levels(self, bits: int) -> int:
        """Count the most different values that a group can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return self.element.values
