"""Magnitude pruning: which weights go, and a model that is trained on without them.

Deep Compression (arXiv 1510.00149), sec. 2, and Han et al. (arXiv 1506.02626): a weight goes where its magnitude is
below a threshold. Three ways to one are here: a share of each layer, a share of the whole network, standard deviations
of each layer. What is 0 already counts as gone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.checks import is_number, shown
from ..common.patterns import matches
from ..common.public import public
from ..errors import SettingError, WeightError
from ..models.arguments import check_module
from ..models.copying import duplicate
from ..weights.chunks import over_chunks
from ..weights.find import find_weights
from ..weights.handles import Weight
from .parametrized import Mask, put

Array = NDArray[np.float64]
Amounts = float | Mapping[str, float]
"""One for every layer, or by globs (or `re:` expressions) on their names; a layer that none names is not pruned."""


@public
@dataclass(frozen=True)
class Sparsity:
    """This share of every layer's weights is 0 afterwards: those of least magnitude, fewer where some are alike.

    Attributes:
        share: The share, 0 to below 1: one for every layer, or by globs (or `re:` expressions) on their names. A layer
            that none names is not pruned.

    Raises:
        SettingError: A share lies outside 0 to below 1.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> masked = mpq.prune(torch.nn.Sequential(torch.nn.Linear(8, 8)), mpq.Sparsity({"0": 0.25}))
        >>> int((masked[0].weight == 0).sum())
        16
    """

    share: Amounts

    def __post_init__(self) -> None:
        for amount in _values(self.share):
            _check_share(amount)

    def thresholds(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Find the least magnitude that stays in each layer.

        Args:
            weights: The layers' weights.

        Returns:
            The magnitude by layer name, in the weights' units; pruned layers alone.
        """
        shares = _by_layer(self.share, weights)
        return {w.name: _smallest_kept([w], shares[w.name]) for w in weights if w.name in shares}


