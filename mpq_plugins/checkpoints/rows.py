"""A weight as rows, one for each output channel, and back."""

from collections.abc import Sequence

from torch import Tensor


def channel_rows(weight: Tensor, channel_axis: int) -> Tensor:
    """Weight (any shape) -> (channels, elements), output channel first, the rest in its own order."""
    if weight.dim() == 0:
        return weight.reshape(1, 1)
    moved = weight.movedim(channel_axis, 0)
    return moved.reshape(moved.shape[0], -1) if weight.numel() else weight.new_empty((moved.shape[0], 0))


def from_channel_rows(rows: Tensor, shape: Sequence[int], channel_axis: int) -> Tensor:
    """Undo channel_rows."""
    if not shape:
        return rows.reshape(())
    moved = [shape[channel_axis], *(n for axis, n in enumerate(shape) if axis != channel_axis)]
    return rows.reshape(moved).movedim(0, channel_axis).contiguous()
