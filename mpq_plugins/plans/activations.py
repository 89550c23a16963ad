"""How a layer's input is quantized: frozen values, free of torch."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict

from ..common.checks import shown
from ..common.documents import STRICT
from ..common.public import public
from ..errors import SettingError
from .affine import checked_share, share_text

InputRangeName = Literal["minmax", "percentile", "mse", "kl", "moving_average"]
Dynamic = Literal["per_tensor", "per_token"]

INPUT_RANGES: tuple[InputRangeName, ...] = ("minmax", "percentile", "mse", "kl", "moving_average")
DYNAMICS: tuple[Dynamic, ...] = ("per_tensor", "per_token")
INPUT_BITS = range(2, 17)


def check_input_bits(bits: Any, name: str = "activation_bits") -> int:
    """Return `bits` if it is an integer in 2..16, else raise SettingError."""
    if type(bits) is not int or bits not in INPUT_BITS:
        raise SettingError(f"{name}: {shown(bits)} is not allowed; 2 to 16, or none for floating point")
    return bits


@public
@dataclass(frozen=True)
class Activations:
    """How a layer's input becomes codes: levels (code - zero_point) scale, code in 0 .. 2^b - 1, one scale a range.

    A static range is found once, from calibration inputs, and stays. A dynamic one is the extremes of each input as it
    comes, of the whole tensor or of each token (the last axis), so it takes no calibration.

    Attributes:
        bits: b, 2 to 16.
        symmetric: Whether the zero point is the middle code, 2^(b-1), which some hardware needs. Otherwise it is
            wherever the range puts it.
        dynamic: None for a static range; `per_tensor`, or `per_token` for linear layers.
        range: How a static range is found: `minmax`, the extremes of all calibration inputs; `percentile`, which leaves
            out as many values beyond either end; `mse`, of least squared error; `kl`, of least divergence between the
            histograms before and after (Migacz, 8-bit Inference with TensorRT, GTC 2017); `moving_average`, of the
            batches' extremes.
        share: The share of values that lie inside a percentile range, above 0.5 and at most 1. None under all others.

    Raises:
        SettingError: A value is not one of these.

    Examples:
        >>> import mpq_plugins as mpq
        >>> str(mpq.Activations(8)), str(mpq.Activations(8, dynamic="per_token"))
        ('8 bits, asymmetric mse', '8 bits, asymmetric dynamic per_token')
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bits: Annotated[int, BeforeValidator(check_input_bits)]
    symmetric: bool = False
    dynamic: Dynamic | None = None
    range: InputRangeName = "mse"
    share: float | None = None

    def __post_init__(self) -> None:
        check_input_bits(self.bits, "activations: bits")
        if type(self.symmetric) is not bool:
            raise SettingError(f"activations: symmetric: {shown(self.symmetric)} is not allowed; true or false")
        if self.dynamic is not None and self.dynamic not in DYNAMICS:
            raise SettingError(f"activations: dynamic: {shown(self.dynamic)} is not allowed; {', '.join(DYNAMICS)}")
        if self.range not in INPUT_RANGES:
            raise SettingError(f"activations: range: {shown(self.range)} is not allowed; {', '.join(INPUT_RANGES)}")
        if self.dynamic is not None and self.range not in ("mse", "minmax"):
            raise SettingError(
                f"activations: range: {self.range} is a static range, and dynamic inputs have the range of their own "
                "extremes; leave out one of the two"
            )
        object.__setattr__(self, "share", checked_share(self.share, self.range, "activations: "))
        if self.dynamic is not None:  # so that equal quantizations are equal values
            object.__setattr__(self, "range", "minmax")

    @property
    def kind(self) -> str:
        """All of it but the width, as `asymmetric mse` or `symmetric dynamic per_token`."""
        grid = "symmetric" if self.symmetric else "asymmetric"
        if self.dynamic is not None:
            return f"{grid} dynamic {self.dynamic}"
        return f"{grid} {self.range}{share_text(self.share)}"

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.kind}"
