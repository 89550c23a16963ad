"""A scheme as somebody else's distribution would bring it, in one file and with public names alone.

Levels are 0 and powers of two below each group's greatest magnitude m: w' = +-m 2^-j, j = 0 .. 2^(b-1) - 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpq_plugins import Granular, RowQuantizer, SettingError


@dataclass(frozen=True, kw_only=True)
class Powers(Granular):
    """Powers of two, steeper where `halve` is off: then each level is a quarter of the next."""

    quantizer: ClassVar[str] = f"{__name__}:PowersQuantizer"
    name: ClassVar[str] = "powers"

    granularity: str = "per_channel"  # type: ignore[assignment]  # checked below
    group_size: int | None = None
    halve: bool = True

    def __post_init__(self) -> None:
        self.check_granularity()

    def __str__(self) -> str:
        return f"powers of {2 if self.halve else 4} {self.grain}"

    def check_bits(self, bits: int, name: str = "bits") -> int:
        if bits not in range(2, 9):
            raise SettingError(f"{name}: {bits} is not allowed with powers, which need a sign; 2 to 8")
        return bits

    def levels(self, bits: int) -> int:
        return int(2**bits - 1)


class PowersQuantizer(RowQuantizer):
    """A code is 0, or j + 1 with the sign above it."""

    scheme: Powers

    def fit(self, rows: Tensor, bits: int) -> Tensor:
        return rows.abs().amax(1, keepdim=True)

    def encode_rows(self, rows: Tensor, tables: Tensor, bits: int) -> Tensor:
        values = self._magnitudes(tables, bits)
        nearest = (rows.abs()[..., None] - values[:, None]).abs().argmin(2)
        return torch.where((rows < 0) & (nearest > 0), nearest + 2 ** (bits - 1), nearest)

    def decode_rows(self, codes: Tensor, tables: Tensor, bits: int) -> Tensor:
        half = 2 ** (bits - 1)
        magnitudes = self._magnitudes(tables, bits).gather(1, (codes.long() % half).reshape(len(codes), -1))
        return torch.where(codes >= half, -magnitudes, magnitudes)

    def _magnitudes(self, tables: Tensor, bits: int) -> Tensor:
        """(groups, 2^(bits - 1)), 0 first."""
        exponents = torch.arange(2 ** (bits - 1) - 1, device=tables.device) * (1 if self.scheme.halve else 2)
        return torch.cat((torch.zeros_like(tables), tables * 2.0**-exponents), dim=1)
