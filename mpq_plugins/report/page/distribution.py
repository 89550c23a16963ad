"""How a layer's weights are distributed, and which levels its codes can have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.deferred import Deferred
from ...errors import MPQError, SettingError
from ...plans.scheme import Scheme, needs_whole_layer
from ...plans.table import LayerTable
from .measured import widths_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = Deferred("torch")

BINS = 64
MOST_BITS = 6  # more levels would lie closer than a screen can draw


@dataclass(frozen=True)
class Distribution:
    """A histogram of a layer's weights, and the values that codes stand for.

    Attributes:
        low: The least weight, where the first bin begins.
        high: The greatest, where the last one ends.
        counts: Weights in each of the bins, which are of one width.
        channel: The output channel whose levels are shown, where channels have scales of their own; else None.
        levels: What is left of that channel, or of the layer, at each width: distinct values, ascending.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    channel: int | None
    levels: Mapping[int, tuple[float, ...]]

    def document(self) -> dict[str, Any]:
        """Give what the page embeds; values to six digits, for they are drawn.

        Returns:
            Plain values.
        """
        levels = {str(bits): [float(f"{one:.6g}") for one in values] for bits, values in self.levels.items()}
        return {
            "low": self.low, "high": self.high, "counts": list(self.counts), "channel": self.channel, "levels": levels,
        }  # fmt: skip


def distributions(
    source: "nn.Module | Any", table: LayerTable, progress: "Callable[[str, int, int], None] | None" = None
) -> dict[int, Distribution]:
    """Read the weights that a table was measured on, and say how they are distributed.

    Args:
        source: The module, or the path of its checkpoint.
        table: The table.
        progress: Called with a layer's name, layers done and layers in all.

    Returns:
        A distribution of each layer by its place; none of a layer without weights.

    Raises:
        SettingError: The source lacks a layer of the table, or its weights are others.
        SourceError: It cannot be read.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> sum(distributions(net, mpq.measure(net))[0].counts)
        64
    """
    from ...weights.find import find_weights

    found = {
        weight.name: weight
        for weight in find_weights(source, fold_bn=table.fold_bn, refuse=False, weights=table.weights)
    }
    made: dict[int, Distribution] = {}
    for place, layer in enumerate(table.layers):
        if progress is not None:
            progress(layer.name, place, len(table.layers))
        if layer.name not in found or found[layer.name].shape != layer.shape:
            raise SettingError(f"model: has no layer {layer.name!r} of shape {list(layer.shape)}, as the table has")
        rows = found[layer.name].rows(0, layer.channels).float()
        if not rows.numel():
            continue
        _check_same(rows, layer)
        made[place] = _distribution(rows, layer.channel_importance, table.scheme_of(layer), widths_of(table))
    if progress is not None:
        progress("", len(table.layers), len(table.layers))
    return made


def _check_same(rows: "Tensor", layer: Any) -> None:
    """Raise SettingError for other weights than those that were measured."""
    from ...models.fingerprint import layer_digest

    low, high = (ends.double().cpu().numpy() for ends in (rows.amin(1), rows.amax(1)))
    if layer.digest and layer.digest != layer_digest(layer.name, layer.shape, low, high):
        raise SettingError(
            f"model: the weights of layer {layer.name!r} are not those that the table was measured on; measure again, "
            "or give the model that was measured"
        )


def _distribution(rows: "Tensor", norms: Any, scheme: Scheme, bits: Sequence[int]) -> Distribution:
    """Of a matrix (channels, weights): all of its weights, and the levels of all, or of the channel in the middle."""
    values = rows.detach().cpu().numpy().ravel()
    # In doubles, as between the ends of a float32 layer there may be fewer numbers than bins, or more than a float32.
    counts, edges = np.histogram(values, BINS, (np.float64(values.min()), np.float64(values.max())))
    channel = None if scheme.granularity == "per_tensor" else int(np.argsort(norms, kind="stable")[len(norms) // 2])
    levels = dict(_levels(rows, channel, scheme, [b for b in bits if b <= MOST_BITS]))
    return Distribution(float(edges[0]), float(edges[-1]), tuple(counts.tolist()), channel, levels)


def _levels(
    rows: "Tensor", channel: int | None, scheme: Scheme, bits: Sequence[int]
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """The distinct values of a channel, or of all, at each width; none at a width that the layer cannot have."""
    from ...quantization.quantize import fake_quantize

    shown = slice(None) if channel is None else slice(channel, channel + 1)
    if not needs_whole_layer(scheme):
        rows, shown = rows[shown], slice(None)
    for b in bits:
        try:
            quantized = fake_quantize(rows.detach().clone(), b, scheme)
        except MPQError:
            continue
        yield b, tuple(torch.unique(quantized[shown]).tolist())
