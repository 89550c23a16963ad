"""How values become codes at a given bit-width: frozen values, free of torch, shared by plan and quantizer.

A scheme is a frozen dataclass whose fields are its settings. It answers for itself what plans, sizes and budgets ask,
which are numbers alone; what touches tensors is its quantizer's, a class that the scheme names and that is imported
when a weight is quantized (see quantization/contract.py). Files know a scheme by its name, under which an entry point
of the group `mpq_plugins.schemes` declares it.
"""

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import ConfigDict

from ..common.checks import shown
from ..common.documents import STRICT
from ..common.public import public
from ..errors import SettingError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
RangeName = Literal["minmax", "percentile", "mse", "kl"]
BreakpointName = Literal["search", "gaussian", "laplacian", "gaussian_root", "laplacian_root"]
StorageName = Literal["region_bit", "shared"]
InitName = Literal["linear", "optimal", "density", "forgy"]
Symmetry = bool | Literal["full"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
# As fields of schemes, with the texts of their options.
Grain = Annotated[Granularity, "scales"]
GroupSize = Annotated[int | None, "weights per group along the input axis; implies per_group"]

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("minmax", "percentile", "mse", "kl")
USUAL_SHARE = 0.9999
LARGEST_SEED = 2**53  # which any reader of JSON has exactly
BREAKPOINTS = ("search", "gaussian", "laplacian", "gaussian_root", "laplacian_root")
STORAGES = ("region_bit", "shared")
INITS: tuple[InitName, ...] = ("linear", "optimal", "density", "forgy")
INTEGER_BITS = range(1, 9)
FLOAT_BITS = (16, 32)  # a layer left in floating point
LAYER_SCALE_BITS = 32
SYMMETRIES: dict[Symmetry, str] = {False: "asymmetric", True: "symmetric", "full": "full-range symmetric"}
SCALE_BITS: dict[ScaleDtype, int] = {"float32": 32, "float16": 16, "bfloat16": 16}


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer in 1..8, else raise SettingError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in INTEGER_BITS:
        raise SettingError(f"{name}: {shown(bits)} is not allowed; 1 to 8")
    return bits


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
    def as_affine(self) -> "Affine | None":
        """The affine scheme that gives the same codes; None where there is none."""
        return None

    @property
    def as_codebook(self) -> "Codebook | None":
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
        _allow("granularity", self.granularity, GRANULARITIES)
        if self.granularity == "per_group" and (type(self.group_size) is not int or self.group_size < 1):
            raise SettingError(f"group_size: {shown(self.group_size)} is not allowed with per_group; 1 or more")
        if self.granularity != "per_group" and self.group_size is not None:
            raise SettingError(f"group_size: {self.group_size} means nothing with {self.granularity}; leave it out")

    @property
    def grain(self) -> str:
        """The granularity in words, `per_group(32)`."""
        return f"per_group({self.group_size})" if self.granularity == "per_group" else self.granularity


@public
@dataclass(frozen=True, kw_only=True)
class Affine(Granular):
    """Uniform integer codes: w' = (code - zero_point) * scale, one scale per group of the weight.

    With bits b on [lo, hi], lo <= 0 <= hi: asymmetric scale = (hi - lo) / (2^b - 1); symmetric scale = max|w| /
    (2^(b-1) - 1) with codes in +-(2^(b-1) - 1). The full range has all 2^b codes, -2^(b-1) to 2^(b-1) - 1, and a scale
    of either sign: that of m / -2^(b-1), m the weight of the largest magnitude (of two the negative one), which has the
    code -2^(b-1). b = 1 is binary, +-mean|w|, under each.

    Attributes:
        name: `affine`.
        symmetric: Whether the zero point is at zero; `full` for the full range of codes too.
        granularity: `per_tensor`, `per_channel` or `per_group`: what has a scale.
        group_size: Inputs of a group under `per_group`.
        range: What picks [lo, hi]: the extremes (`minmax`); what leaves out as many weights beyond either end
            (`percentile`); the clipping with the least squared error (`mse`), which under the full range tries both
            signs; or that of least divergence between the histograms before and after (`kl`: Migacz, 8-bit Inference
            with TensorRT, GTC 2017). A group of which a percentile would leave only zeros keeps its extremes.
        scale_dtype: What scales are rounded to before weights become codes: `float32`, `float16` or `bfloat16`. No
            scale becomes 0, but the smallest number there is; one beyond the largest is refused.
        share: The share of a group's weights that lie inside a percentile range, above 0.5 and at most 1; 0.9999 where
            none is given. None under all other ranges.
        stochastic: The seed of stochastic rounding, 0 or more: a weight goes to the level above it with the probability
            that is its way there from the level below, so that what it becomes is on average what it was (Gupta et al.
            2015, arXiv 1502.02551, eq. 1). The range is that of rounding to nearest, which None is. The same seed and
            weights give the same codes, however a layer is cut or shared out (quantization/stochastic.py).

    Raises:
        SettingError: A value is not one of these.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.Affine().levels(4), mpq.Affine(symmetric=True).levels(4), mpq.Affine(symmetric="full").levels(4)
        (16, 15, 16)
        >>> mpq.Affine(scale_dtype="float16").scale_bits
        16
    """

    quantizer: ClassVar[str] = "mpq_plugins.quantization.affine:AffineQuantizer"

    name: Literal["affine"] = "affine"
    symmetric: Annotated[
        Symmetry, "zero point at zero", "asymmetric", "full-range", "symmetric, all codes; scales have signs"
    ] = False
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    range: Annotated[RangeName, "range of codes"] = "minmax"
    scale_dtype: Annotated[ScaleDtype, "type of scales"] = "float32"
    share: Annotated[float | None, "weights inside a percentile range; default 0.9999"] = None
    stochastic: Annotated[int | None, "seed of stochastic rounding; to nearest without one"] = None

    def __post_init__(self) -> None:
        self.check_granularity()
        _allow("range", self.range, RANGES)
        check_seed(self.stochastic)
        object.__setattr__(self, "share", checked_share(self.share, self.range))
        _allow("scale_dtype", self.scale_dtype, tuple(SCALE_BITS))
        _allow("scheme", self.name, ("affine",))
        if not isinstance(self.symmetric, bool) and self.symmetric != "full":
            raise SettingError(f"symmetric: {shown(self.symmetric)} is not allowed; True, False or 'full'")

    def __str__(self) -> str:
        scales = "" if self.scale_dtype == "float32" else f", scales in {self.scale_dtype}"
        drawn = "" if self.stochastic is None else f", rounded stochastically (seed {self.stochastic})"
        return f"{SYMMETRIES[self.symmetric]} {self.grain} {self.range}{share_text(self.share)}{scales}{drawn}"

    @property
    def searches(self) -> bool:
        """Whether each group's range is found by trying many."""
        return self.range in ("mse", "kl")

    @property
    def sorts(self) -> bool:  # type: ignore[override]  # of some of its ranges
        """Whether all weights of a group must be in memory at once, for a histogram or a percentile."""
        return self.range in ("percentile", "kl")

    @property
    def scale_bits(self) -> int:
        """Bits of each scale."""
        return SCALE_BITS[self.scale_dtype]

    @property
    def as_affine(self) -> "Affine":
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

    def levels(self, bits: int) -> int:
        """Count the most different values that a group can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return int(2**bits) - (self.symmetric is True and bits > 1)

    def has_zero(self, bits: int) -> bool:
        """Tell whether a weight of 0 stays 0 at that width: binary weights are +-scale.

        Args:
            bits: The width.

        Returns:
            Whether it does.
        """
        return bits > 1

    def zero_point_bits(self, bits: int) -> int:
        """Give the bits of a group's zero point, which is a code. Binary weights are +-scale, with nothing to offset.

        Args:
            bits: The width.

        Returns:
            Bits of each group; 0 where there is no zero point.
        """
        return 0 if self.symmetric or bits == 1 else bits


@public
@dataclass(frozen=True, kw_only=True)
class Piecewise(Granular):
    """Two uniform quantizers per group, side by side: |w| <= p, where weights are dense, and p < |w| <= m.

    m = max|w|; p is the breakpoint. PWLQ (arXiv 2002.00104), used by PTILMPQ (arXiv 2404.02947). Bits are 2 to 8.

    Attributes:
        name: `piecewise`.
        granularity: `per_tensor`, `per_channel` or `per_group`: what a group is.
        group_size: Inputs of a group under `per_group`.
        breakpoint: How p is found: with the least squared error on the weights (`search`), or as the optimum for a
            Gaussian or Laplacian of the group's root mean square, in closed form (`gaussian`, `laplacian`) or as the
            root of the optimality condition (`gaussian_root`, `laplacian_root`).
        storage: What b bits buy. `region_bit`: b bits inside each of the two, sign(w) uni(|w|; b-1), so a weight costs
            b + 1 bits with the bit that tells which. `shared`: 2^b levels in all, at the middles of 2^(b-2) equal cells
            on either side of zero in each of the two; a weight costs b bits, and zero is no level.

    Raises:
        SettingError: A value is not one of these.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.Piecewise().interval_bits(4), mpq.Piecewise(storage="shared").interval_bits(4)
        (1, 0)
    """

    quantizer: ClassVar[str] = "mpq_plugins.quantization.piecewise:PiecewiseQuantizer"
    scales_per_group: ClassVar[int] = 2

    name: Literal["piecewise"] = "piecewise"
    granularity: Grain = "per_tensor"
    group_size: GroupSize = None
    breakpoint: Annotated[BreakpointName, "where the two regions meet"] = "search"
    storage: Annotated[StorageName, "region_bit: a bit more a weight"] = "region_bit"

    def __post_init__(self) -> None:
        self.check_granularity()
        _allow("breakpoint", self.breakpoint, BREAKPOINTS)
        _allow("storage", self.storage, STORAGES)
        _allow("scheme", self.name, ("piecewise",))

    def __str__(self) -> str:
        return f"two-region {self.grain} {self.breakpoint}{' shared' if self.storage == 'shared' else ''}"

    @property
    def searches(self) -> bool:
        """Whether each group's breakpoint is found by trying many."""
        return self.breakpoint == "search"

    def check_bits(self, bits: int, name: str = "bits") -> int:
        """Check that this scheme has codes of that width.

        Args:
            bits: The width, 2 to 8.
            name: What names the value in errors.

        Returns:
            The width.

        Raises:
            SettingError: The width is none of these.
        """
        if check_bits(bits, name) == 1:
            raise SettingError(
                f"{name}: 1 is not allowed with two regions, which need a sign and a magnitude; 2 to 8, or the affine "
                "scheme"
            )
        return bits

    def levels(self, bits: int) -> int:
        """Count the most different values that a group can hold; +-0, and +-p of either quantizer, are one each.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return int(2 ** (bits + 1) - 3 if self.storage == "region_bit" else 2**bits)

    def interval_bits(self, bits: int) -> int:
        """Give the bits that a weight costs beyond its b-bit code.

        Args:
            bits: b.

        Returns:
            Bits of each weight.
        """
        return int(self.storage == "region_bit")

    def has_zero(self, bits: int) -> bool:
        """Tell whether a weight of 0 stays 0: of 2^b levels in all, none is 0.

        Args:
            bits: The width.

        Returns:
            Whether it does.
        """
        return self.storage == "region_bit"


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
        _allow("init", self.init, INITS)
        _allow("scheme", self.name, ("codebook",))

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


def inputs_of(shape: Sequence[int], channel_axis: int) -> int:
    """The inputs that a layer's groups divide: its first axis but that of output channels; 1 where there is none."""
    return next((n for axis, n in enumerate(shape) if axis != channel_axis), 1)


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


def checked_share(share: float | None, range_name: str, where: str = "") -> float | None:
    """The share of values that a range holds, the usual one where none is given. Raises SettingError, `where` first."""
    if range_name != "percentile":
        if share is not None:
            raise SettingError(f"{where}share: belongs to the percentile range, and this is {range_name}")
        return None
    if share is None:
        return USUAL_SHARE
    if isinstance(share, bool) or not isinstance(share, float | int) or not 0.5 < share <= 1:
        raise SettingError(f"{where}share: {shown(share)} is not allowed; above 0.5, at most 1")
    return float(share)


def check_seed(seed: int | None) -> None:
    """Raise SettingError for what is no seed of stochastic rounding."""
    if seed is not None and (type(seed) is not int or not 0 <= seed <= LARGEST_SEED):
        raise SettingError(f"stochastic: {shown(seed)} is not allowed; a seed of 0 to {LARGEST_SEED}, or None")


def share_text(share: float | None) -> str:
    """` 0.9999`, after a range's name; empty for a range that has none."""
    return "" if share is None else f" {share:.10g}"


def _allow(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingError(f"{field}: {shown(value)} is not allowed; {', '.join(allowed)}")
