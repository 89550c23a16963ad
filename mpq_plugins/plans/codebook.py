"""Codes of centroids that k-means finds, as plans know them: Deep Compression."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..common.public import public
from ..errors import SettingError
from .granular import Grain, Granular, GroupSize, allow, check_bits

InitName = Literal["linear", "optimal", "density", "forgy"]
INITS: tuple[InitName, ...] = ("linear", "optimal", "density", "forgy")


@public
@dataclass(frozen=True, kw_only=True)
class Codebook(Granular):
    """Shared weights: every weight is one of a group's 2^b centroids, and its code says which.

    Deep Compression (arXiv 1510.00149, sec. 3). Where some weights are exactly 0, as pruned ones are, 0 is one of the
    2^b and stays it. Bits are 1 to 8; a group of fewer than 2^b weights is refused.

    Attributes:
        name: `codebook`.
        granularity: `per_tensor`, `per_channel` or `per_group`: what a group is.
        group_size: Inputs of a group under `per_group`.
        init: How centroids are found: as what Lloyd's iteration makes of the paper's starts, `linear` (between the
            extremes, which large weights profit from), `density` (of equal shares) or `forgy` (drawn from the weights);
            or as those of least squared error, `optimal`.

    Raises:
        SettingError: A value is not one of these.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.Codebook().codebook_entries(4)
        16
    """

    quantizer: ClassVar[str] = "mpq_plugins.quantization.codebook:CodebookQuantizer"
    scales_per_group: ClassVar[int] = 0
    sorts: ClassVar[bool] = True

    name: Literal["codebook"] = "codebook"
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    init: Annotated[InitName, "where centroids start"] = "linear"

    def __post_init__(self) -> None:
        self.check_granularity()
        allow("init", self.init, INITS)
        allow("scheme", self.name, ("codebook",))

    def __str__(self) -> str:
        return f"codebook {self.grain} {self.init}"

    @property
    def searches(self) -> bool:
        """Whether each group's centroids are found by trying many."""
        return True

    @property
    def as_codebook(self) -> "Codebook":
        """Itself."""
        return self

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Check that this scheme has codes of that width.

        Args:
            bits: The width, 1 to 8.
            name: What names the value in errors.

        Returns:
            The width.

        Raises:
            SettingError: The width is none of these.
        """
        return check_bits(bits, name)

    def check_part(self, bits: int, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> None:
        """Check that a group has at least as many weights as centroids.

        Args:
            bits: The width, one of the scheme's.
            shape: The weight's shape.
            channel_axis: Its axis of output channels.
            channels: How many of them have the width.
            layer: What names the layer in errors.

        Raises:
            SettingError: A group has more centroids than weights.
        """
        groups = self.group_count(shape, channel_axis, channels, layer)
        weights = channels * (math.prod(shape) // shape[channel_axis]) // groups if groups else 2**bits
        if 2**bits > weights:
            remedy = f"at most {weights.bit_length() - 1} bits" if weights > 1 else "another scheme"
            raise SettingError(
                f"layer {layer!r}: {bits} bits are {2**bits} centroids, more than the {weights} weights that share "
                f"them ({self.grain}). Use {remedy}, or leave the layer out (skip)."
            )

    def levels(self, bits: int) -> int:
        """Count the most different values that a group can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return int(2**bits)

    def codebook_entries(self, bits: int) -> int:
        """Count the centroids of a group.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return int(2**bits)
