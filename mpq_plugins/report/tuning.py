"""A tuning run's trials as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..allocation.file_steps import predicted_cost
from ..allocation.guard import judge_of
from ..evaluation.tuning import Trial, Tuning
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .grid import Grid
from .tables import bytes_text, grid

KEPT = "*"


@dataclass(frozen=True)
class Judged:
    """What the plans of a run are predicted to cost, by their text, and the judge; None where the table has none."""

    judge: str | None
    costs: Mapping[str, float | None]

    @classmethod
    def of(cls, table: LayerTable, plans: Sequence[Plan], asked: str | None) -> "Judged":
        """Judge all plans on the same sensitivity. Raises SettingError where `asked` was not measured."""
        judge = judge_of(table, plans, asked)
        costs = {plan.to_json(): predicted_cost(table, plan, judge) for plan in plans} if judge is not None else {}
        return cls(judge, costs)

    def cost(self, plan: Plan) -> float | None:
        """The predicted cost of one of the plans."""
        return self.costs.get(plan.to_json())


UNJUDGED = Judged(None, {})


def tuning_table(tuning: Tuning, title: str, judged: Judged = UNJUDGED) -> Grid:
    """The float model, then the trials in their order; the one that is kept, if any, is marked."""
    chosen = tuning.chosen if tuning.met else None
    head = () if judged.judge is None else (f"predicted {judged.judge}",)
    rows = [("float", "32", "", *("0" for _ in head), f"{tuning.baseline:.6g}", "")]
    for trial in tuning.trials:
        label, bits, size, score = _words(trial)
        cost = judged.cost(trial.plan)
        said = ("-" if cost is None else f"{cost:.4g}",) if head else ()
        rows.append((label, bits, size, *said, score, KEPT if trial is chosen else ""))
    return grid(title, ("trial", "bits", "size", *head, "score", KEPT), rows, leave_out=(*head, "bits"))


def tuning_json(tuning: Tuning, judged: Judged = UNJUDGED) -> dict[str, Any]:
    """The same as plain values; kept is None where no trial meets the criterion."""
    return {
        "judge": judged.judge,
        "baseline": tuning.baseline,
        "criterion": tuning.criterion.text(tuning.baseline),
        "trials": [_plain(trial, judged) for trial in tuning.trials],
        "kept": _plain(tuning.chosen, judged) if tuning.met else None,
    }


def _words(trial: Trial) -> tuple[str, str, str, str]:
    size = trial.plan.size()
    return trial.label, f"{size.total_average_bits:.3f}", bytes_text(size.total_bytes), f"{trial.score:.6g}"


def _plain(trial: Trial, judged: Judged) -> dict[str, Any]:
    size = trial.plan.size()
    return {
        "allocator": trial.plan.allocator.model_dump(),
        "total_bytes": size.total_bytes,
        "total_average_bits": size.total_average_bits,
        "predicted": judged.cost(trial.plan),
        "score": trial.score,
        "met": trial.met,
    }
