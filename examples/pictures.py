"""Pictures of the manual, small enough to be kept beside it."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpq_plugins.report.plots import save_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 64


def save_small(figure: "Figure", path: Path) -> None:
    """Write the figure; a `.png` with so few colours that it takes a third."""
    save_plot(figure, path)
    if path.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(COLOURS)
        small.save(path, optimize=True)
