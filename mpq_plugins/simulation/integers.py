"""A layer's choice as the integers that backends store: signed 8-bit codes, a scale and a zero point per channel."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.layers import LayerChoice
from ..quantization.integer_codes import integer_codes
from .parts import weight_parts


@dataclass(frozen=True)
class IntegerWeight:
    """w' = (codes - zero_point) scale, the weight `simulate_layer` makes, to the last bit.

    codes: int8, the weight's shape, of b bits in -2^(b-1) .. 2^(b-1) - 1 (at one bit -1 and 1, or 0 for weights
    that are all 0); scale: float32 (channels, groups), in the weights' units, one group unless per_group, negative in
    some groups of the full range; zero_point: int64 (channels, groups); one_scale: all channels share both.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    channel_axis: int
    one_scale: bool

    def dequantized(self) -> Tensor:
        """The weight in float32."""
        rows = self.group_rows(self.codes).float() - self.zero_point.reshape(-1, 1).float()
        values = (rows * self.scale.reshape(-1, 1) + 0.0).reshape(self.scale.shape[0], -1)  # no -0 of a negative scale
        return from_channel_rows(values, self.codes.shape, self.channel_axis)

    def code_problem(self, codes: Tensor) -> str | None:
        """How codes read back from a backend differ from these, in words; None where they do not."""
        if codes.shape != self.codes.shape:
            return f"has shape {list(codes.shape)}, the plan {list(self.codes.shape)}"
        wrong = int((codes != self.codes).sum())
        return f"has {wrong} of {codes.numel()} codes that are not the plan's" if wrong else None

    def rescaled(self, factor: Tensor) -> "IntegerWeight":
        """The integers of the weight times a factor for each output channel, as folding a norm leaves it.

        factor: (channels,). Codes are the same and scales follow; where the factor is negative, codes are mirrored, and
        where it is 0, they mean 0. Several channels of one scale have their own now.
        """
        rows, zero_point = self.group_rows(self.codes).long(), self.zero_point.reshape(-1, 1)
        sign = factor[:, None].expand(self.scale.shape).reshape(-1, 1)
        # -c, or -1 - c, which is in the same range of codes whatever that is, and moves the zero point likewise.
        shift = torch.where((zero_point == 0) & (rows.amin(1, keepdim=True) > -128), 0, -1)
        rows, zero_point = (torch.where(sign < 0, shift - values, values) for values in (rows, zero_point))
        rows = torch.where(sign == 0, zero_point, rows).reshape(self.scale.shape[0], -1)
        scale = torch.where(factor[:, None] == 0, 1.0, self.scale * factor[:, None].abs())
        codes = from_channel_rows(rows.to(torch.int8), self.codes.shape, self.channel_axis)
        return replace(self, codes=codes, scale=scale, zero_point=zero_point.reshape(self.scale.shape), one_scale=False)

    def group_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as one row for each scale."""
        return channel_rows(weight, self.channel_axis).reshape(self.scale.numel(), -1)


def integer_weight(weight: Tensor, choice: LayerChoice) -> IntegerWeight:
    """The integers of one layer, part by part.

    Raises SettingError, naming the layer, for what has no such form: two intervals, a part in floating point; and
    WeightError for NaN or infinity.
    """
    scheme = choice.scheme.as_affine
    if scheme is None:
        raise SettingError(
            f"layer {choice.name!r}: {choice.scheme} has no integer codes on one grid; legalise the plan first"
        )
    axis, channels = choice.channel_axis, choice.channels
    groups = max(1, scheme.groups_per_channel(choice.shape, axis, choice.name))
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    scale = torch.ones(channels, groups, dtype=torch.float32)
    zero_point = torch.zeros(channels, groups, dtype=torch.int64)
    for part in weight_parts(weight.cpu(), choice):
        if part.in_float:
            count = len(part.channels)
            raise SettingError(f"layer {choice.name!r}: {count} channels are in float; legalise the plan first")
        quantized = integer_codes(part.values, part.bits, choice.scheme, channel_axis=axis, layer=choice.name)
        # Asymmetric codes start at 0; signed ones at -2^(b-1).
        shift = 0 if scheme.symmetric or part.bits == 1 else 2 ** (part.bits - 1)
        part.put(codes, (quantized.codes - shift).to(torch.int8))
        # One row a channel, or one for all of them.
        scale[part.channels] = torch.from_numpy(quantized.grid.scale.copy()).reshape(-1, groups)
        zero_point[part.channels] = torch.from_numpy(quantized.grid.zero_point.astype(np.int64) - shift).reshape(
            -1, groups
        )
    whole = IntegerWeight(
        codes, scale, zero_point, axis, scheme.granularity == "per_tensor" and choice.bits is not None
    )
    return _without_zero_scales(whole) if (scale == 0).any() else whole


def _without_zero_scales(weight: IntegerWeight) -> IntegerWeight:
    """Binary codes of all-zero weights have the scale 0, by which backends divide: code 0 and scale 1 say the same."""
    empty = weight.scale.reshape(-1, 1) == 0
    rows = weight.group_rows(weight.codes).masked_fill(empty, 0).reshape(weight.scale.shape[0], -1)
    codes = from_channel_rows(rows, weight.codes.shape, weight.channel_axis)
    return replace(weight, codes=codes, scale=torch.where(weight.scale == 0, 1.0, weight.scale))
