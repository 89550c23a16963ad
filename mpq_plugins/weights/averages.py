"""Averages of weights beside the weights themselves, in one state dict: trainers that hold both models save both."""

import re
from collections.abc import Mapping, Sequence

from ..errors import SourceError
from ..models.wrappers import HOLDERS

AVERAGED = re.compile(r"(.*_)?(ema|swa|averaged?|shadow)(_.*)?", re.IGNORECASE)
OUTER = 2  # words of a name that may say whose it is


def refuse_averages(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raise SourceError where layers are averages of other layers there: both would be planned, as one model.

    shapes: of all layers' weights, by name.
    """
    averages = {name: parsed for name in shapes if (parsed := _averaged(name))}
    others = {name: tuple(shape) for name, shape in shapes.items() if name not in averages}
    if not averages or 2 * len(averages) < len(others):
        return
    averaged_shapes = {rest: tuple(shapes[name]) for name, (_, rest) in averages.items()}
    first = next(iter(averaged_shapes))
    for prefix in [name.removesuffix(first) for name in others if f".{name}".endswith(f".{first}")]:
        if all(others.get(f"{prefix}{rest}") == shape for rest, shape in averaged_shapes.items()):
            average, of = next(iter(averages.values()))[0], repr(prefix) if prefix else "the others"
            raise SourceError(
                f"{where}: holds two sets of weights, {average!r} being averages of {of}: say which is meant, "
                f"--only '{average}*' or --skip '{average}*' on the command line"
            )


def _averaged(name: str) -> tuple[str, str] | None:
    """Of a layer of averaged weights: what says so, and its name without that."""
    words = name.split(".")
    mark = next((at for at, word in enumerate(words[:OUTER]) if AVERAGED.fullmatch(word)), None)
    if mark is None:
        return None
    begin = mark + 1
    while begin < len(words) and words[begin] in HOLDERS:
        begin += 1
    if begin == len(words):
        return None
    return ".".join(words[: mark + 1]) + ".", ".".join(words[begin:])
