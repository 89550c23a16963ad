"""The compiled error kernel. Importing this module imports numba; the compiled code is cached on disk."""

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Stored = NDArray[np.float32] | NDArray[np.uint16]
"""Weights: float32, or bfloat16 as the upper halves of float32, which are read as they are."""

BLOCK = 1024  # weights; a block and its reciprocals stay in the first-level cache for every grid
SAFE_SCALES = (2.0**-40, 2.0**40)
NEARLY_EXACT = 2.0**-12  # of a step: a root mean square error below this is that of a row the grid holds exactly
TINY = {4: 2.0**-100, 8: 2.0**-1000}  # by bytes of the precision; float32 weights are never below the second

compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


def _fma_intrinsic(context, a, b, c):  # type: ignore[no-untyped-def]  # numba's own protocol
    """a * b + c, rounded once: the error of a weight to its last bit, in either precision."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return a(a, a, a), generate


_fma: Any = intrinsic(_fma_intrinsic)


def _stored_value(stored):  # type: ignore[no-untyped-def]  # what it does is below, by the type of what is stored
    """The float32 that is stored."""
    raise NotImplementedError


@overload(_stored_value, inline="always")
def _value_of(stored):  # type: ignore[no-untyped-def]  # numba's own protocol
    if stored == numba.types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


value: Any = _stored_value


@compiled
def _sums(rows, scale, low, high, tiny, largest, out):  # type: ignore[no-untyped-def]  # compiled per precision
    """Fill out (R, K, 3) for stored rows (R, n) and grids (P, K), P = R or 1, in the precision of the grids.

    Weights below `tiny`, whose reciprocal that precision cannot hold, must round to 0 in every grid: their
    relative error is 1.
    """
    one = scale.dtype.type(1)
    values = np.zeros(BLOCK, scale.dtype)
    reciprocal = np.zeros(BLOCK, scale.dtype)
    for r in range(rows.shape[0]):
        p = r if scale.shape[0] > 1 else 0
        row = rows[r]
        for start in range(0, rows.shape[1], BLOCK):
            part = row[start : start + BLOCK]
            length = len(part)
            lost = 0
            for i in range(length):
                w = scale.dtype.type(value(part[i]))
                magnitude = abs(w)
                values[i] = w
                reciprocal[i] = one / magnitude if magnitude >= tiny else one - one
                lost += magnitude < tiny and w != 0
            if length % 2:  # zero is a level of every grid, so a zero adds no error
                values[length] = 0
                reciprocal[length] = 0
            half = (length + 1) // 2
            for k in range(scale.shape[1]):
                relative, squared = _block_sums(
                    values[:half], values[half : 2 * half], reciprocal[:half], reciprocal[half : 2 * half],
                    one / scale[p, k], scale[p, k], low[p, k], high[p, k],
                )  # fmt: skip
                out[r, k, 0] += np.float64(relative) + lost
                out[r, k, 1] += squared
                if largest:
                    for i in range(length):
                        error = _error(values[i], one / scale[p, k], scale[p, k], low[p, k], high[p, k])
                        out[r, k, 2] = max(out[r, k, 2], abs(error))


@compiled
def _error(w, inverse, scale, least, greatest):  # type: ignore[no-untyped-def]
    """w - w', to the last bit: what the first rounding leaves is rounded again, for a near tie may go wrong once."""
    level = np.rint(w * inverse)
    level += np.rint(_fma(-level, scale, w) * inverse)
    return _fma(-min(max(level, least), greatest), scale, w)


@compiled
def _block_sums(first, second, per_first, per_second, inverse, scale, least, greatest):  # type: ignore[no-untyped-def]
    """Two halves side by side: one accumulator alone would wait for its own last addition at every step."""
    zero = scale - scale
    relative_a = relative_b = squared_a = squared_b = zero
    for i in range(len(first)):
        a = abs(_error(first[i], inverse, scale, least, greatest))
        b = abs(_error(second[i], inverse, scale, least, greatest))
        relative_a += a * per_first[i]
        relative_b += b * per_second[i]
        squared_a += a * a
        squared_b += b * b
    return relative_a + relative_b, squared_a + squared_b


