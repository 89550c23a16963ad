"""A quantizer from three functions of rows: what a scheme of another distribution has to say, and no more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..common.public import public
from ..errors import PluginError, SettingError
from ..plans.scheme import scales_per_layer
from ..weights.dtypes import check_weight
from .calibrate import whole_rows
from .contract import Each, PartCodes, PartShape
from .grid import Floats, GroupStats
from .groups import group_rows
from .kernel import reciprocal_of, reduce_errors


@public
class RowQuantizer:
    """All that `Quantizer` asks, made of `fit`, `encode_rows` and `decode_rows`, which a subclass gives.

    Rows are the groups of a weight, float32 (groups, n) on the weight's device, finite and with weights in them. Tables
    are what a group keeps, float32 (groups, scales_per_group + codebook_entries(bits)). A scheme's scales of the layer
    are further columns, the same in every row; a container has them once.

    Args:
        scheme: The scheme whose quantizer it is.
    """

    def __init__(self, scheme: Any) -> None:
        self.scheme = scheme

    def fit(self, rows: Tensor, bits: int) -> Tensor:
        """Fit the tables of each group; a subclass gives it.

        Args:
            rows: The weights, float32 (groups, n).
            bits: The width.

        Returns:
            The tables, (groups, scales_per_group + codebook_entries(bits)), and columns for scales of the layer.
        """
        raise NotImplementedError

    def encode_rows(self, rows: Tensor, tables: Tensor, bits: int) -> Tensor:
        """Turn weights into codes; a subclass gives it.

        Each code is of one weight and its group's table alone, for large groups come in pieces. A code of 0 for the
        weight 0 makes pruned weights take less room.

        Args:
            rows: The weights, float32 (groups, n).
            tables: What `fit` gave.
            bits: The width.

        Returns:
            Integers (groups, n) in 0 .. 2^(bits + interval_bits) - 1.
        """
        raise NotImplementedError

    def decode_rows(self, codes: Tensor, tables: Tensor, bits: int) -> Tensor:
        """Turn codes into weights; a subclass gives it.

        Args:
            codes: The codes, (groups, n).
            tables: What `fit` gave.
            bits: The width.

        Returns:
            The weights, float32 (groups, n).
        """
        raise NotImplementedError

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> "RowGrids":
        """Fit the tables of each group at each bit-width.

        Args:
            each: What looks at the weights: it applies a function to every block of them.
            stats: What is known of each group, R of them; it is not needed here.
            bits: The widths, K of them.

        Returns:
            Grids of K quantizers for each of R groups.

        Raises:
            SettingError: The scheme does not have one of the widths.
            PluginError: `fit` gives tables of another shape.
        """
        widths = [self.scheme.check_bits(b) for b in bits]
        rows = torch.from_numpy(whole_rows(each, self.scheme).astype(np.float32))
        tables = tuple(self._fitted(rows, b).numpy() for b in widths)
        return RowGrids(np.array(widths, np.int64), tables, self)

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """Make the weight that `bits` can hold.

        Args:
            weight: The weight.
            bits: The width.
            channel_axis: The axis of output channels.
            layer: What names the layer in errors.

        Returns:
            The weight, in its own dtype and shape and on its device.

        Raises:
            SettingError: The scheme does not have the width.
            WeightError: The weight holds NaN or infinity, or has another dtype than floating point.
            PluginError: `fit` gives tables of another shape.
        """
        rows, tables, codes = self._quantized(weight, bits, channel_axis, layer)
        values = self.decode_rows(codes, tables, bits) if rows.numel() else rows
        return _as_weight(values, weight.shape, channel_axis, weight.dtype)

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Make symbols, which are the codes, and tables.

        Args:
            weight: The part's weight.
            part: Its shape, width and scheme.

        Returns:
            The codes.

        Raises:
            SettingError: As `fake_quantize`.
            WeightError: As `fake_quantize`.
            PluginError: As `fake_quantize`.
        """
        _, tables, codes = self._quantized(weight, part.bits, part.channel_axis, part.layer)
        symbols, own = part.symbols(codes.cpu().numpy()), self._own(part.bits)
        stored = torch.cat([tables[:, :own].reshape(-1), tables[0, own:]])
        return PartCodes(symbols, stored.cpu().numpy(), np.zeros(0, np.uint8))

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """Make the weight again.

        Args:
            codes: What `encode` gave.
            part: The part's shape, width and scheme.
            dtype: The weight's dtype.

        Returns:
            The weight, of the part's shape.
        """
        rows = torch.from_numpy(codes.symbols.reshape(part.groups, -1).astype(np.int16))
        groups, own = part.groups, self._own(part.bits)
        of_groups, of_layer = torch.from_numpy(codes.tables).tensor_split([groups * own])
        tables = torch.cat([of_groups.reshape(groups, own), of_layer.expand(groups, -1)], dim=1)
        return _as_weight(self.decode_rows(rows, tables, part.bits), part.shape, part.channel_axis, dtype)

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Tell which weights are 0.

        Args:
            codes: What `encode` gave.
            part: The part's shape, width and scheme.

        Returns:
            Flags, (weights,), in the order of the symbols.
        """
        values = channel_rows(self.decode(codes, part, torch.float32), part.channel_axis)
        zero: NDArray[np.bool_] = (values == 0).numpy().reshape(-1)
        return zero

    def _quantized(self, weight: Tensor, bits: int, channel_axis: int, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, tables and codes (int16)."""
        check_weight(weight, layer)
        try:
            self.scheme.check_bits(bits)
        except SettingError as error:
            raise SettingError(f"layer {layer!r}: {error}") from error
        per_channel = self.scheme.groups_per_channel(weight.shape, channel_axis, layer)
        rows = group_rows(channel_rows(weight.detach().float(), channel_axis), self.scheme, per_channel)
        tables = self._fitted(rows, bits)
        if not rows.numel():
            return rows, tables, rows.to(torch.int16)
        return rows, tables, self.encode_rows(rows, tables, bits).to(torch.int16)

    def _fitted(self, rows: Tensor, bits: int) -> Tensor:
        """Tables as they are stored. Raises PluginError where `fit` gives others than the scheme counts."""
        entries = self._own(bits) + scales_per_layer(self.scheme)
        if not rows.numel():
            return torch.zeros(len(rows), entries, dtype=torch.float32)
        tables = self.fit(rows, bits)
        if tables.shape != (len(rows), entries):
            raise PluginError(
                f"schemes: {self.scheme.name!r}, {type(self).__name__}.fit gave tables {list(tables.shape)} at {bits} "
                f"bits; ({len(rows)}, {entries}) is what its scheme counts, groups times numbers of each"
            )
        return tables.float()

    def _own(self, bits: int) -> int:
        """How many numbers each group has."""
        return int(self.scheme.scales_per_group + self.scheme.codebook_entries(bits))


