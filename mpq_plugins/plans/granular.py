"""What schemes share: scales that belong to groups, and what a group is."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict

from ..common.checks import shown
from ..common.documents import STRICT
from ..common.public import public
from ..errors import SettingError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
# As fields of schemes, with the texts of their options.
Grain = Annotated[Granularity, "scales"]
GroupSize = Annotated[int | None, "weights per group along the input axis; implies per_group"]

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
INTEGER_BITS = range(1, 9)
FLOAT_BITS = (16, 32)  # a layer left in floating point
LAYER_SCALE_BITS = 32


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer in 1..8, else raise SettingError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in INTEGER_BITS:
        raise SettingError(f"{name}: {shown(bits)} is not allowed; 1 to 8")
    return bits


@public
class Granular:
    """What schemes share: scales belong to groups, and the granularity says what a group is.

    A group is the whole tensor, an output channel, or `group_size` neighbours along the input axis of one output
    channel (times the kernel's positions). A dataclass that inherits it has the fields `granularity` and `group_size`,
    and calls `check_granularity` in its `__post_init__`.

    Attributes:
        granularity: `per_tensor`, `per_channel` or `per_group`.
        group_size: Inputs of a group under `per_group`, else None.
        sorts: Whether all weights of a group must be in memory at once.
        scales_per_group: How many numbers a group has beside its codebook.
        scales_per_layer: How many float32 numbers all groups of a layer have together.

    Examples:
        >>> import mpq_plugins as mpq
        >>> scheme = mpq.Affine(granularity="per_group", group_size=32)
        >>> scheme.grain, scheme.group_count((16, 128), 0, 16, "fc")
        ('per_group(32)', 64)
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    granularity: Granularity
    group_size: int | None
    sorts: ClassVar[bool] = False
    scales_per_group: ClassVar[int] = 1
    scales_per_layer: ClassVar[int] = 0

    @property
    def searches(self) -> bool:
        """Whether each group's scale is found by trying many."""
        return False

    @property
    def scale_bits(self) -> int:
        """Bits of each scale, and of each entry of a codebook; a scheme that does not say has 32."""
        return 32

    @property
    def as_affine(self) -> Any:  # an Affine, which is one of these itself
        """The affine scheme that gives the same codes; None where there is none."""
        return None

    @property
    def as_codebook(self) -> Any:  # as as_affine
        """The codebook scheme that gives the same centroids; None where there is none."""
        return None

    def interval_bits(self, bits: int) -> int:
        """Give the bits that a weight costs beyond its b-bit code.

        Args:
            bits: b.

        Returns:
            Bits of each weight.
        """
        return 0

    def zero_point_bits(self, bits: int) -> int:
        """Give the bits of a group's zero point.

        Args:
            bits: The width.

        Returns:
            Bits of each group; 0 where there is no zero point.
        """
        return 0

    def codebook_entries(self, bits: int) -> int:
        """Count the values that a group keeps in a table of its own.

        Args:
            bits: The width.

        Returns:
            The number; 0 where there is no codebook.
        """
        return 0

    def group_bits(self, bits: int) -> int:
        """Give the bits of a group beside its codes, its scales, its zero point and its codebook.

        Args:
            bits: The width.

        Returns:
            Bits of each group; 0 but for formats whose blocks are counted by the byte.
        """
        return 0

    def has_zero(self, bits: int) -> bool:
        """Tell whether a weight of 0 stays 0 at that width.

        Args:
            bits: The width.

        Returns:
            Whether it does.
        """
        return True

    def check_part(self, bits: int, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> None:
        """Check that so many channels of a weight can have that width.

        Args:
            bits: The width, one of the scheme's.
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            channels: How many of them have the width.
            layer: What names the layer in errors.

        Raises:
            SettingError: They cannot.
        """

    def groups_per_channel(self, shape: Sequence[int], channel_axis: int, layer: str) -> int:
        """Count the groups that one output channel has by itself.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            layer: What names the layer in errors.

        Returns:
            The number; 0 where a group spans channels.

        Raises:
            SettingError: The input axis does not divide into groups.
        """
        if self.granularity == "per_tensor":
            return 0
        if self.granularity == "per_channel":
            return 1
        inputs = inputs_of(shape, channel_axis)
        assert self.group_size is not None
        if inputs % self.group_size:
            raise SettingError(
                f"layer {layer!r}: {inputs} inputs do not divide into groups of {self.group_size}. "
                f"Use a group_size that divides {inputs}, or skip the layer."
            )
        return inputs // self.group_size

    def group_count(self, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> int:
        """Count the groups that some of this weight's output channels have together.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            channels: How many channels.
            layer: What names the layer in errors.

        Returns:
            The number.

        Raises:
            SettingError: The input axis does not divide into groups.
        """
        return max(1, channels * self.groups_per_channel(shape, channel_axis, layer)) if math.prod(shape) else 0

    def check_granularity(self) -> None:
        """Check the granularity and the group size.

        Raises:
            SettingError: There is no such granularity, or the group size does not fit it.
        """
        allow("granularity", self.granularity, GRANULARITIES)
        if self.granularity == "per_group" and (type(self.group_size) is not int or self.group_size < 1):
            raise SettingError(f"group_size: {shown(self.group_size)} is not allowed with per_group; 1 or more")
        if self.granularity != "per_group" and self.group_size is not None:
            raise SettingError(f"group_size: {self.group_size} means nothing with {self.granularity}; leave it out")

    @property
    def grain(self) -> str:
        """The granularity in words, `per_group(32)`."""
        return f"per_group({self.group_size})" if self.granularity == "per_group" else self.granularity


def inputs_of(shape: Sequence[int], channel_axis: int) -> int:
    """The inputs that a layer's groups divide: its first axis but that of output channels; 1 where there is none."""
    return next((n for axis, n in enumerate(shape) if axis != channel_axis), 1)


def allow(field: str, value: object, allowed: Sequence[str]) -> None:
    """Raise SettingError, naming the field, for a value that is none of these."""
    if value not in allowed:
        raise SettingError(f"{field}: {shown(value)} is not allowed; {', '.join(allowed)}")
