"""What all pictures share; matplotlib is imported only to draw one."""

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import atomic_path
from ..errors import SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Refuse what cannot be drawn before the work is done. Raises SettingError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise SettingError(f"plot: {path} should end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError("plot: matplotlib is not installed; pip install 'mpq-plugins[report]', or leave --plot out")


def plain_number(value: float, _: float | None = None) -> str:
    """A tick's number as people write it, 0.01 and no power of ten."""
    return f"{value:g}"


def save_plot(figure: "Figure", path: Path) -> None:
    """Write a figure in the format its name ends in, atomically; a dollar sign in a name is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font does not have: a box stands for them
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)
