"""The regions that share a scale, as rows of a matrix, and back."""

from torch import Tensor

from ..plans.scheme import Granular


def region_rows(rows: Tensor, scheme: Granular, regions_per_channel: int) -> Tensor:
    """Channel rows (C, n) -> one row per region that has its own scale."""
    if scheme.granularity == "per_tensor":
        return rows.reshape(1, -1)
    if rows.numel() == 0:
        return rows
    return rows.reshape(rows.shape[0] * regions_per_channel, -1)
