"""How values become codes at a given bit-width: frozen values, free of torch, shared by plan and quantizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from ..common.documents import STRICT
from ..errors import SettingError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
RangeName = Literal["minmax", "mse"]
BreakpointName = Literal["search", "gaussian", "laplacian", "gaussian_root", "laplacian_root"]
StorageName = Literal["region_bit", "shared"]
InitName = Literal["linear", "optimal", "density", "forgy"]
# As fields of schemes, with the texts of their options.
Grain = Annotated[Granularity, "what has a scale of its own, where the allocator asks for nothing else"]
GroupSize = Annotated[int | None, "weights per group along the input axis; implies per_group"]

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("minmax", "mse")
BREAKPOINTS = ("search", "gaussian", "laplacian", "gaussian_root", "laplacian_root")
STORAGES = ("region_bit", "shared")
INITS: tuple[InitName, ...] = ("linear", "optimal", "density", "forgy")
INTEGER_BITS = range(1, 9)
FLOAT_BITS = (16, 32)  # a layer left in floating point


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer in 1..8, else raise SettingError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in INTEGER_BITS:
        raise SettingError(f"{name}: {bits!r} is not allowed; 1 to 8")
    return bits


class Granular:
    """What schemes share: scales belong to regions, and the granularity says what a region is.

    A region is the whole tensor, an output channel, or `group_size` neighbours along the input axis of one
    output channel (times the kernel's positions).
    """

    granularity: Granularity
    group_size: int | None
    sorts: ClassVar[bool] = False  # whether a region's grid needs all of its weights at once

    def codebook_entries(self, bits: int) -> int:
        """Values that a region keeps in a table of its own."""
        return 0

    def has_zero(self, bits: int) -> bool:
        """Whether a weight of 0 stays 0 at that width."""
        return True

    def check_part(self, bits: int, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> None:
        """Raise SettingError, naming `layer`, if `channels` of this weight's channels cannot have that width.

        `shape` is the weight's; the width is one of the scheme's.
        """

    def regions_per_channel(self, shape: Sequence[int], channel_axis: int, layer: str) -> int:
        """How many regions one output channel has by itself (0 where a region spans channels).

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

    def region_count(self, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> int:
        """How many regions `channels` of this weight's output channels have together."""
        return max(1, channels * self.regions_per_channel(shape, channel_axis, layer)) if math.prod(shape) else 0

    def _check_granularity(self) -> None:
        _allow("granularity", self.granularity, GRANULARITIES)
        if self.granularity == "per_group" and (type(self.group_size) is not int or self.group_size < 1):
            raise SettingError(f"group_size: {self.group_size!r} is not allowed with per_group; 1 or more")
        if self.granularity != "per_group" and self.group_size is not None:
            raise SettingError(f"group_size: {self.group_size} means nothing with {self.granularity}; leave it out")

    @property
    def _grain(self) -> str:
        return f"per_group({self.group_size})" if self.granularity == "per_group" else self.granularity


@dataclass(frozen=True, kw_only=True)
class Affine(Granular):
    """Uniform integer codes: w' = (code - zero_point) * scale, one scale per region of the weight.

    With bits b on [lo, hi], lo <= 0 <= hi: asymmetric scale = (hi - lo) / (2^b - 1); symmetric scale =
    max|w| / (2^(b-1) - 1) with codes in +-(2^(b-1) - 1). b = 1 is binary, +-mean|w|. `range` picks [lo, hi]: the
    extremes, or the clipping with the least squared error.

    Raises SettingError on a value outside what is listed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    scales_per_region: ClassVar[int] = 1

    name: Literal["affine"] = "affine"
    symmetric: Annotated[bool, "zero point at zero", "asymmetric"] = False
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    range: Annotated[RangeName, "what codes span: the extremes, or the clipping of least squared error"] = "minmax"

    def __post_init__(self) -> None:
        self._check_granularity()
        _allow("range", self.range, RANGES)
        _allow("scheme", self.name, ("affine",))
        if not isinstance(self.symmetric, bool):
            raise SettingError(f"symmetric: {self.symmetric!r} is not allowed; True or False")

    def __str__(self) -> str:
        return f"{'symmetric' if self.symmetric else 'asymmetric'} {self._grain} {self.range}"

    @property
    def searches(self) -> bool:
        """Whether each region's range is found by trying many."""
        return self.range == "mse"

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Return `bits` if this scheme has codes of that width: 1 to 8. Raises SettingError."""
        return check_bits(bits, name)

    def levels(self, bits: int) -> int:
        """The most different values a region can hold."""
        return int(2**bits) - (self.symmetric and bits > 1)

    def region_bits(self, bits: int) -> int:
        """Bits a weight costs beyond its b-bit code."""
        return 0

    def has_zero(self, bits: int) -> bool:
        """Whether a weight of 0 stays 0 at that width: binary weights are +-scale."""
        return bits > 1

    def zero_point_bits(self, bits: int) -> int:
        """Bits of a region's zero point: a code. Binary weights are +-scale, with nothing to offset."""
        return 0 if self.symmetric or bits == 1 else bits


@dataclass(frozen=True, kw_only=True)
class Piecewise(Granular):
    """Two uniform quantizers per region, side by side: |w| <= p, where weights are dense, and p < |w| <= m.

    m = max|w|; the breakpoint p is by `breakpoint` the one with the least squared error on the weights
    (`search`), or the optimum for a Gaussian or Laplacian of the region's root mean square: in closed form, or
    as the root of the optimality condition. PWLQ (arXiv 2002.00104), used by PTILMPQ (arXiv 2404.02947).

    `storage` says what b bits buy. `region_bit`: b bits inside each of the two, sign(w) uni(|w|; b-1), so a
    weight costs b + 1 bits with the bit that tells which. `shared`: 2^b levels in all, at the middles of
    2^(b-2) equal cells on either side of zero in each of the two; a weight costs b bits, and zero is no level.

    Bits are 2 to 8. Raises SettingError on a value outside what is listed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    scales_per_region: ClassVar[int] = 2

    name: Literal["piecewise"] = "piecewise"
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    breakpoint: Annotated[BreakpointName, "where the two regions meet: searched for, or a distribution's"] = "search"
    storage: Annotated[StorageName, "what b bits buy: region_bit (b + 1 bits a weight) or shared (b)"] = "region_bit"

    def __post_init__(self) -> None:
        self._check_granularity()
        _allow("breakpoint", self.breakpoint, BREAKPOINTS)
        _allow("storage", self.storage, STORAGES)
        _allow("scheme", self.name, ("piecewise",))

    def __str__(self) -> str:
        return f"two-region {self._grain} {self.breakpoint}{' shared' if self.storage == 'shared' else ''}"

    @property
    def searches(self) -> bool:
        """Whether each region's breakpoint is found by trying many."""
        return self.breakpoint == "search"

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Return `bits` if this scheme has codes of that width: 2 to 8. Raises SettingError."""
        if check_bits(bits, name) == 1:
            raise SettingError(
                f"{name}: 1 is not allowed with two regions, which need a sign and a magnitude; 2 to 8, or the affine "
                "scheme"
            )
        return bits

    def levels(self, bits: int) -> int:
        """The most different values a region can hold; +-0, and +-p of either quantizer, are one each."""
        return int(2 ** (bits + 1) - 3 if self.storage == "region_bit" else 2**bits)

    def region_bits(self, bits: int) -> int:
        """Bits a weight costs beyond its b-bit code."""
        return int(self.storage == "region_bit")

    def has_zero(self, bits: int) -> bool:
        """Whether a weight of 0 stays 0: of 2^b levels in all, none is 0."""
        return self.storage == "region_bit"

    def zero_point_bits(self, bits: int) -> int:
        """None: codes are signs and magnitudes."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Codebook(Granular):
    """Shared weights: every weight is one of a region's 2^b centroids, and its code says which.

    Deep Compression (arXiv 1510.00149, sec. 3). Centroids are what Lloyd's iteration makes of the paper's starts,
    `linear` (between the extremes, which large weights profit from), `density` (of equal shares) or `forgy` (drawn from
    the weights), or those of least squared error, `optimal`. Where some weights are exactly 0, as pruned ones are, 0 is
    one of the 2^b and stays it.

    Bits are 1 to 8; a region of fewer than 2^b weights is refused. Raises SettingError on a value outside what is
    listed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    scales_per_region: ClassVar[int] = 0
    sorts: ClassVar[bool] = True

    name: Literal["codebook"] = "codebook"
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    init: Annotated[InitName, "where centroids start"] = "linear"

    def __post_init__(self) -> None:
        self._check_granularity()
        _allow("init", self.init, INITS)
        _allow("scheme", self.name, ("codebook",))

    def __str__(self) -> str:
        return f"codebook {self._grain} {self.init}"

    @property
    def searches(self) -> bool:
        """Whether each region's centroids are found by trying many."""
        return True

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Return `bits` if this scheme has codes of that width: 1 to 8. Raises SettingError."""
        return check_bits(bits, name)

    def check_part(self, bits: int, shape: Sequence[int], channel_axis: int, channels: int, layer: str) -> None:
        """Raise SettingError where there are more centroids than weights in a region."""
        regions = self.region_count(shape, channel_axis, channels, layer)
        weights = channels * (math.prod(shape) // shape[channel_axis]) // regions if regions else 2**bits
        if 2**bits > weights:
            remedy = f"at most {weights.bit_length() - 1} bits" if weights > 1 else "another scheme"
            raise SettingError(
                f"layer {layer!r}: {bits} bits are {2**bits} centroids, more than the {weights} weights that share "
                f"them ({self._grain}). Use {remedy}, or leave the layer out (skip)."
            )

    def levels(self, bits: int) -> int:
        """The most different values a region can hold."""
        return int(2**bits)

    def region_bits(self, bits: int) -> int:
        """Bits a weight costs beyond its b-bit code."""
        return 0

    def zero_point_bits(self, bits: int) -> int:
        """None: centroids are values."""
        return 0

    def codebook_entries(self, bits: int) -> int:
        """Centroids of a region."""
        return int(2**bits)


Scheme = Affine | Piecewise | Codebook
NamedScheme = Annotated[
    Annotated[Affine, Tag("affine")] | Annotated[Piecewise, Tag("piecewise")] | Annotated[Codebook, Tag("codebook")],
    Discriminator(
        lambda value: value.get("name", "affine") if isinstance(value, dict) else getattr(value, "name", None),
        custom_error_type="scheme",
        custom_error_message="is not allowed; a scheme named affine, piecewise or codebook",
    ),
]
"""A scheme in a file, told apart by its name; affine where it has none."""
SCHEMES: dict[str, type[Scheme]] = {"affine": Affine, "piecewise": Piecewise, "codebook": Codebook}


def _allow(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingError(f"{field}: {value!r} is not allowed; {', '.join(allowed)}")
