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

    __module__ = "mpq_plugins"


class MeasureWarning(UserWarning):
    """A measurement that goes another way than it was asked to: its store is damaged, its workers are gone."""

    __module__ = "mpq_plugins"


class RoundingWarning(UserWarning):
    """Layers that compensation rounds to nearest, or has few inputs for."""

    __module__ = "mpq_plugins"


class CompressWarning(UserWarning):
    """Something of the source that a container does not keep."""

    __module__ = "mpq_plugins"


class MPQError(Exception):
    """Anything this package refuses, in one sentence: what, where, what is allowed, what to do."""

    __module__ = "mpq_plugins"


class SettingError(MPQError, ValueError):
    """An argument outside what is allowed."""

    __module__ = "mpq_plugins"


class SourceError(MPQError):
    """A source of weights that cannot be read."""

    __module__ = "mpq_plugins"


class WeightError(SourceError):
    """One layer's weight that cannot be measured or quantized."""

    __module__ = "mpq_plugins"


class FormatError(MPQError):
    """A plan or table file that is damaged, foreign or newer than this version."""

    __module__ = "mpq_plugins"


class MismatchError(MPQError):
    """A plan made for another model."""

    __module__ = "mpq_plugins"


class VerifyError(MPQError):
    """A quantized model that does not hold what its plan says."""

    __module__ = "mpq_plugins"


class TuningError(MPQError):
    """No trial of a tuning run meets its criterion.

    Attributes:
        tuning: The run's record, where there is one.
    """

    __module__ = "mpq_plugins"

    def __init__(self, message: str, tuning: Any = None) -> None:
        super().__init__(message)
        self.tuning = tuning


class WorkerError(MPQError):
    """Processes or machines that were to measure and cannot."""

    __module__ = "mpq_plugins"


class PluginError(MPQError):
    """An entry point that is missing, claimed twice or broken."""

    __module__ = "mpq_plugins"
