"""A tuning run's trials as a table and as JSON."""

from typing import Any

from ..evaluation.tuning import Trial, Tuning
from .grid import Grid
from .tables import bytes_text, grid

KEPT = "*"


def tuning_table(tuning: Tuning, title: str) -> Grid:
    """The float model, then the trials in their order; the one that is kept, if any, is marked."""
    chosen = tuning.chosen if tuning.met else None
    rows = [("float", "32", "", f"{tuning.baseline:.6g}", "")]
    rows += [(*_words(trial), KEPT if trial is chosen else "") for trial in tuning.trials]
    return grid(title, ("trial", "bits", "size", "score", KEPT), rows, leave_out=("bits",))


def tuning_json(tuning: Tuning) -> dict[str, Any]:
    """The same as plain values; kept is None where no trial meets the criterion."""
    return {
        "baseline": tuning.baseline,
        "criterion": tuning.criterion.text(tuning.baseline),
        "trials": [_plain(trial) for trial in tuning.trials],
        "kept": _plain(tuning.chosen) if tuning.met else None,
    }


def _words(trial: Trial) -> tuple[str, str, str, str]:
    size = trial.plan.size()
    return trial.label, f"{size.total_average_bits:.3f}", bytes_text(size.total_bytes), f"{trial.score:.6g}"


def _plain(trial: Trial) -> dict[str, Any]:
    size = trial.plan.size()
    return {
        "allocator": trial.plan.allocator.model_dump(),
        "total_bytes": size.total_bytes,
        "total_average_bits": size.total_average_bits,
        "score": trial.score,
        "met": trial.met,
    }