@public
@dataclass(frozen=True)
class GlobalSparsity:
    """This share of all weights together is 0 afterwards: one threshold for all layers.

    Attributes:
        share: The share, 0 to below 1.

    Raises:
        SettingError: The share lies outside 0 to below 1.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> masked = mpq.prune(net, mpq.GlobalSparsity(0.5))
        >>> sum(int((layer.weight == 0).sum()) for layer in masked)
        64
    """

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def thresholds(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Find the least magnitude that stays, which is the same for all layers.

        Args:
            weights: The layers' weights.

        Returns:
            The magnitude by layer name, in the weights' units.
        """
        return dict.fromkeys((weight.name for weight in weights), _smallest_kept(weights, self.share))


@public
@dataclass(frozen=True)
class Deviations:
    """Weights below this many standard deviations of their layer go.

    Attributes:
        count: Standard deviations, 0 or more: one number for every layer, or by globs (or `re:` expressions) on their
            names. A layer that none names is not pruned.

    Raises:
        SettingError: A number is below 0.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> masked = mpq.prune(net, mpq.Deviations(1.0))
        >>> deviation = net[0].weight.std(unbiased=False)
        >>> bool((masked[0].weight[net[0].weight.abs() < 0.99 * deviation] == 0).all())
        True
    """

    count: Amounts

    def __post_init__(self) -> None:
        for amount in _values(self.count):
            if not (is_number(amount) and 0 <= amount < float("inf")):
                raise SettingError(f"prune: {shown(amount)} is not allowed; standard deviations, 0 or more")

    def thresholds(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Find the least magnitude that stays in each layer.

        Args:
            weights: The layers' weights.

        Returns:
            The magnitude by layer name, in the weights' units; pruned layers alone.
        """
        counts = _by_layer(self.count, weights)
        return {w.name: counts[w.name] * _deviation(w) for w in weights if w.name in counts}


Pruning = Sparsity | GlobalSparsity | Deviations


def checked_thresholds(pruning: Pruning, weights: Sequence[Weight], argument: str = "prune") -> dict[str, float]:
    """Layer -> the least magnitude that stays. argument: what its user calls the pruning.

    Raises SettingError for what is no Pruning and where none would stay in a layer, WeightError on NaN.
    """
    if not isinstance(pruning, Pruning):
        raise SettingError(
            f"{argument}: {shown(pruning)} is not allowed; Sparsity(0.9), GlobalSparsity(0.9) or Deviations(1.0)"
        )
    largest = {weight.name: _largest(weight) for weight in weights}
    thresholds = pruning.thresholds(weights)
    for name, threshold in thresholds.items():
        if 0 < largest[name] < threshold:
            raise SettingError(
                f"layer {name!r}: {pruning} would prune all of it, for its largest weight is {largest[name]:.4g} and "
                f"the threshold {threshold:.4g}. Prune less, or leave the layer out."
            )
    return thresholds


def kept(weight: Tensor, threshold: float) -> Tensor:
    """True where a weight stays."""
    magnitude = weight.detach().float().abs()  # in half precision the threshold would be rounded
    return (magnitude >= threshold) & (magnitude != 0)


def pruned(weight: Tensor, threshold: float) -> Tensor:
    """The weight with 0 in place of what goes."""
    return weight.detach().where(kept(weight, threshold), 0)


def prune(model: nn.Module, pruning: Pruning, *, skip: Sequence[str] = (), only: Sequence[str] = ()) -> nn.Module:
    """Make a copy whose weights are masked, and stay so while it is trained; `finish` makes them plain again.

    To store it, save its state_dict or `finish` it: torch pickles no parametrized modules.

    Args:
        model: The model; it is not changed.
        pruning: Which weights become 0: Sparsity, GlobalSparsity or Deviations.
        skip: Globs on the names of layers that are not pruned, as in `find_weights`.
        only: Globs on the names of the layers that are, as in `find_weights`.

    Returns:
        The masked copy.

    Raises:
        SettingError: A glob matches nothing, no weight of a layer would stay, or weights are tied.
        WeightError: A weight holds NaN or infinity, or has a dtype that we do not quantize.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> masked = mpq.prune(torch.nn.Sequential(torch.nn.Linear(8, 8)), mpq.Sparsity(0.5))
        >>> int((masked[0].weight == 0).sum())
        32
    """
    check_module(model)
    masked = duplicate(model)
    weights = list(find_weights(masked, skip=skip, only=only))
    thresholds = checked_thresholds(pruning, weights, "pruning")
    for weight in weights:
        if weight.name in thresholds:
            values = masked.get_submodule(weight.name).weight
            assert isinstance(values, Tensor)
            put(masked, weight, Mask(kept(values, thresholds[weight.name])))
    return masked


def _values(amounts: Amounts) -> Iterable[float]:
    return amounts.values() if isinstance(amounts, Mapping) else (amounts,)


def _check_share(share: float) -> None:
    if not (is_number(share) and 0 <= share < 1):
        raise SettingError(
            f"prune: {shown(share)} is not allowed; a share from 0 up to, but not, 1, where nothing would be left (0.9 "
            "for nine tenths)"
        )


def _by_layer(amounts: Amounts, weights: Sequence[Weight]) -> dict[str, float]:
    if not isinstance(amounts, Mapping):
        return dict.fromkeys((weight.name for weight in weights), amounts)
    shares: dict[str, float] = {}
    for pattern, amount in amounts.items():
        names = [weight.name for weight in weights if any(matches(pattern, name) for name in weight.names)]
        if not names:
            some = ", ".join(repr(weight.name) for weight in weights[:3])
            raise SettingError(f"prune: {pattern!r} matches no layer; names look like {some}")
        for name in names:
            if shares.setdefault(name, amount) != amount:
                raise SettingError(f"prune: layer {name!r} is given both {shares[name]} and {amount}; give one")
    return shares


def _smallest_kept(weights: Sequence[Weight], share: float) -> float:
    """The magnitude that is next when this share of all weights is gone, exactly: by the bits of float32, which are in
    the order of what they say; first the upper half of them, then the lower among those alike."""
    going = round(share * sum(weight.numel for weight in weights))
    if not going:
        return 0.0
    upper = _histogram(weights, _upper_bits)
    high = int(np.searchsorted(np.cumsum(upper), min(going, upper.sum() - 1), "right"))
    left = min(going, int(upper.sum()) - 1) - int(upper[:high].sum())
    low = int(np.searchsorted(np.cumsum(_histogram(weights, partial(_lower_bits, high=high))), left, "right"))
    return float(np.uint32(high << 16 | low).view(np.float32))


def _histogram(weights: Sequence[Weight], count: Callable[[Tensor], Array]) -> NDArray[np.int64]:
    total = np.zeros(1 << 16)
    for weight in weights:
        total += over_chunks(weight)(count).sum(axis=0)
    return total.astype(np.int64)


def _upper_bits(rows: Tensor) -> Array:
    return np.bincount(_bits(rows) >> 16, minlength=1 << 16).astype(np.float64)[None]


def _lower_bits(rows: Tensor, high: int) -> Array:
    bits = _bits(rows)
    return np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16).astype(np.float64)[None]


def _bits(rows: Tensor) -> NDArray[np.uint32]:
    patterns: NDArray[np.uint32] = rows.detach().float().abs().contiguous().cpu().numpy().view(np.uint32).reshape(-1)
    return patterns


def _largest(weight: Weight) -> float:
    largest = float(over_chunks(weight)(_largest_of).max(initial=0.0))
    if not np.isfinite(largest):
        raise WeightError(f"layer {weight.name!r}: holds NaN or infinite weights. Repair it, or leave the layer out.")
    return largest


def _largest_of(rows: Tensor) -> Array:
    return np.array([rows.detach().float().abs().max().item() if rows.numel() else 0.0])


def _deviation(weight: Weight) -> float:
    """Standard deviation of a layer's weights."""
    total, squares = over_chunks(weight)(_moments).sum(axis=0)
    count = max(1, weight.numel)
    return float(np.sqrt(max(0.0, squares / count - (total / count) ** 2)))


def _moments(rows: Tensor) -> Array:
    values = rows.detach().double()
    return torch.stack((values.sum(), values.square().sum()))[None].cpu().numpy()
