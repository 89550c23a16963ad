"""A ladder of steps for entropy-coded weights: what codes cost and lose at each, in one pass over a weight."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plans.entropy_coded import LEAST_STEP, EntropyCoded
from ..plans.stats import Array
from .contract import Each
from .entropy_coded import codes_of
from .kernel import numba_available, stored_values

OCTAVE = 8  # steps
OCTAVES = 9  # from codes of 8 bits, beyond where all of them are 0
CODES = 256  # places in a histogram: 0 to 127, and their negatives 128 places on

RUNGS = OCTAVE * OCTAVES + 1


def ladder(largest: float, scheme: EntropyCoded) -> Array:
    """Steps, float64 (RUNGS,): from the finest that these weights have, each by an eighth of an octave coarser."""
    finest = np.float32(max(scheme.finest_step(largest), LEAST_STEP) if largest else 1.0)
    steps: Array = np.float64(finest) * 2.0 ** (np.arange(RUNGS) / OCTAVE)
    return steps


def entropies(counts: Array) -> Array:
    """Bits of all codes together at the entropy of their own histogram; counts: (..., CODES) -> (...)."""
    total = counts.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits: Array = np.where(counts > 0, -counts * np.log2(counts / total), 0.0).sum(axis=-1)
    return np.maximum(bits, 0.0)


def climbed(each: Each, scheme: EntropyCoded) -> tuple[Array, Array, Array]:
    """Steps, bits of the codes and squared error at each, all (RUNGS,), of a weight whose chunks `each` looks at."""
    largest = largest_magnitude(each)
    steps = ladder(largest, scheme)
    sums = each(partial(_sums, steps=steps, offset=scheme.rounding_offset)).sum(axis=0)
    return steps, entropies(sums[:, :CODES]), sums[:, CODES]


def largest_magnitude(each: Each) -> float:
    """The greatest magnitude of a weight whose chunks `each` looks at; 0 for an empty one."""
    return float(each(_largest).max(initial=0.0))


def _largest(rows: Tensor) -> Array:
    return np.array([float(rows.detach().abs().max()) if rows.numel() else 0.0])


def _sums(rows: Tensor, steps: Array, offset: float) -> Array:
    """Histogram and squared error at each step, float64 (1, RUNGS, CODES + 1)."""
    counts, squared = np.zeros((len(steps), CODES), np.int64), np.zeros(len(steps))
    if rows.device.type == "cpu" and numba_available():
        from .kernel_coded import fill_ladder

        fill_ladder(stored_values(rows).reshape(-1), steps, offset, counts, squared)
    elif rows.numel():
        _fill_in_torch(rows.detach().float(), steps, offset, counts, squared)
    return np.concatenate([counts, squared[:, None]], axis=1)[None]


def _fill_in_torch(rows: Tensor, steps: Array, offset: float, counts: NDArray[np.int64], squared: Array) -> None:
    """The same on any device."""
    for k, step in enumerate(torch.from_numpy(steps).float()):
        codes = codes_of(rows, step, offset, 8).long()
        places = torch.where(codes < 0, 128 - codes, codes).flatten()
        counts[k] += torch.bincount(places, minlength=CODES).cpu().numpy()
        squared[k] += float((rows.double() - codes * float(step)).square().sum())
