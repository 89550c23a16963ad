"""The compiled loop that fills a ladder of steps: histogram and squared error of each step in one pass."""

import numba
import numpy as np

from .kernel_numba import compiled, value

BLOCK = 1024  # weights that stay in the first-level cache for every step
CODES = 256


@compiled
def _codes(values, step, offset, codes):  # type: ignore[no-untyped-def]  # inlined where it is called
    """Fill codes, uint8 (n,), of the weights (n,), and return their squared error in squared steps."""
    inverse, total = np.float32(1) / step, np.float32(0)
    for i in range(len(values)):
        magnitude = abs(values[i]) * inverse
        code = np.int32(min(magnitude + offset, np.float32(127)))
        error = magnitude - np.float32(code)
        total += error * error
        codes[i] = np.uint8(code | (128 if values[i] < 0 else 0))
    return total


@numba.njit(nogil=True, cache=True, error_model="numpy")
def fill_ladder(stored, steps, offset, counts, squared):  # type: ignore[no-untyped-def]  # compiled for each dtype
    """Add the weights (n,) to counts, int64 (steps, CODES), and squared, float64 (steps,).

    counts: of codes 0 to 127, and of their negatives 128 places on; what lies beyond is at the ends.
    """
    values, codes = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint8)
    shift = np.float32(offset)
    for start in range(0, len(stored), BLOCK):
        part = stored[start : start + BLOCK]
        length = len(part)
        largest, total = np.float32(0), 0.0
        for i in range(length):
            values[i] = value(part[i])
            largest = max(largest, abs(values[i]))
            total += np.float64(values[i]) * values[i]
        for k in range(len(steps)):
            step = np.float32(steps[k])
            if largest / step + shift < 1:  # all codes are 0
                counts[k, 0] += length
                squared[k] += total
                continue
            # Squares of very large and very small weights are beyond float32.
            squared[k] += _codes(values[:length], step, shift, codes[:length]) * (np.float64(step) * np.float64(step))
            of_step = counts[k]
            for i in range(length):
                of_step[codes[i]] += 1
    for k in range(len(steps)):  # a code of 0 has no sign
        counts[k, 0] += counts[k, CODES // 2]
        counts[k, CODES // 2] = 0
