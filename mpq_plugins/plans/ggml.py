"""ggml's quantized types as schemes: blocks of a row's weights that hold codes, scales and minima of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

from ..common.checks import shown
from ..common.public import public
from ..errors import SettingError
from .granular import Granular, Granularity

TypeName = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq1_s", "iq1_m", "iq2_xxs",
    "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "nvfp4",
]  # fmt: skip


class BlockType(NamedTuple):
    """A type's block: how many weights it has and bytes it takes, the most different values in it, a 0 among them."""

    weights: int
    size: int
    values: int
    has_zero: bool

    @property
    def bits(self) -> int:
        """Bits a weight, rounded down: the width that a plan says."""
        return 8 * self.size // self.weights


TYPES: Mapping[str, BlockType] = {
    "q4_0": BlockType(32, 18, 16, True),
    "q4_1": BlockType(32, 20, 16, False),
    "q5_0": BlockType(32, 22, 32, True),
    "q5_1": BlockType(32, 24, 32, False),
    "q8_0": BlockType(32, 34, 32, True),
    "q2_k": BlockType(256, 84, 16 * 4, False),  # sub-blocks times levels, as in the next four
    "q3_k": BlockType(256, 110, 16 * 8, True),
    "q4_k": BlockType(256, 144, 8 * 16, False),
    "q5_k": BlockType(256, 176, 256, False),
    "q6_k": BlockType(256, 210, 256, True),
    "iq1_s": BlockType(256, 50, 256, False),
    "iq1_m": BlockType(256, 56, 256, False),
    "iq2_xxs": BlockType(256, 66, 256, False),
    "iq2_xs": BlockType(256, 74, 256, False),
    "iq2_s": BlockType(256, 82, 256, False),
    "iq3_xxs": BlockType(256, 98, 256, False),
    "iq3_s": BlockType(256, 110, 256, False),
    "iq4_nl": BlockType(32, 18, 16, False),
    "iq4_xs": BlockType(256, 136, 8 * 16, False),
    "tq1_0": BlockType(256, 54, 3, True),
    "tq2_0": BlockType(256, 66, 3, True),
    "mxfp4": BlockType(32, 17, 15, True),
    "nvfp4": BlockType(64, 36, 4 * 15, True),
}
"""As GGUF files have them. What ggml computes with and never stores (Q8_1, Q8_K) is none of them."""

NUMBERS: Mapping[str, int] = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23,
    "iq1_m": 29, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39, "nvfp4": 40,
}  # fmt: skip
"""Of the types in ggml and in GGUF files, which never change."""

