"""Plans and tables as a notebook shows them: a head line, and a picture drawn in place, without scripts."""

import html
from collections.abc import Sequence

import numpy as np

from ..common.text import printable
from .layers import LayerChoice
from .size import PlanSize
from .stats import Measured

WIDTH, HEIGHT, HIGHEST = 720, 120, 8
THINNEST = 0.4  # pixels
MOST = 1500  # cells
COLOURS = (
    "#8a8f96", "#fde725", "#a8d834", "#54bd6c", "#22a085", "#28818e", "#35608d", "#443a83", "#440f56",
)  # fmt: skip  # float, then 1 to 8 bits, as the page has them
DARKEST, LIGHTEST = (68, 1, 84), (253, 231, 37)


def plan_html(allocator: str, layers: Sequence[LayerChoice], size: PlanSize) -> str:
    """Show a plan's layers in the network's order, as wide as their weights and as high as their bits.

    Args:
        allocator: What made the plan.
        layers: Its layers.
        size: Its size.

    Returns:
        HTML with an inline SVG; each layer's name, shape and bits are in its title.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8))))
        >>> plan_html("uniform", plan.layers, plan.size()).count("<rect")
        1
    """
    head = (
        f"<b>{_text(allocator)}</b>: {len(layers):,} layers, {size.total_average_bits:.3f} bits a weight in total, "
        f"{size.total_bytes:,} bytes, {size.against_fp32:.2f}x smaller than float32"
    )
    return f"<div><div>{head}</div>{_svg(_bars(layers), HEIGHT)}</div>"


def table_html(table: Measured) -> str:
    """Show a table's first error by layer and width, dark where it is large, on a logarithmic scale.

    Args:
        table: The measured layers.

    Returns:
        HTML with an inline SVG; each error is in its cell's title. Of very many layers neighbours share a column.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table_html(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=(2, 4))).count("<rect")
        2
    """
    widths = f"{table.bits[0]} to {table.bits[-1]} bits" if table.bits else "no widths"
    head = (
        f"<b>{len(table.layers):,} layers</b> measured at {widths}, {_text(str(table.scheme))}: "
        f"{_text(table.metrics[0])} error by layer and width"
    )
    return f"<div><div>{head}</div>{_svg(_cells(table), 14 * len(table.bits))}</div>"


def _bars(layers: Sequence[LayerChoice]) -> list[str]:
    numel = max(1, sum(layer.numel for layer in layers))
    drawn, shapes, at = 0.0, [], 0.0
    for layer in layers:
        title = f"{layer.name}: {'x'.join(map(str, layer.shape))}, {layer.bits_text}"
        for bits, channels in layer.widths:
            width = WIDTH * layer.numel / numel * channels / max(1, layer.channels)
            high = HEIGHT * min(bits, HIGHEST) / HIGHEST
            colour = COLOURS[bits if bits <= HIGHEST else 0]
            at += width
            if at - drawn >= THINNEST:  # of layers that are thinner the last is drawn for all
                shapes.append(_rect(drawn, HEIGHT - high, at - drawn, high, colour, title))
                drawn = at
    return shapes


def _cells(table: Measured) -> list[str]:
    each = max(1, -(-len(table.layers) * len(table.bits) // MOST))
    errors = np.array([layer.errors[table.metrics[0]] for layer in table.layers]).reshape(-1, len(table.bits))
    known = errors[(errors > 0) & np.isfinite(errors)]
    low, high = (np.log(known.min()), np.log(known.max())) if known.size else (0.0, 0.0)
    columns = range(0, len(table.layers), each)
    width = WIDTH / max(1, len(columns))
    shapes = []
    for column, first in enumerate(columns):
        means = errors[first : first + each].mean(axis=0)
        more = len(table.layers[first : first + each]) - 1
        name = table.layers[first].name + (f" and {more} more" if more else "")
        for row, (bits, error) in enumerate(zip(table.bits, means.tolist(), strict=True)):
            share = (np.log(error) - low) / (high - low) if error > 0 and high > low else 0.0
            title = f"{name}, {bits} bits: {error:.4g}"
            shapes.append(_rect(column * width, 14 * row, width, 14, _colour(float(share)), title))
    return shapes


def _colour(share: float) -> str:
    mixed = (round(dark * share + light * (1 - share)) for dark, light in zip(DARKEST, LIGHTEST, strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}">'
        f"<title>{_text(title)}</title></rect>"
    )


def _svg(shapes: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" style="max-width:{WIDTH}px" role="img">{"".join(shapes)}'
        "</svg>"
    )


def _text(text: str) -> str:
    return html.escape(printable(text))