@compiled
def _stats(rows, keys, sums, extremes):  # type: ignore[no-untyped-def]
    """Fill sums (R, 2) with those of |w| and w^2, extremes (R, 2) with the least and greatest key of each row.

    rows: stored (R, n), keys: the same memory as signed integers. Floats order as their bits do once the bits of
    negative ones are flipped, and an integer minimum vectorises where a float one does not.
    """
    mask = keys.dtype.type(np.iinfo(keys.dtype).max)
    shift = keys.dtype.type(8 * keys.itemsize - 1)
    for r in range(rows.shape[0]):
        row = rows[r]
        bits = keys[r]
        absolute = squared = 0.0
        least = mask
        greatest = keys.dtype.type(np.iinfo(keys.dtype).min)
        for i in range(len(row)):
            w = np.float64(value(row[i]))
            absolute += abs(w)
            squared += w * w
        for i in range(len(bits)):
            key = bits[i] ^ ((bits[i] >> shift) & mask)
            least = min(least, key)
            greatest = max(greatest, key)
        sums[r, 0] = absolute
        sums[r, 1] = squared
        extremes[r, 0] = least
        extremes[r, 1] = greatest


def row_table(rows: Stored) -> Floats:
    """Least and greatest weight and the sums of |w| and w^2 of each row, (R, 4); rows must not be empty."""
    table = np.empty((len(rows), 4))
    keys = rows.view(np.int32 if rows.itemsize == 4 else np.int16)
    extremes = np.empty((len(rows), 2), keys.dtype)
    _stats(rows, keys, table[:, 2:], extremes)
    with np.errstate(invalid="ignore"):  # a NaN stays one, whichever of them
        table[:, :2] = _from_keys(extremes)
    return table


def _from_keys(keys: NDArray[Any]) -> NDArray[np.float32]:
    mask = np.iinfo(keys.dtype).max
    bits = keys ^ ((keys >> (8 * keys.itemsize - 1)) & keys.dtype.type(mask))
    whole = bits if keys.itemsize == 4 else bits.view(np.uint16).astype(np.uint32) << np.uint32(16)
    values: NDArray[np.float32] = whole.view(np.float32)
    return values


def sums(rows: Stored, scale: Floats, low: Floats, high: Floats, largest: bool) -> Floats:
    """Error sums (R, K, 3) of rows (R, n) under grids (P, K), P = R or 1; 0 for the largest unless asked for.

    Computed in float32, the faster, where that is as good: scales far from the ends of its range, and no sum so
    small that an underflow could show in it. Elsewhere in float64.
    """
    steps = np.abs(scale)  # which are negative in some groups of the full range
    safe = SAFE_SCALES[0] <= steps.min() and steps.max() <= SAFE_SCALES[1]
    if not safe:
        return _run(rows, scale, low, high, largest)
    results = _run(rows, scale.astype(np.float32), low.astype(np.float32), high.astype(np.float32), largest)
    floor = scale * scale * (rows.shape[1] * NEARLY_EXACT**2)
    # Not "less than", which a NaN from an overflow would pass.
    doubtful = ~((results[..., 1] >= floor) & (results[..., 0] < np.inf) & (results[..., 1] < np.inf)).all(axis=1)
    if doubtful.any():
        again = doubtful if len(scale) > 1 else slice(None)
        results[doubtful] = _run(rows[doubtful], scale[again], low[again], high[again], largest)
    return results


def _run(rows: Stored, scale: NDArray[Any], low: NDArray[Any], high: NDArray[Any], largest: bool) -> Floats:
    out = np.zeros((len(rows), scale.shape[1], 3))
    _sums(rows, scale, low, high, scale.dtype.type(TINY[scale.dtype.itemsize]), largest, out)
    return out
