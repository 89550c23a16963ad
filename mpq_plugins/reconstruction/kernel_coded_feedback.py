"""The compiled loops of compensated rounding to whole-number codes whose bits count; all in steps of the grid."""

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.int16]
Flags = NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def _cheapest(wanted: float, price: float, costs: Doubles, most: int) -> int:
    """The code of least (wanted - k)^2 + price bits(k) among the nearest, its neighbours and 0; see coded_feedback."""
    nearest = int(np.rint(min(max(wanted, -most), most)))
    best, least = nearest, (wanted - nearest) ** 2 + price * costs[nearest + most]
    for code in (max(nearest - 1, -most), min(nearest + 1, most), 0):
        value = (wanted - code) ** 2 + price * costs[code + most]
        if value < least:
            best, least = code, value
    return best


@numba.njit(cache=True, nogil=True)
def round_codes(
    target: Floats, carried: Floats, feedback: Floats, zero: Flags, prices: Doubles, costs: Doubles, codes: Codes
) -> None:
    """Fill `codes`. All but `feedback` (columns, columns), prices (columns,) and costs are (rows, columns)."""
    rows, columns = target.shape
    most = len(costs) // 2
    lost = np.zeros(columns, np.float32)
    for r in range(rows):
        for j in range(columns):
            wanted = np.float64(target[r, j] + carried[r, j])
            for i in range(j):
                wanted += lost[i] * feedback[i, j]
            code = 0 if zero[r, j] else _cheapest(wanted, prices[j], costs, most)
            codes[r, j] = code
            lost[j] = target[r, j] - np.float32(code)


@numba.njit(cache=True, nogil=True)
def move_codes(slope: Doubles, h: Doubles, zero: Flags, prices: Doubles, costs: Doubles, codes: Codes) -> int:
    """Move single codes (rows, d) to what is best with all others as they are, each once; how many were moved.

    slope: (target - codes) H, which is kept up.
    """
    rows, columns = codes.shape
    most, moved = len(costs) // 2, 0
    for r in range(rows):
        for j in range(columns):
            if zero[r, j] or not h[j, j] > 0:
                continue
            now = int(codes[r, j])
            wanted = now + slope[r, j] / h[j, j]
            code = _cheapest(wanted, prices[j], costs, most)
            value = (wanted - code) ** 2 + prices[j] * costs[code + most]
            if value < (wanted - now) ** 2 + prices[j] * costs[now + most]:
                codes[r, j] = code
                slope[r] -= (code - now) * h[j]
                moved += 1
    return moved
