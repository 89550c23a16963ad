"""What a user's evaluation says of a model: numbers, or an error that names what was evaluated and where it failed."""

import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..common.checks import shown
from ..common.deferred import Deferred
from ..common.interrupts import Interrupted
from ..common.text import what_it_said
from ..errors import MPQError, SettingError, SourceError

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

Scores = Mapping[str, float]
Evaluate = Callable[["nn.Module"], "float | Scores"]
"""What a user's function makes of a quantized model: a score to be as large as can be, or several, that one first."""


def check_score(evaluate: object, name: str) -> None:
    """Raise SettingError where an argument of this name is no function that could evaluate a model."""
    if not callable(evaluate):
        raise SettingError(f"{name}: is a {type(evaluate).__name__}; give a function of a model that returns its score")


def checked_scores(evaluate: Evaluate, model: "nn.Module", what: str) -> dict[str, float]:
    """What the function returns for the model, as named numbers. Raises SourceError naming `what` was evaluated."""
    name = f"{getattr(evaluate, '__qualname__', shown(evaluate))} of {what}"
    try:
        returned = evaluate(model)
    except (KeyboardInterrupt, Interrupted, MPQError):  # ours says what is wrong already
        raise
    except BaseException as error:  # a user's function may raise anything, and may try to end the program
        where = _where(evaluate, error)
        raise SourceError(
            f"{name}: the evaluation failed ({what_it_said(error)}; {where.filename}, line {where.lineno})"
        ) from error
    scores = returned if isinstance(returned, Mapping) else {"score": returned}
    try:
        numbers = {str(key): float(value) for key, value in scores.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{name}: returned {shown(returned)}; a number, or a mapping of names to numbers") from error
    if not numbers or any(math.isnan(value) for value in numbers.values()):
        raise SourceError(f"{name}: returned {shown(returned)}; a number, or a mapping of names to numbers, none NaN")
    return numbers


def check_same_names(first: Scores, scores: Scores) -> None:
    """Raise SourceError where an evaluation returns other names for one model than for another."""
    if first.keys() != scores.keys():
        names = [", ".join(each) for each in (first, scores)]
        raise SourceError(f"the evaluation returned {names[0]} for one model and {names[1]} for another")


def _where(evaluate: object, error: BaseException) -> traceback.FrameSummary:
    """The last line of the user's own file that was running, or the last of all where none of it was."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(evaluate) if callable(evaluate) else evaluate, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return own[-1] if own else frames[-1]
