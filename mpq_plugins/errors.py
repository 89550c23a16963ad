"""The one family of errors.

MPQError
├── SettingError       an argument outside what is allowed (also a ValueError)
├── SourceError        weights that cannot be read
│   └── WeightError    one layer's weight that cannot be measured or quantized
├── FormatError        a plan or table file that is damaged, foreign or newer than this version
├── MismatchError      a plan made for another model
├── TuningError        no trial of a tuning run meets its criterion
├── VerifyError        a quantized model that does not hold what its plan says
├── WorkerError        processes or machines that were to measure and cannot
└── PluginError        an entry point that is missing, claimed twice or broken
"""

import re
from collections.abc import Sequence
from typing import Any

SHOWN = 5  # things listed in an error before it turns to counting


def first_few(items: Sequence[str], separator: str = "; ") -> str:
    """The first few of what is wrong, and how many more there are."""
    more = f"{separator.rstrip()} and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def what_it_said(error: BaseException) -> str:
    """`TypeError: its first line`, of an exception that a user's code or a library raised."""
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001  # an outsider's exception may not even be printable
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def first_sentence(error: Exception) -> str:
    """The first line a library's message has anything on, without colours, at a length that can be read."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch colours some of its messages
    text = next((line.strip() for line in plain.splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else f"{text[:157]}..."


class PlanWarning(UserWarning):
    """A plan that may not be what was wanted: predicted to be worse than uniform widths of its own size, or untied."""


class MeasureWarning(UserWarning):
    """A measurement that goes another way than it was asked to: its partial file is damaged, its workers are gone."""


class CompressWarning(UserWarning):
    """Something of the source that a container does not keep."""


class MPQError(Exception):
    """Anything this package refuses, in one sentence: what, where, what is allowed, what to do."""


class SettingError(MPQError, ValueError):
    """An argument outside what is allowed."""


class SourceError(MPQError):
    """A source of weights that cannot be read."""


class WeightError(SourceError):
    """One layer's weight that cannot be measured or quantized."""


class FormatError(MPQError):
    """A plan or table file that is damaged, foreign or newer than this version."""


class MismatchError(MPQError):
    """A plan made for another model."""


class VerifyError(MPQError):
    """A quantized model that does not hold what its plan says."""


class TuningError(MPQError):
    """No trial of a tuning run meets its criterion; `tuning` is the run's record, where there is one."""

    def __init__(self, message: str, tuning: Any = None) -> None:
        super().__init__(message)
        self.tuning = tuning


class WorkerError(MPQError):
    """Processes or machines that were to measure and cannot."""


class PluginError(MPQError):
    """An entry point that is missing, claimed twice or broken."""
