"""Entropy-coded uniform quantization: one step for all weights of a layer, codes that cost what the coder takes."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..common.checks import number, shown
from ..common.public import public
from ..errors import SettingError
from .affine import Affine
from .granular import Granular, Granularity, check_bits

LEAST_STEP = 2.0**-126  # below it float32 has fewer digits, and in the end none
LARGEST_STEP = 1e30  # so that no code times a step leaves float32
STEP = f"a number from {LEAST_STEP:.3g} to {LARGEST_STEP:g}"
OFFSET = "a number from 0.1 to 0.5"


@public
@dataclass(frozen=True, kw_only=True)
class EntropyCoded(Granular):
    """Entropy-coded uniform quantization with a dead zone: w' = code * step, and the file's coder makes zeros cheap.

    code = sign(w) floor(|w| / step + rounding_offset), in +-(2^(b-1) - 1), so at 8 bits every int8 backend holds it. An
    offset of 1/2 rounds to nearest; a smaller one makes more codes smaller, which cost fewer bits than their error is
    worth. Plans of `Budget(file_bits=...)` give each layer its step. With equal steps for all weights, squared error is
    the least at a given number of bits (reverse water-filling; Cover and Thomas, Elements of Information Theory, sec.
    10.3.3; Sullivan 1996, Efficient scalar quantization of exponential and Laplacian random variables, for the dead
    zone). Without a step it is the finest that b bits hold, channel by channel, and weights are rounded to nearest.

    Attributes:
        name: `entropy_coded`.
        step: The distance between levels, in the weights' units.
        rounding_offset: What is added before the code is cut to a whole number, 0.1 to 0.5.

    Raises:
        SettingError: A value is not one of these.

    Examples:
        >>> import mpq_plugins as mpq
        >>> mpq.EntropyCoded(step=0.1).levels(8)
        255
    """

    quantizer: ClassVar[str] = "mpq_plugins.quantization.entropy_coded:EntropyCodedQuantizer"
    granularity: ClassVar[Granularity] = "per_channel"  # type: ignore[misc]  # no setting: steps are found by plans
    group_size: ClassVar[int | None] = None  # type: ignore[misc]

    name: Literal["entropy_coded"] = "entropy_coded"
    step: Annotated[float | None, "distance between levels; plans for a file's size give it"] = None
    rounding_offset: Annotated[float, "added to |w| / step before truncating; 0.5 rounds to nearest"] = 0.4

    def __post_init__(self) -> None:
        if self.name != "entropy_coded":
            raise SettingError(f"scheme: {shown(self.name)} is not allowed; entropy_coded")
        if self.step is not None:
            number("step", self.step, STEP, least=LEAST_STEP, most=LARGEST_STEP)
        number("rounding_offset", self.rounding_offset, OFFSET, least=0.1, most=0.5)

    def __str__(self) -> str:
        return "entropy-coded" if self.step is None else f"entropy-coded, step {self.step:.4g}"

    @property
    def scales_per_group(self) -> int:  # type: ignore[override]
        """How many 32-bit numbers a channel has: none where the plan has the step."""
        return int(self.step is None)

    @property
    def offset(self) -> float:
        """What is added to |w| / step before it is truncated: without a step 1/2, which rounds to nearest."""
        return 0.5 if self.step is None else self.rounding_offset

    @property
    def as_affine(self) -> Affine:
        """Symmetric codes with a scale for each channel: what backends run the codes as."""
        return Affine(symmetric=True, granularity="per_channel")

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
            raise SettingError(f"{name}: 1 is not allowed with entropy-coded codes, which have a sign and a 0; 2 to 8")
        return bits

    def levels(self, bits: int) -> int:
        """Count the most different values that a channel can hold.

        Args:
            bits: The width.

        Returns:
            The number.
        """
        return int(2**bits) - 1

    def finest_step(self, largest: float, bits: int = 8) -> float:
        """Give the least step at which the codes of these weights have so many bits.

        Args:
            largest: The greatest magnitude among the weights.
            bits: The width.

        Returns:
            The step, in the weights' units, rounded up in its last digits; 0 where all weights are 0.

        Examples:
            >>> import mpq_plugins as mpq
            >>> round(mpq.EntropyCoded(rounding_offset=0.5).finest_step(12.75), 4)
            0.1
        """
        beyond = 2 ** (bits - 1) - self.rounding_offset
        return largest / beyond * (1 + 1e-6) if math.isfinite(largest) else largest
