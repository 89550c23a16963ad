"""The compiled loops of one-dimensional k-means. Importing this module imports numba."""

import numpy as np

from .exactly import exactly


@exactly
def last_splits(count, total, square, alone, zero, most):  # type: ignore[no-untyped-def]
    """Where the last cluster begins in the best clustering of the first i cells in j + 1 clusters, (most, cells + 1).

    Divide and conquer over i, whose best split never moves left: most x cells x log(cells) steps. count, total and
    square are prefix sums, (cells + 1,), of the cells' weights, sums and sums of squares; alone: what each cell costs
    as a cluster, (cells,), for there the sums cancel most. A cluster that holds cell `zero` (-1 for none) has its
    centroid at 0, any other at its mean; either way the cost is concave (it satisfies the quadrangle inequality), which
    is what keeps the splits in order.
    """
    cells = len(count) - 1
    splits = np.zeros((most, cells + 1), np.int32)
    before, after = np.full(cells + 1, np.inf), np.empty(cells + 1)
    before[0] = 0.0
    tasks = np.empty((128, 4), np.int64)
    for j in range(most):
        after[:] = np.inf
        tasks[0] = (j + 1, cells, j, cells - 1)
        waiting = 1
        while waiting > 0:
            waiting -= 1
            low, high, first, last = tasks[waiting]
            if low > high:
                continue
            i = (low + high) >> 1
            best, split = np.inf, first
            for m in range(first, min(last, i - 1) + 1):
                if m + 1 == i:
                    cost = alone[m]
                else:
                    cost = square[i] - square[m]
                    if not m <= zero < i:
                        cluster_sum = total[i] - total[m]
                        cost = max(cost - cluster_sum * cluster_sum / (count[i] - count[m]), 0.0)
                if before[m] + cost < best:
                    best, split = before[m] + cost, m
            after[i], splits[j, i] = best, split
            tasks[waiting] = (low, i - 1, first, split)
            tasks[waiting + 1] = (i + 1, high, split, last)
            waiting += 2
        before, after = after, before
    return splits


@exactly
def lloyd(values, total, centroids, zero, rounds):  # type: ignore[no-untyped-def]
    """Lloyd's iteration in place, until no value changes its cluster; the number of rounds it took.

    values: ascending, (n,); total: their prefix sums, float64 (n + 1,); centroids: float64 (k,), ascending; the one at
    position `zero` (-1 for none) stays at 0. A cluster without values keeps its centroid.
    """
    k = len(centroids)
    ends, known = np.empty(k + 1, np.int64), np.empty(k + 1, np.int64)
    ends[0], ends[k] = 0, len(values)
    known[:] = -1
    for turn in range(rounds):
        for c in range(k - 1):
            middle = (centroids[c] + centroids[c + 1]) / 2
            low, high = ends[c], len(values)
            while low < high:
                at = (low + high) >> 1
                if values[at] <= middle:
                    low = at + 1
                else:
                    high = at
            ends[c + 1] = low
        if (ends == known).all():
            return turn
        known[:] = ends
        for c in range(k):
            if c != zero and ends[c + 1] > ends[c]:
                centroids[c] = (total[ends[c + 1]] - total[ends[c]]) / (ends[c + 1] - ends[c])
    return rounds
