"""Error sums of many grids in one pass over the weights: numba on the CPU, torch anywhere else."""

import importlib.util
import os
import warnings
from functools import cache, singledispatch
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .grid import AnyGrids, CodebookGrids, Floats, Grids, GroupStats, OwnGrids, PiecewiseGrids
from .kmeans import edges

RELATIVE, SQUARED, LARGEST = range(3)  # what the last axis of the sums holds


def error_sums(rows: Tensor, grids: AnyGrids, largest: bool = False) -> Floats:
    """Sums over each row of |w - w'| / |w| (0 where w = 0), of (w - w')^2, and the largest |w - w'|.

    rows: floating (R, n); grids: K quantizers for R groups, or for 1 shared by all rows. The largest error is
    0 unless `largest` asks for it. Returns float64 (R, K, 3).
    """
    if rows.numel() == 0:
        return np.zeros((rows.shape[0], len(grids.bits), 3))
    return _sums(grids, rows, largest)


@singledispatch
def _sums(grids: AnyGrids, rows: Tensor, largest: bool) -> Floats:
    return cast(OwnGrids, grids).error_sums(rows, largest)


@_sums.register
def _piecewise_sums(grids: PiecewiseGrids, rows: Tensor, largest: bool) -> Floats:
    return (_numba_piecewise if _compiled(rows) else _torch_piecewise)(rows, grids, largest)


@_sums.register
def _affine_sums(grids: Grids, rows: Tensor, largest: bool) -> Floats:
    route = _numba_sums if _compiled(rows) else _torch_sums
    binary = np.flatnonzero(grids.bits == 1)
    if not binary.size:
        return route(rows, grids, largest)
    sums = np.empty((rows.shape[0], len(grids.bits), 3))
    affine = np.flatnonzero(grids.bits > 1)
    if affine.size:
        sums[:, affine] = route(rows, grids.take(affine.tolist()), largest)
    sums[:, binary] = _binary_sums(rows, grids.take(binary.tolist()), largest)
    return sums


