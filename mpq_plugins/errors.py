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

from typing import Any


class PlanWarning(UserWarning):
    """A plan that may not be what was wanted: predicted to be worse than uniform widths of its own size, or untied."""


class MeasureWarning(UserWarning):
    """A measurement that goes another way than it was asked to: its store is damaged, its workers are gone."""


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
