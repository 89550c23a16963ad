"""Uniform integer codes, as plans know them."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..common.checks import shown
from ..common.public import public
from ..errors import SettingError
from .granular import Grain, Granular, GroupSize, allow, check_bits

RangeName = Literal["minmax", "percentile", "mse", "kl"]
Symmetry = bool | Literal["full"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
RANGES = ("minmax", "percentile", "mse", "kl")
USUAL_SHARE = 0.9999
LARGEST_SEED = 2**53  # which any reader of JSON has exactly
SYMMETRIES: dict[Symmetry, str] = {False: "asymmetric", True: "symmetric", "full": "full-range symmetric"}
SCALE_BITS: dict[ScaleDtype, int] = {"float32": 32, "float16": 16, "bfloat16": 16}


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
        allow("range", self.range, RANGES)
        check_seed(self.stochastic)
        object.__setattr__(self, "share", checked_share(self.share, self.range))
        allow("scale_dtype", self.scale_dtype, tuple(SCALE_BITS))
        allow("scheme", self.name, ("affine",))
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
