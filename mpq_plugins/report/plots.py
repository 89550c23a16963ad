"""What all pictures share; matplotlib is imported only to draw one."""

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.extras import how_to_install
from ..common.files import atomic_path
from ..errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
MADE_BY = {  # by which a later run knows the picture as its own
    ".png": {"Software": "mpq-plugins"}, ".svg": {"Creator": "mpq-plugins"}, ".pdf": {"Creator": "mpq-plugins"},
}  # fmt: skip
FEW = 300.0  # from one end of an axis to the other: two decades and a half


def check_plot(path: Path | None) -> None:
    """Refuse what cannot be drawn before the work is done. Raises SettingError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise SettingError(f"plot: {path} should end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(f"plot: matplotlib is not installed: {how_to_install('report')}; or leave --plot out")


def write_plain_numbers(axis: "Axis") -> None:
    """Write ticks of a logarithmic axis as people do, 0.01 and no power of ten; 2 and 5 too where decades are few."""

    def between(value: float, _: float) -> str:
        low, high = sorted(axis.get_view_interval())
        return f"{value:g}" if f"{value:e}"[0] in "25" and high <= FEW * low else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)


def save_plot(figure: "Figure", path: Path) -> None:
    """Write a figure in the format its name ends in, atomically; a dollar sign in a name is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font does not have: a box stands for them
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, metadata=MADE_BY[path.suffix.lower()])
