"""The compiled loop of compensated rounding: a few columns of every row, each to its nearest level."""

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@numba.njit(cache=True, nogil=True)
def _nearest(wanted: float, values: Floats, low: int, high: int) -> int:
    """Which of values[low] .. values[high], ascending, is nearest."""
    while low < high:
        middle = (low + high) // 2
        if 2 * wanted > np.float64(values[middle]) + np.float64(values[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, nogil=True)
def round_columns(
    target: Floats,
    carried: Floats,
    feedback: Floats,
    values: Floats,
    first: NDArray[np.int64],
    group: NDArray[np.int32],
    held: Floats,
    rounded: Floats,
) -> None:
    """Fill `rounded`. All but `feedback` (columns, columns) and the tables are (rows, columns)."""
    rows, columns = target.shape
    lost = np.zeros(columns, np.float32)
    for r in range(rows):
        for j in range(columns):
            wanted = np.float64(target[r, j] + carried[r, j])
            for i in range(j):
                wanted += lost[i] * feedback[i, j]
            level = held[r, j]
            if np.isnan(level):
                level = values[_nearest(wanted, values, first[group[r, j]], first[group[r, j] + 1] - 1)]
            rounded[r, j] = level
            lost[j] = target[r, j] - level


@numba.njit(cache=True, nogil=True)
def move_singly(
    slope: NDArray[np.float64],
    h: NDArray[np.float64],
    values: Floats,
    first: NDArray[np.int64],
    group: NDArray[np.int32],
    held: Floats,
    rounded: Floats,
    sweeps: int,
) -> None:
    """Move single weights of `rounded` (rows, d) to the level that is best with all others as they are.

    slope: (target - rounded) H, which is kept up.
    """
    rows, columns = rounded.shape
    for r in range(rows):
        for _ in range(sweeps):
            moved = False
            for j in range(columns):
                if not np.isnan(held[r, j]) or not h[j, j] > 0:
                    continue
                wanted = rounded[r, j] + slope[r, j] / h[j, j]
                level = values[_nearest(wanted, values, first[group[r, j]], first[group[r, j] + 1] - 1)]
                step = np.float64(level) - np.float64(rounded[r, j])
                if step * step * h[j, j] - 2 * step * slope[r, j] < 0:
                    rounded[r, j] = level
                    slope[r] -= step * h[j]
                    moved = True
            if not moved:
                break
