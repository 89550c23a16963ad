"""Entropy-coded uniform quantization: code = sign(w) floor(|w| / step + offset), w' = code * step."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.affine import Affine
from ..plans.entropy_coded import EntropyCoded
from ..weights.dtypes import check_weight
from .affine import QuantizedTensor
from .contract import PartCodes, PartShape
from .grid import Grids, affine_grids
from .row_quantizer import RowQuantizer

SYMMETRIC = Affine(symmetric=True)


class EntropyCodedQuantizer(RowQuantizer):
    """Quantizes under `EntropyCoded`; see contract.py. A symbol is a code in two's complement of b bits, so 0 is 0."""

    scheme: EntropyCoded

    def fit(self, rows: Tensor, bits: int) -> Tensor:
        """Steps, (groups, 1), where the plan has none: the finest whose codes have so many bits."""
        if self.scheme.step is not None:
            return torch.zeros(len(rows), 0, dtype=torch.float32)
        largest = rows.abs().amax(1, keepdim=True).double().cpu().numpy()
        return torch.from_numpy(affine_grids(-largest, largest, np.array([bits]), SYMMETRIC).scale).to(rows.device)

    def encode_rows(self, rows: Tensor, tables: Tensor, bits: int) -> Tensor:
        """Codes in two's complement. Raises SettingError for those that have more bits."""
        codes: Tensor = codes_of(rows, self._steps(tables), self.scheme.offset, bits) & (2**bits - 1)
        return codes

    def decode_rows(self, codes: Tensor, tables: Tensor, bits: int) -> Tensor:
        """The weights."""
        half = 2 ** (bits - 1)
        values: Tensor = ((codes.int() ^ half) - half).float() * self._steps(tables).to(codes.device)
        return values

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that `bits` can hold."""
        self._check_step(weight, bits, layer)
        return super().fake_quantize(weight, bits, channel_axis=channel_axis, layer=layer)

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Symbols, and steps where the plan has none."""
        self._check_step(weight, part.bits, part.layer)
        return super().encode(weight, part)

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Which weights are 0."""
        zero: NDArray[np.bool_] = codes.symbols == 0
        return zero

    def integers(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> QuantizedTensor:
        """The same as integer codes and a scale for each channel, as the affine scheme has them."""
        self._check_step(weight, bits, layer)
        rows, tables, symbols = self._quantized(weight, bits, channel_axis, layer)
        half = 2 ** (bits - 1)
        codes = ((symbols.int() ^ half) - half).to(torch.int16).reshape(channel_rows(weight, channel_axis).shape)
        scale = self._steps(tables).expand(len(rows), 1).cpu().numpy().copy()
        grid = Grids(np.array([bits], np.int64), True, scale, np.zeros(scale.shape, np.int32))
        whole = from_channel_rows(codes, weight.shape, channel_axis)
        return QuantizedTensor(whole, grid, self.scheme.as_affine, channel_axis, weight.dtype)

    def _quantized(self, weight: Tensor, bits: int, channel_axis: int, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, tables and codes; a weight that its dtype rounded from a level keeps that level's code.

        So quantizing twice changes nothing in bfloat16 either, where a level may lie almost half a step off.
        """
        rows, tables, symbols = super()._quantized(weight, bits, channel_axis, layer)
        if weight.dtype == torch.float32 or not rows.numel():
            return rows, tables, symbols
        steps = self._steps(tables).to(rows.device)
        nearest = torch.round(rows / steps).clamp_(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        at_level = (nearest * steps).to(weight.dtype).float() == rows
        return rows, tables, torch.where(at_level, nearest.to(torch.int16) & (2**bits - 1), symbols)

    def _steps(self, tables: Tensor) -> Tensor:
        """Steps, float32, broadcastable to rows."""
        return tables if self.scheme.step is None else torch.tensor([[self.scheme.step]], dtype=torch.float32)

    def _check_step(self, weight: Tensor, bits: int, layer: str) -> None:
        check_weight(weight, layer)
        if self.scheme.step is None or not weight.numel():
            return
        try:
            check_codes(weight.detach().abs().amax()[None], bits, self.scheme)
        except SettingError as error:
            raise SettingError(f"layer {layer!r}: {error}") from error


def codes_of(rows: Tensor, steps: Tensor, offset: float, bits: int) -> Tensor:
    """Codes, int16, what lies beyond them at their ends; rows: float32, steps: broadcastable to them."""
    most = 2 ** (bits - 1) - 1
    whole = torch.floor(rows.abs() / steps.to(rows.device) + offset).clamp_max_(most)
    return torch.where(rows < 0, -whole, whole).to(torch.int16)


def check_codes(weights: Tensor, bits: int, scheme: EntropyCoded) -> None:
    """Raise SettingError where the step is so small that these weights' codes have more bits."""
    assert scheme.step is not None
    largest = weights.float().abs().max()
    if float(largest / torch.tensor(scheme.step, dtype=torch.float32) + scheme.rounding_offset) >= 2 ** (bits - 1):
        most = 2 ** (bits - 1) - 1
        least = scheme.finest_step(float(largest), bits) * (1 + 5e-6)  # which six digits do not round below it
        raise SettingError(
            f"step: {scheme.step:.6g} is so small that the weight {float(largest):.6g} would have a code beyond {bits} "
            f"bits, which end at {most}; {least:.6g} is the least step for it. Plan for a smaller file, or leave the "
            "layer out (skip)"
        )