def _compiled(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and numba_available()


def error_totals(values: Tensor, grids: AnyGrids, largest: bool = False) -> Floats:
    """As error_sums, over all of `values` taken as one group: float64 (1, K, 3).

    Grids under which it counts where in its row a weight is say so themselves, of `values` as they are.
    """
    own = getattr(grids, "error_totals", None)
    if own is not None and values.numel():
        totals: Floats = own(values, largest)
        return totals
    return error_sums(values.reshape(1, -1), grids, largest)


def row_stats(rows: Tensor) -> GroupStats:
    """What there is to know of each row of a floating (R, n) before quantizing it.

    Where a weight is NaN or infinite, so are the row's sums.
    """
    if rows.numel() == 0:
        zeros = np.zeros(rows.shape[0])
        return GroupStats(zeros, zeros, zeros, zeros, 0)
    if rows.device.type == "cpu" and numba_available():
        from .kernel_numba import row_table

        table = row_table(stored_values(rows))
    else:
        # float32's squares cannot overflow a float64 sum.
        values = rows.double()
        columns = (values.amin(1), values.amax(1), values.abs().sum(1), values.square().sum(1))
        table = torch.stack(columns, dim=1).cpu().numpy()
    low, high, absolute, squared = np.ascontiguousarray(table.T)
    return GroupStats(low, high, absolute, squared, rows.shape[1])


def add_sums(sums: Floats) -> Floats:
    """Fold the first axis of error sums: totals add, the largest error stays the largest."""
    total: Floats = sums[0] if len(sums) == 1 else sums.sum(axis=0)
    total[..., LARGEST] = sums[..., LARGEST].max(axis=0, initial=0.0)
    return total


@cache
def numba_available() -> bool:
    """Whether compiled code can run here: numba is installed, works, and its compiler is not switched off.

    An installed numba that cannot be used gives a warning once, and the torch path.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0" or importlib.util.find_spec("numba") is None:
        return False
    try:
        from . import kernel_numba  # noqa: F401  # compiled on first use; here it only has to load
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"numba cannot be used ({error}); measuring in torch, which is slower", stacklevel=2)
        return False
    return True


@cache
def kernel_name() -> str:
    """What does the arithmetic here: sums of one kernel on one kind of processor are the same to the last bit."""
    if not numba_available():
        return f"torch {torch.__version__}"
    import llvmlite.binding
    import numba

    processor = os.environ.get("NUMBA_CPU_NAME") or llvmlite.binding.get_host_cpu_name()
    return f"numba {numba.__version__} on {processor}"


def _numba_sums(rows: Tensor, grids: Grids, largest: bool) -> Floats:
    from .kernel_numba import sums

    return sums(stored_values(rows), *_levels(grids), largest)


def _torch_sums(rows: Tensor, grids: Grids, largest: bool) -> Floats:
    values = rows.double()
    reciprocal = reciprocal_of(values.abs())
    sums = np.empty((rows.shape[0], len(grids.bits), 3))
    levels = [torch.from_numpy(level).to(rows.device) for level in _levels(grids)]
    for k in range(len(grids.bits)):
        scale, low, high = (level[:, k : k + 1] for level in levels)
        steps = torch.clamp(torch.round(values / scale), low, high)
        sums[:, k] = reduce_errors((values - steps * scale).abs(), reciprocal, largest)
    return sums


def _binary_sums(rows: Tensor, grids: Grids, largest: bool) -> Floats:
    magnitude = rows.double().abs()
    scale = torch.from_numpy(grids.scale).to(rows.device).double()
    errors = [(magnitude - scale[:, k : k + 1]).abs() for k in range(len(grids.bits))]
    return np.stack([reduce_errors(error, reciprocal_of(magnitude), largest) for error in errors], axis=1)


def _numba_piecewise(rows: Tensor, grids: PiecewiseGrids, largest: bool) -> Floats:
    from .kernel_piecewise import sums

    split, dense, tail, top = (a.astype(np.float64) for a in (grids.split, grids.dense, grids.tail, grids.top))
    return sums(stored_values(rows), split, dense, tail, top, grids.shared, largest)


def _torch_piecewise(rows: Tensor, grids: PiecewiseGrids, largest: bool) -> Floats:
    magnitude = rows.double().abs()
    reciprocal = reciprocal_of(magnitude)
    arrays = (grids.split, grids.dense, grids.tail)
    split, dense, tail = (torch.from_numpy(array).to(rows.device).double() for array in arrays)
    sums = np.empty((rows.shape[0], len(grids.bits), 3))
    for k, top in enumerate(grids.top.tolist()):
        outside = magnitude > split[:, k : k + 1]
        base = torch.where(outside, split[:, k : k + 1], 0)
        unit = torch.where(outside, tail[:, k : k + 1], dense[:, k : k + 1])
        steps = torch.where(unit > 0, (magnitude - base) / unit, 0)
        j = torch.round((steps - grids.offset) / grids.stride).clamp(0, top)
        level = base + (grids.stride * j + grids.offset) * unit
        sums[:, k] = reduce_errors((magnitude - level).abs(), reciprocal, largest)
    return sums


@_sums.register
def _codebook_sums(grids: CodebookGrids, rows: Tensor, largest: bool) -> Floats:
    """On any device: what takes time is finding the centroids."""
    plain = rows.detach().float().contiguous()
    values = plain.double()
    reciprocal = reciprocal_of(values.abs())
    sums = np.empty((rows.shape[0], len(grids.bits), 3))
    for k, book in enumerate(grids.centroids):
        levels, between = (torch.from_numpy(array).to(rows.device) for array in (book, edges(book)))
        # One book for all rows, or one each.
        codes = torch.searchsorted(between.expand(rows.shape[0], -1).contiguous(), plain)
        nearest = levels.double().expand(rows.shape[0], -1).gather(1, codes)
        sums[:, k] = reduce_errors((values - nearest).abs(), reciprocal, largest)
    return sums


def _levels(grids: Grids) -> tuple[Floats, Floats, Floats]:
    """Scale, and the least and greatest multiple of it, float64 (R, K)."""
    offset = grids.zero_point.astype(np.float64)
    return grids.scale.astype(np.float64), grids.qmin - offset, grids.qmax - offset


def stored_values(rows: Tensor) -> "NDArray[np.float32] | NDArray[np.uint16]":
    """As the compiled kernel reads them: bfloat16 as its bits, anything else as float32."""
    plain = rows.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(np.uint16)
    values: NDArray[np.float32] = plain.float().numpy()
    return values


def reciprocal_of(magnitude: Tensor) -> Tensor:
    """1 / |w|, and 0 where w = 0."""
    return torch.where(magnitude > 0, 1 / magnitude, 0)


def reduce_errors(error: Tensor, reciprocal: Tensor, largest: bool) -> Floats:
    """The three sums, (R, 3), of errors |w - w'| and reciprocals of |w|, both float64 (R, n)."""
    most = error.amax(1) if largest else error.new_zeros(error.shape[0])
    parts = ((error * reciprocal).sum(1), (error * error).sum(1), most)
    stacked: Floats = torch.stack(parts, dim=1).cpu().numpy()
    return stacked
