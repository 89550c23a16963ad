"""A model layer by layer: the bits of a plan's layers and parts, the errors of a table's layers and widths."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..common.text import printable, printable_lines
from ..plans.granular import FLOAT_BITS
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .details import scheme_words
from .grid import shortened
from .plots import save_plot, write_plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

MOST_ROWS = 60  # whose names can be read; more layers share rows
LONGEST_NAME = 36
ROW = 0.19  # inches
DARK = 0.55  # of the scale: cells above it have white numbers


@dataclass(frozen=True)
class Rows:
    """What is drawn in one line each: names, and the layers that each stands for."""

    names: list[str]
    layers: list[slice]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Rows":
        """A row a layer, or as many neighbours a row as it takes."""
        each = max(1, math.ceil(len(names) / MOST_ROWS))
        slices = [slice(start, min(start + each, len(names))) for start in range(0, len(names), each)]
        short = shortened([printable(name) for name in names], LONGEST_NAME)
        more = [one.stop - one.start - 1 for one in slices]
        shown = [f"{short[one.start]}{f' + {left}' if left else ''}" for one, left in zip(slices, more, strict=True)]
        return cls(shown, slices)

    def note(self, layers: int, what: str) -> str:
        """What to say where layers share rows."""
        return (
            f"\n{layers} layers in {len(self.names)} rows, neighbours together{what}"
            if len(self.names) < layers
            else ""
        )

    def figure(self, width: float) -> "Figure":
        """An empty picture that is high enough for the names."""
        from matplotlib.figure import Figure

        return Figure(figsize=(width, 1.6 + ROW * max(4, len(self.names))), layout="constrained")


def bits_plot(plan: Plan, path: Path, title: str) -> None:
    """Each layer's bits, as shares of its weights or as what its codes take in a file, and its share of all weights."""
    rows = Rows.of([layer.name for layer in plan.layers])
    sizes = np.array([max(1, sum(layer.numel for layer in plan.layers[one])) for one in rows.layers], float)
    figure = rows.figure(9)
    left, sums = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    drawn = _draw_coded if any(layer.coded_bytes is not None for layer in plan.layers) else _draw_shares
    widths = drawn(left, plan, rows, sizes)
    left.set_yticks(range(len(sizes)), rows.names, fontsize=7)
    left.set_ylim(len(sizes) - 0.4, -0.6)
    sums.barh(range(len(sizes)), sizes / sizes.sum(), color="0.6", height=0.85)
    sums.set_xlabel("share of all weights")
    figure.suptitle(printable_lines(title) + rows.note(len(plan.layers), ""), fontsize="medium")
    if widths:
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(8, widths), fontsize="small"
        )
    save_plot(figure, path)


def _draw_shares(axes: "Axes", plan: Plan, rows: Rows, sizes: Array) -> int:
    """Each row's weights by their widths; how many widths there are."""
    from matplotlib import colormaps

    weights = [_weights_by_bits(plan, place) for place in range(len(plan.layers))]
    counts = [sum(weights[one], Counter()) for one in rows.layers]
    widths = sorted({bits for count in counts for bits in count})
    left = np.zeros(len(counts))
    for position, bits in enumerate(widths):
        share = np.array([count[bits] for count in counts]) / sizes
        colour = colormaps["viridis"](0.95 - 0.9 * position / max(1, len(widths) - 1))
        axes.barh(range(len(counts)), share, left=left, color=colour, height=0.85, label=_width_text(bits))
        left += share
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the layer's weights at each width")
    return len(widths)


def _draw_coded(axes: "Axes", plan: Plan, rows: Rows, sizes: Array) -> int:
    """What the codes of each row take in the file; no widths."""
    bits = np.array([sum(layer.code_bits for layer in plan.layers[one]) for one in rows.layers]) / sizes
    axes.barh(range(len(bits)), bits, color="C0", height=0.85)
    axes.set_xlabel("bits a weight in the entropy-coded file")
    return 0


def errors_plot(table: LayerTable, path: Path, title: str) -> None:
    """The first error of each layer at each width as a heat map on a logarithmic scale; atomically."""
    from matplotlib.colors import LogNorm

    metric = table.metrics[0]
    rows = Rows.of([layer.name for layer in table.layers])
    errors = np.array([layer.errors[metric] for layer in table.layers], float).reshape(-1, len(table.bits))
    means = np.array([errors[one].mean(axis=0) for one in rows.layers]).reshape(-1, len(table.bits))
    shown = np.ma.masked_where(~((means > 0) & np.isfinite(means)), means)
    figure = rows.figure(3.5 + 0.6 * len(table.bits))
    axes = figure.subplots()
    norm = LogNorm() if shown.count() else None
    image = axes.imshow(shown, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
    axes.set_facecolor("0.85")  # of what is exact, which a logarithm does not have
    axes.set_yticks(range(len(rows.names)), rows.names, fontsize=7)
    axes.set_xticks(range(len(table.bits)), list(map(str, table.bits)))
    axes.set_xlabel("bits")
    if shown.count():
        write_plain_numbers(figure.colorbar(image, label=f"{metric} error", fraction=0.06).ax.yaxis)
    for (row, column), error in np.ndenumerate(means):
        dark = norm is not None and error > 0 and norm(error) > DARK
        axes.text(column, row, f"{error:.2g}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    figure.suptitle(printable_lines(title) + rows.note(len(table.layers), ": their mean"), fontsize="medium")
    save_plot(figure, path)


def plan_title(plan: Plan, name: str) -> str:
    """`r20: budget, 3.10 bits a weight in total`, and the quantizer."""
    schemes = dict.fromkeys(scheme_words(layer.scheme) for layer in plan.layers)
    bits = plan.size().total_average_bits
    return "\n".join((f"{name}: {plan.allocator.name}, {bits:.2f} bits a weight in total", *schemes))


def table_title(table: LayerTable, name: str) -> str:
    """`r20: affine, per channel, clipped`."""
    return f"{name}: {scheme_words(table.scheme)}"


def _weights_by_bits(plan: Plan, place: int) -> Counter[int]:
    layer = plan.layers[place]
    each = layer.numel // max(1, layer.channels)
    counts: Counter[int] = Counter()
    for bits, channels in layer.widths:
        counts[bits] += channels * each
    return counts


def _width_text(bits: int) -> str:
    return f"float{bits}" if bits in FLOAT_BITS else "1 bit" if bits == 1 else f"{bits} bits"
