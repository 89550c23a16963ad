"""The groups that share a scale, as rows of a matrix, and back."""

from torch import Tensor

from ..plans.scheme import Scheme


def group_rows(rows: Tensor, scheme: Scheme, groups_per_channel: int) -> Tensor:
    """Channel rows (C, n) -> one row per group that has its own scale."""
    if scheme.granularity == "per_tensor":
        return rows.reshape(1, -1)
    if rows.numel() == 0:
        return rows
    return rows.reshape(rows.shape[0] * groups_per_channel, -1)
