"""The levels that each weight of a layer may take under its choice in a plan, whatever the scheme.

The grids are those of the float weights, so the plan's scales stay. A backend, a container or `apply` finds them again
in the rounded weights, for what they are found from is held where it is: the extremes of every affine group, at the
ends of its grid. Weights of exactly 0 stay 0 where that is a level, so a pruned layer stays pruned.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..plans.affine import Symmetry
from ..plans.layers import LayerChoice
from ..plans.scheme import scale_bits_of
from ..quantization.contract import PartCodes, PartShape
from ..quantization.groups import group_rows
from ..quantization.integer_codes import integer_codes
from ..quantization.quantize import fake_quantize, quantizer
from ..simulation.floats import as_float
from ..simulation.parts import WeightPart, weight_parts
from .adaround import group_ends

FREE = float("nan")


@dataclass(frozen=True)
class Levels:
    """Tables of levels, and which of them each weight has.

    values: float32, the levels of all groups one after the other, each group's ascending; first: int64 (groups + 1,),
    where each begins; group: int32, of the weight's shape; held: float32, of the weight's shape, what a weight stays
    at, NaN where it is free.
    """

    values: Tensor
    first: Tensor
    group: Tensor
    held: Tensor

    @classmethod
    def of(cls, weight: Tensor, choice: LayerChoice) -> Self:
        """The levels of a float32 weight. Raises SettingError and WeightError, naming the layer, as quantizing does."""
        axis = choice.channel_axis
        group, held = torch.zeros(weight.shape, dtype=torch.int32), torch.full(weight.shape, FREE, dtype=torch.float32)
        tables: list[Tensor] = []
        for part in weight_parts(weight.detach().cpu(), choice):
            if part.in_float:
                part.put(held, as_float(part.values, part.bits, choice.name))
                continue
            if not part.values.numel():
                continue
            levels, ends = _part_levels(part, choice)
            numbers = torch.arange(len(tables), len(tables) + len(levels), dtype=torch.int32)
            for whole, rows in ((group, numbers[:, None].expand(ends.shape)), (held, ends)):
                part.put(whole, from_channel_rows(rows.reshape(len(part.channels), -1), part.values.shape, axis))
            tables += levels
        first = torch.tensor([0, *np.cumsum([len(table) for table in tables])], dtype=torch.int64)
        return cls(torch.cat(tables) if tables else torch.zeros(0, dtype=torch.float32), first, group, held)


def _part_levels(part: WeightPart, choice: LayerChoice) -> tuple[list[Tensor], Tensor]:
    """The levels of each group of a part, and what its weights, (groups, n), are held at."""
    scheme, axis = choice.scheme, choice.channel_axis
    shape = PartShape(tuple(part.values.shape), axis, part.bits, scheme, choice.name)

    def grouped(values: Tensor) -> Tensor:
        return group_rows(channel_rows(values, axis), scheme, max(1, shape.groups // max(1, len(part.channels))))

    rows = grouped(part.values.float())
    if scheme.as_affine is not None:
        levels, ends = _integer_levels(part, scheme.as_affine.symmetric, choice)
    else:
        levels = [row.unique() for row in _every_level(part.values, shape)]
        nearest = grouped(fake_quantize(part.values, part.bits, scheme, channel_axis=axis, layer=choice.name).float())
        largest = rows.abs().argmax(1, keepdim=True)
        ends = torch.full_like(rows, FREE).scatter(1, largest, nearest.gather(1, largest))
    by_step = scheme.as_affine is not None and not scheme.scales_per_group  # which need not have a level at a constant
    constant = (rows.amin(1, keepdim=True) == rows.amax(1, keepdim=True)) & (not by_step)
    has_zero = torch.tensor([bool((level == 0).any()) for level in levels])[:, None]
    at = rows  # where a scale can be the constant, which is then a level
    if scale_bits_of(scheme) < 32 and constant.any():
        at = grouped(fake_quantize(part.values.float(), part.bits, scheme, channel_axis=axis, layer=choice.name))
    ends = torch.where(constant, at, ends)
    return levels, torch.where((rows == 0) & has_zero & ends.isnan(), 0.0, ends)


def _integer_levels(part: WeightPart, symmetric: Symmetry, choice: LayerChoice) -> tuple[list[Tensor], Tensor]:
    axis, scheme = choice.channel_axis, choice.scheme
    quantized = integer_codes(part.values, part.bits, scheme, channel_axis=axis, layer=choice.name)
    grid = quantized.grid
    scale, zero_point = torch.from_numpy(grid.scale), torch.from_numpy(grid.zero_point)
    least, greatest = float(grid.qmin[0]), float(grid.qmax[0])
    codes = torch.arange(int(least), int(greatest) + 1, 2 if part.bits == 1 else 1)
    levels = list(((codes - zero_point).float() * scale + 0.0).sort(1).values)  # scales may be negative
    both = (part.values, quantized.codes)
    rows, found = (channel_rows(values, choice.channel_axis).reshape(len(scale), -1).float() for values in both)
    # At 1 bit the scale is the mean magnitude, which is the same whatever the signs are; a plan's step is the plan's.
    if part.bits == 1 or not scheme.scales_per_group:
        return levels, torch.full_like(rows, FREE)
    held, at = group_ends(rows, found, least, greatest, symmetric)
    return levels, torch.where(held, (at - zero_point) * scale, FREE)


def _every_level(weight: Tensor, part: PartShape) -> Tensor:
    """What each symbol stands for in each group, (groups, symbols), by decoding all of them."""
    kind = quantizer(part.scheme)
    codes = kind.encode(weight.float(), part)
    symbols, each = 2**part.width, max(1, part.weights // part.groups)
    levels = []
    for start in range(0, symbols, each):
        row = np.minimum(np.arange(start, start + each), symbols - 1).astype(part.dtype)
        every = PartCodes(np.tile(row, part.groups), codes.tables, codes.zero_points)
        values = kind.decode(every, part, torch.float32)
        levels.append(channel_rows(values, part.channel_axis).reshape(part.groups, -1))
    return torch.cat(levels, dim=1)[:, :symbols]
