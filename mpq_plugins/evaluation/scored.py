"""The scores of plans: each applied to a copy of the model, verified and evaluated, or taken from a store."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.deferred import Deferred
from ..common.store import Finished
from ..models.copying import duplicate
from ..plans.plan import Plan
from ..reconstruction.rounding import Rounding, checked_rounding, rounding_label
from .scores import Evaluate, Scores, checked_scores

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

LOG = logging.getLogger(__name__)

FLOAT = "float"


@dataclass(frozen=True)
class Scored:
    """The scores of a plan, or of the float model, from the store or from an evaluation."""

    model: "nn.Module | None"
    evaluate: Evaluate | None
    calibrate: "Sequence[Any] | None"
    finished: Finished | None
    rounding: Rounding | None = None

    @property
    def label(self) -> str:
        """What a table calls the rounding; empty where nothing is evaluated."""
        calibrated = self.calibrate is not None
        rounding = checked_rounding(self.rounding, calibrated=calibrated)
        return rounding_label(rounding, calibrated=calibrated) if self.possible else ""

    @property
    def possible(self) -> bool:
        """Whether there is a model to evaluate."""
        return self.model is not None and self.evaluate is not None

    def __call__(self, plan: Plan | None) -> Scores:
        """Evaluate a copy of the model under the plan, or in float for None."""
        if self.model is None or self.evaluate is None:
            return {}
        key = FLOAT if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()
        known = self.finished.row(key) if self.finished is not None else None
        if known is not None:
            return known
        # A copy for the float model too: an evaluation may leave its mark on what it is given.
        given = duplicate(self.model) if plan is None else self._quantized(plan)
        what = FLOAT if plan is None else f"{plan.allocator.name} {plan.allocator.parameters}"
        scores = checked_scores(self.evaluate, given, what)
        LOG.info("%s: %s", what, scores)
        if self.finished is not None:
            self.finished.add_row(key, scores)
        return scores

    def _quantized(self, plan: Plan) -> "nn.Module":
        """The model under the plan, verified."""
        from ..reconstruction.apply import apply
        from ..simulation.verify import verify

        assert self.model is not None
        quantized = apply(self.model, plan, calibrate=self.calibrate, rounding=self.rounding)
        verify(quantized, plan)
        return quantized


def evaluation_facts(
    model: "nn.Module",
    evaluate: Evaluate | None,
    calibrate: "Sequence[Any] | None" = None,
    rounding: Rounding | None = None,
) -> dict[str, str]:
    """Say what decides the scores of a plan: the model, the function's code, the rounding and what it is fitted on."""
    from ..models.fingerprint import batches_digest, model_digest, source_digest

    code = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    return {
        "model": model_digest(model), "evaluation": f"{_name(code)} {source_digest(code)}",
        "calibration": "" if calibrate is None else batches_digest(calibrate),
        "rounding": checked_rounding(rounding, calibrated=calibrate is not None),
    }  # fmt: skip


def _name(function: object) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
