"""The compiled error kernel of two-interval quantizers. Importing this module imports numba."""

import numpy as np
from numpy.typing import NDArray

from .kernel_numba import Floats, Stored, compiled, value


@compiled
def _sums(rows, split, dense, tail, stride, offset, top, largest, out):  # type: ignore[no-untyped-def]
    """Fill out (R, K, 3) for stored rows (R, n) and grids (P, K), P = R or 1, in float64."""
    for r in range(rows.shape[0]):
        p = r if dense.shape[0] > 1 else 0
        row = rows[r]
        for k in range(dense.shape[1]):
            edge, inner, outer, last = split[p, k], dense[p, k], tail[p, k], top[k]
            per_inner = 1 / (inner * stride) if inner > 0 else 0.0
            per_outer = 1 / (outer * stride) if outer > 0 else 0.0
            shift = offset / stride
            relative = squared = most = 0.0
            for i in range(len(row)):
                magnitude = abs(np.float64(value(row[i])))
                outside = magnitude > edge
                base = edge if outside else 0.0
                unit = outer if outside else inner
                inverse = per_outer if outside else per_inner
                j = min(max(np.rint((magnitude - base) * inverse - shift), 0.0), last)
                error = abs(magnitude - (base + (stride * j + offset) * unit))
                relative += error / magnitude if magnitude > 0 else 0.0
                squared += error * error
                if largest:
                    most = max(most, error)
            out[r, k, 0] = relative
            out[r, k, 1] = squared
            out[r, k, 2] = most


def sums(rows: Stored, split: Floats, dense: Floats, tail: Floats, top: Floats, shared: bool, largest: bool) -> Floats:
    """Error sums (R, K, 3) of rows (R, n); split, dense and tail (P, K), P = R or 1; top (K,)."""
    out: NDArray[np.float64] = np.zeros((len(rows), dense.shape[1], 3))
    stride, offset = (2.0, 1.0) if shared else (1.0, 0.0)
    _sums(rows, split, dense, tail, stride, offset, top, largest, out)
    return out