@dataclass(frozen=True)
class RowGrids:
    """K quantizers for each of R groups, by their tables, float32 (R, entries) for each; bits: int (K,)."""

    bits: NDArray[np.int64]
    tables: tuple[NDArray[np.float32], ...]
    quantizer: RowQuantizer

    def error_sums(self, rows: Tensor, largest: bool) -> Floats:
        """As kernel.error_sums, for one table each or one for all rows."""
        plain = rows.detach().float()
        values = plain.double()
        reciprocal = reciprocal_of(values.abs())
        sums = []
        for bits, table in zip(self.bits.tolist(), self.tables, strict=True):
            levels = torch.from_numpy(table).to(rows.device).expand(len(rows), -1)
            codes = self.quantizer.encode_rows(plain, levels, bits)
            error = (values - self.quantizer.decode_rows(codes, levels, bits).double()).abs()
            sums.append(reduce_errors(error, reciprocal, largest))
        return np.stack(sums, axis=1)


def _as_weight(rows: Tensor, shape: Sequence[int], channel_axis: int, dtype: torch.dtype) -> Tensor:
    """Rows (groups, n) as a weight, what lies beyond its dtype at its end."""
    limit = torch.finfo(dtype).max
    channels = shape[channel_axis] if shape else 1
    values = rows.clamp(-limit, limit).to(dtype).reshape(channels, -1) if rows.numel() else rows.to(dtype)
    return from_channel_rows(values, torch.Size(shape), channel_axis)
