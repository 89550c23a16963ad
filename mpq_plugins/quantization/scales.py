"""Scales as they are stored: rounded to a floating-point type before any weight becomes a code."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..plans.affine import ScaleDtype

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Format:
    """A floating-point type. digits: of the significand, the hidden one too; least: the exponent of the smallest normal
    number, 2^least."""

    digits: int
    least: int
    largest: float

    @property
    def normal(self) -> float:
        """The smallest normal number."""
        return 2.0**self.least

    @property
    def step(self) -> float:
        """The smallest number above 0, and the distance between those below the normal ones."""
        return 2.0 ** (self.least - self.digits + 1)


FORMATS: dict[ScaleDtype, _Format] = {
    "float32": _Format(24, -126, float(np.finfo(np.float32).max)),
    "float16": _Format(11, -14, 65504.0),
    "bfloat16": _Format(8, -126, (2 - 2.0**-7) * 2.0**127),
}


def rounded_scale(exact: Floats, dtype: ScaleDtype = "float32") -> NDArray[np.float32]:
    """Scales >= 0 as numbers of the type, float32 holding all of them; infinite where beyond it.

    Halves are rounded to nearest. Float32 is so but below its normal numbers, where steps are coarse: up there, so that
    no weight is clipped. No scale becomes 0 but the smallest number there is; an all-zero group, which may have any,
    has 1.
    """
    own = FORMATS[dtype]
    if dtype != "float32":
        return np.where(exact == 0, 1.0, _nearest(exact, own)).astype(np.float32)
    if exact.size == 0 or exact.min() >= own.normal:
        return exact.astype(np.float32)
    steps = np.maximum(np.ceil(exact / own.step), 1.0) * own.step
    return np.where(exact == 0, 1.0, np.where(exact < own.normal, steps, exact)).astype(np.float32)


def check_scales(scale: NDArray[np.float32], dtype: ScaleDtype, layer: str) -> None:
    """Raise SettingError, naming the layer, where a scale was beyond the type."""
    beyond = np.isinf(scale)
    if beyond.any():
        raise SettingError(
            f"layer {layer!r}: {int(beyond.sum())} scales are beyond {dtype}, whose largest number is "
            f'{FORMATS[dtype].largest:.5g}. Use scale_dtype="float32", or skip the layer.'
        )


def _nearest(exact: Floats, own: _Format) -> Floats:
    """The nearest number above 0; of two the even one."""
    exponent = np.maximum(np.frexp(exact)[1] - own.digits, own.least - own.digits + 1)
    nearest: Floats = np.ldexp(np.maximum(np.rint(np.ldexp(exact, -exponent)), 1.0), exponent)
    return np.where(nearest > own.largest, np.inf, nearest)
