"""Rounding on calibration inputs in the trials of a compressor's tuner, whose calls have no place for inputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq_plugins.models.running import checked_batches
from mpq_plugins.plans.plan import Plan
from mpq_plugins.reconstruction.apply import round_weights
from mpq_plugins.reconstruction.rounding import Rounding, checked_rounding


@dataclass(frozen=True)
class _Inputs:
    batches: Sequence[Any]
    rounding: Rounding


_inputs: ContextVar[_Inputs | None] = ContextVar("inputs", default=None)


@contextmanager
def rounding_on(batches: Iterable[Any] | None, rounding: Rounding | None) -> Iterator[None]:
    """Within it, models are rounded on these inputs as they are quantized; None is to nearest, as without it.

    Raises SettingError where there are no batches in what is given, or the rounding is no word for them.
    """
    word = checked_rounding(rounding, calibrated=batches is not None)
    given = None if batches is None else _Inputs(checked_batches(batches), word)
    before = _inputs.set(given)
    try:
        yield
    finally:
        _inputs.reset(before)


def fitted(model: nn.Module, plan: Plan) -> nn.Module:
    """What to quantize by the plan: a float copy that is rounded on the inputs, the model itself where there are none.

    Raises as `round_weights`.
    """
    given = _inputs.get()
    return model if given is None else round_weights(model, plan, given.batches, given.rounding)