NEEDS_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Types that llama-quantize writes only where an importance matrix says which inputs matter."""

_FALLBACKS: Mapping[str, TypeName] = {
    "q2_k": "q4_0", "q3_k": "q4_0", "tq1_0": "q4_0", "tq2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq1_s": "iq4_nl", "iq1_m": "iq4_nl", "iq2_xxs": "iq4_nl", "iq2_xs": "iq4_nl", "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl", "iq3_s": "iq4_nl", "iq4_xs": "iq4_nl",
}  # fmt: skip
"""What llama-quantize takes where rows are no whole blocks; of what is not here, float16."""


@public
@dataclass(frozen=True, kw_only=True)
class GGML(Granular):
    """A type of ggml's, as llama.cpp runs it and GGUF files store it: codes and scales are the type's own.

    A block is 32, 64 or 256 neighbours in a row, and what it keeps beside b bits a weight is counted to the bit:
    `q4_k` is 4 bits in a plan's words and 4.5 in its sizes. A type has one width. Only matrices whose rows are whole
    blocks can have it. Weights are rounded by ggml's own code (the extra `gguf`), for the types that ggml cannot round
    without knowing how much each input matters as if all matter alike.

    Attributes:
        name: `ggml`.
        type: The type, as `llama-quantize` spells it, in lower case.

    Raises:
        SettingError: There is no such type.

    Examples:
        >>> import mpq_plugins as mpq
        >>> scheme = mpq.GGML(type="q4_k")
        >>> scheme.bits, scheme.group_size, scheme.bits_per_weight
        (4, 256, 4.5)
    """

    quantizer: ClassVar[str] = "mpq_plugins.quantization.ggml:GGMLQuantizer"
    granularity: ClassVar[Granularity] = "per_group"  # type: ignore[misc]  # no setting: blocks are the type's
    scales_per_group: ClassVar[int] = 0  # of 32 bits; group_bits counts what a block has

    name: Literal["ggml"] = "ggml"
    type: Annotated[TypeName, "ggml's type of the weights, as GGUF files have it"] = "q4_k"

    def __post_init__(self) -> None:
        if self.name != "ggml":
            raise SettingError(f"scheme: {shown(self.name)} is not allowed; ggml")
        if not isinstance(self.type, str) or self.type not in TYPES:
            hint = (
                " (types of tensors and not of whole files, so without _M, _S or _L)"
                if _is_file_type(self.type)
                else ""
            )
            raise SettingError(f"type: {shown(self.type)} is not allowed; {', '.join(get_args(TypeName))}{hint}")

    def __str__(self) -> str:
        return f"ggml {self.type}"

    @property
    def block(self) -> BlockType:
        """What a block of the type has."""
        return TYPES[self.type]

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """Weights of a block."""
        return self.block.weights

    @property
    def searches(self) -> bool:
        """Whether each block's scales are found by trying many, as all but the plainest types' are."""
        return self.type not in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")

    @property
    def bits(self) -> int:
        """The one width that the type has in plans: bits a weight, rounded down."""
        return self.block.bits

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, with all that a block has."""
        return 8 * self.block.size / self.block.weights

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Check that the type has that width.

        Args:
            bits: The width.
            name: What names the value in errors.

        Returns:
            The width.

        Raises:
            SettingError: It has another.
        """
        if isinstance(bits, bool) or bits != self.bits:
            raise SettingError(
                f"{name}: {shown(bits)} is not allowed with ggml's {self.type}, of {self.bits_per_weight:g} bits a "
                f"weight in all; {self.bits}, or another type"
            )
        return bits

    def levels(self, bits: int) -> int:
        """Count the most different values that a block can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return self.block.values

    def has_zero(self, bits: int) -> bool:
        """Tell whether a weight of 0 stays 0: not where codes count from a minimum, or stand for odd values.

        Args:
            bits: The width.

        Returns:
            Whether it does.
        """
        return self.block.has_zero

    def group_bits(self, bits: int) -> int:
        """Give the bits of a block beside b for each weight: its scales and minima, and what bits are a fraction.

        Args:
            bits: The width.

        Returns:
            Bits of each block.
        """
        return 8 * self.block.size - bits * self.block.weights

    def fits(self, shape: Sequence[int], channel_axis: int) -> bool:
        """Tell whether a weight can have the type: a matrix whose rows are whole blocks.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.

        Returns:
            Whether it can.

        Examples:
            >>> import mpq_plugins as mpq
            >>> mpq.GGML(type="q4_k").fits((576, 1536), 0), mpq.GGML(type="q4_k").fits((576, 576), 0)
            (True, False)
        """
        return len(shape) == 2 and shape[1 - channel_axis] % self.group_size == 0

    def fallback(self, shape: Sequence[int], channel_axis: int) -> "GGML | None":
        """Give the type that llama.cpp takes for a weight of this shape: this one where it fits, else one that does.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.

        Returns:
            The type; None where none fits, and llama.cpp keeps the weight in floating point.

        Examples:
            >>> import mpq_plugins as mpq
            >>> str(mpq.GGML(type="q4_k").fallback((576, 576), 0)), mpq.GGML(type="q4_k").fallback((576, 49), 0)
            ('ggml q5_0', None)
        """
        if self.fits(shape, channel_axis):
            return self
        smaller = GGML(type=_FALLBACKS[self.type]) if self.type in _FALLBACKS else None
        return smaller if smaller is not None and smaller.fits(shape, channel_axis) else None

    def groups_per_channel(self, shape: Sequence[int], channel_axis: int, layer: str) -> int:
        """Count the blocks of one output channel.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            layer: What names the layer in errors.

        Returns:
            The number.

        Raises:
            SettingError: The weight cannot have the type.
        """
        if not self.fits(shape, channel_axis):
            other = self.fallback(shape, channel_axis)
            remedy = (
                "Skip the layer" if other is None else f"Use type {other.type}, as llama.cpp does, or skip the layer"
            )
            raise SettingError(
                f"layer {layer!r}: ggml's {self.type} has blocks of {self.group_size} weights, and a weight of shape "
                f"{tuple(shape)} is no matrix with rows of whole blocks. {remedy}."
            )
        return shape[1 - channel_axis] // self.group_size


def _is_file_type(name: object) -> bool:
    """Whether it is called as mixes of types are: q4_k_m."""
    return isinstance(name, str) and name.lower().rstrip("sml").rstrip("_") in TYPES
