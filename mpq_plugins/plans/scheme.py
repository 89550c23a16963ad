"""How values become codes at a given bit-width: frozen values, free of torch, shared by plan and quantizer.

A scheme is a frozen dataclass whose fields are its settings. It answers for itself what plans, sizes and budgets ask,
which are numbers alone; what touches tensors is its quantizer's, a class that the scheme names and that is imported
when a weight is quantized (see quantization/contract.py). Files know a scheme by its name, under which an entry point
of the group `mpq_plugins.schemes` declares it.
"""

from collections.abc import Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol, runtime_checkable

from ..common.public import public
from ..errors import SettingError
from .affine import Affine
from .codebook import Codebook
from .granular import Granularity


@public
@runtime_checkable
class Scheme(Protocol):
    """The contract of a scheme: what is asked of its value. Weights that share a scale or a codebook are a group.

    `Granular` answers all but `name`, `quantizer`, `check_bits` and `levels`, for a scheme of one scale per group whose
    weights cost b bits. A scheme is a frozen dataclass, so that equal settings are one scheme; its fields are numbers,
    texts and flags, which files keep under their names.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __hash__(self) -> int:
        """As frozen dataclasses have it."""

    @property
    def name(self) -> str:
        """What files and the command line call it; the name of its entry point."""

    @property
    def quantizer(self) -> str:
        """Where its quantizer is, `package.module:Class`; see quantization/contract.py."""

    @property
    def granularity(self) -> Granularity:
        """What a group is."""

    @property
    def group_size(self) -> int | None:
        """Inputs of a group, where the granularity is `per_group`."""

    @property
    def searches(self) -> bool:
        """Whether each group's scale is found by trying many, which takes a hundred times as long."""

    @property
    def sorts(self) -> bool:
        """Whether all weights of a group must be in memory at once."""

    @property
    def scales_per_group(self) -> int:
        """How many numbers a group has beside its codebook."""

    @property
    def as_affine(self) -> "Affine | None":
        """The affine scheme that gives the same codes, which is what backends run; None where there is none."""

    @property
    def as_codebook(self) -> "Codebook | None":
        """The codebook scheme that gives the same centroids; None where there is none."""

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Check that there are codes of that width.

        Args:
            bits: The width, 1 to 8 at the most.
            name: What names the value in errors.

        Returns:
            The width.

        Raises:
            SettingError: The scheme has no codes of that width.
        """

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

    def levels(self, bits: int) -> int:
        """Count the most different values that a group can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """

    def has_zero(self, bits: int) -> bool:
        """Tell whether a weight of 0 stays 0.

        Args:
            bits: The width.

        Returns:
            Whether it does.
        """

    def interval_bits(self, bits: int) -> int:
        """Give the bits that a weight costs beyond its b-bit code.

        Args:
            bits: b.

        Returns:
            Bits of each weight.
        """

    def zero_point_bits(self, bits: int) -> int:
        """Give the bits of a group's zero point.

        Args:
            bits: The width.

        Returns:
            Bits of each group; 0 where there is no zero point.
        """

    def codebook_entries(self, bits: int) -> int:
        """Count the values that a group keeps in a table of its own.

        Args:
            bits: The width.

        Returns:
            The number; 0 where there is no codebook.
        """

    def groups_per_channel(self, shape: Sequence[int], channel_axis: int, layer: str) -> int:
        """Count the groups that one output channel has by itself.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            layer: What names the layer in errors.

        Returns:
            The number; 0 where a group spans channels.
        """

    def group_count(self, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> int:
        """Count the groups that some of a weight's output channels have together.

        Args:
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            channels: How many channels.
            layer: What names the layer in errors.

        Returns:
            The number.
        """


def group_bits(scheme: Scheme, bits: int) -> int:
    """Bits of a group beside what the contract asks for: `Granular.group_bits`, 0 for a scheme that lacks it."""
    own = getattr(scheme, "group_bits", None)
    return 0 if own is None else int(own(bits))


def scales_per_layer(scheme: Scheme) -> int:
    """Scales of a layer beside those of its groups: `Granular.scales_per_layer`, 0 for a scheme that lacks it."""
    return int(getattr(scheme, "scales_per_layer", 0))


def needs_whole_layer(scheme: Scheme) -> bool:
    """Whether all of a layer must be seen before any of it is quantized, for all of it has one scale."""
    return scheme.granularity == "per_tensor" or scales_per_layer(scheme) > 0


def has_width(scheme: Scheme, bits: int) -> bool:
    """Whether the scheme has codes of that width."""
    try:
        scheme.check_bits(bits)
    except SettingError:
        return False
    return True


def scale_bits_of(scheme: Scheme) -> int:
    """Bits of a scale or centroid; 32 for a scheme that answers the contract and does not say."""
    return int(getattr(scheme, "scale_bits", 32))
