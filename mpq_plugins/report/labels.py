"""Labels beside the points of a picture, where there is room for them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 6.5  # points, of a label's letters
HEIGHT, WIDTH = 1.25 * SIZE, 0.6 * SIZE  # points, of a line and of a letter
AWAY = 5.0  # points from the point to its label
PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1.6), (0, -1.6))  # right or left, above or below

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place_labels(axes: "Axes", labelled: Sequence[tuple[float, float, str]]) -> None:
    """Write each text beside its point (x, y, text), over no other point or text; without room, it is left out."""
    figure = axes.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()  # the layout decides where points are
    scale = 72.0 / figure.dpi
    frame = axes.get_window_extent()
    inside = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    legend = axes.get_legend()
    centres = [tuple(scale * axes.transData.transform((x, y))) for x, y, _ in labelled]
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in centres]
    if legend is not None:
        corners = legend.get_window_extent()
        taken.append((corners.x0 * scale, corners.y0 * scale, corners.x1 * scale, corners.y1 * scale))
    for (x, y, text), centre in zip(labelled, centres, strict=True):
        place = next(_free(text, centre, taken, inside), None) if text else None
        if place is None:
            continue
        box, offset = place
        taken.append(box)
        axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=SIZE, color="0.3", va="center",
                      ha="center")  # fmt: skip


def _free(
    text: str, centre: tuple[float, ...], taken: Sequence[Box], inside: Box
) -> Iterator[tuple[Box, tuple[float, float]]]:
    """The places for a text that cover nothing and lie inside, each as its box and its centre from the point's."""
    wide, high = WIDTH * len(text) / 2, HEIGHT / 2
    for right, up in PLACES:
        across, above = right * (AWAY + wide), up * AWAY if right else up * (AWAY + high) / 1.6
        x, y = centre[0] + across, centre[1] + above
        box = (x - wide, y - high, x + wide, y + high)
        within = inside[0] < box[0] and inside[1] < box[1] and box[2] < inside[2] and box[3] < inside[3]
        if within and not any(_overlap(box, other) for other in taken):
            yield box, (across, above)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
