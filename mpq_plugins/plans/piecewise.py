"""Codes of two regions, as plans know them: PWLQ, a dense one around zero and a wide one."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..common.public import public
from ..errors import SettingError
from .granular import Grain, Granular, GroupSize, allow, check_bits

BreakpointName = Literal["search", "gaussian", "laplacian", "gaussian_root", "laplacian_root"]
StorageName = Literal["region_bit", "shared"]
BREAKPOINTS = ("search", "gaussian", "laplacian", "gaussian_root", "laplacian_root")
STORAGES = ("region_bit", "shared")


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
        allow("breakpoint", self.breakpoint, BREAKPOINTS)
        allow("storage", self.storage, STORAGES)
        allow("scheme", self.name, ("piecewise",))

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
