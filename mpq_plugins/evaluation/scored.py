"""The scores of plans: each applied to a copy of the model, verified and evaluated, or taken from a store."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.checks import shown
from ..common.deferred import Deferred
from ..common.store import Finished
from ..errors import SettingError
from ..models.copying import duplicate
from ..plans.plan import Plan
from ..plans.steps import made_for_file
from ..reconstruction.rounding import (
    COMPENSATED,
    LEARNED,
    NEAREST,
    Rounding,
    checked_rounding,
    refuse_stochastic,
    rounding_label,
)
from .scores import Evaluate, checked_scores
from .tried import FileTaken, Tried, keep, kept

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

FLOAT = "float"
SECONDS = "evaluation seconds"  # beside the scores, in what is kept of a row


@dataclass(frozen=True)
class Scored:
    """What comes of a plan, or of the float model, from the store or from an evaluation.

    files: whether each quantized model is written to a container too, to see what that takes. inputs: batches that
    give plans which quantize inputs their ranges, where nothing is calibrated on them. timed: whether the seconds that
    the evaluation took are beside its scores.
    """

    model: "nn.Module | None"
    evaluate: Evaluate | None
    calibrate: "Sequence[Any] | None"
    finished: Finished | None
    rounding: Rounding | None = None
    files: bool = False
    inputs: "Sequence[Any] | None" = None
    timed: bool = False

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

    def known(self, plan: Plan | None) -> Tried | None:
        """What the store has of a plan; None where that was not finished."""
        return kept(self.finished, _key(plan), plan) if self.finished is not None else None

    def evaluated(self, plan: Plan | None, what: str) -> Tried:
        """Evaluate a copy of the model under the plan, or in float for None. what: what errors call it."""
        assert self.model is not None, "there is a model to evaluate"
        # A copy for the float model too: an evaluation may leave its mark on what it is given.
        made = _Quantized(duplicate(self.model), None, None) if plan is None else self._quantized(plan)
        return Tried(self._scores(made.model, what), made.plan, made.file)

    def keep(self, plan: Plan | None, tried: Tried) -> None:
        """Put what came of a plan into the store."""
        if self.finished is not None:
            keep(self.finished, _key(plan), tried, plan)

    def _scores(self, model: "nn.Module", what: str) -> dict[str, float]:
        assert self.evaluate is not None, "there is an evaluation"
        start = time.perf_counter()
        scores = checked_scores(self.evaluate, model, what)
        if not self.timed:
            return scores
        if SECONDS in scores:
            raise SettingError(f"evaluation: returns {SECONDS!r}, which the table has already; call it otherwise")
        return {**scores, SECONDS: time.perf_counter() - start}

    def _quantized(self, plan: Plan) -> "_Quantized":
        """The model under the plan, verified, and what its file takes."""
        from ..reconstruction.apply import apply
        from ..simulation.verify import verify

        rounded = self._rounded(plan)
        plan, file = rounded.plan or plan, rounded.file
        if self.files and file is None:
            from ..compression.fit import written_once

            container = written_once(rounded.model, plan)
            file = FileTaken(container.size, container.file_bits)
        quantized = apply(rounded.model, plan)
        verify(quantized, plan)
        return _Quantized(quantized, plan, file)

    def _rounded(self, plan: Plan) -> "_Quantized":
        """The model that the plan quantizes: a float copy that is rounded on the inputs, or without any itself.

        Steps are fitted to the file they were made for, where inputs move the weights or where files are compared.
        """
        model = self._with_ranges(plan)
        if made_for_file(plan) and (self.files or self.calibrate is not None):
            from ..compression.fit import fit_file

            fitted = fit_file(model, plan, self.calibrate)
            return _Quantized(fitted.model, fitted.plan, FileTaken(fitted.file_bytes, fitted.file_bits))
        if self.calibrate is None:
            return _Quantized(model, plan, None)
        from ..reconstruction.apply import round_weights

        rounding = checked_rounding(self.rounding, calibrated=True)
        return _Quantized(round_weights(model, plan, self.calibrate, rounding), plan, None)

    def _with_ranges(self, plan: Plan) -> "nn.Module":
        """The model, with ranges for the inputs that the plan quantizes; learning the rounding finds its own."""
        from ..simulation.calibrate import calibrate_inputs, has_ranges

        assert self.model is not None
        learned = self.calibrate is not None and self.rounding == LEARNED
        if learned or has_ranges(self.model, plan):
            return self.model
        batches = self.calibrate if self.calibrate is not None else self.inputs
        if batches is None:
            raise SettingError(
                f"plan: quantizes activations ({plan.activations_text}), whose ranges calibration inputs give; give "
                "calibrate=batches (--calibrate, --synthetic), or plan float activations"
            )
        return calibrate_inputs(self.model, plan, batches)


def _key(plan: Plan | None) -> str:
    return FLOAT if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class _Quantized:
    """A model, the plan it holds, and what its file takes where that is known."""

    model: "nn.Module"
    plan: Plan | None
    file: FileTaken | None


def check_rounding(plans: Iterable[Plan], rounding: Rounding | None, *, calibrated: bool) -> None:
    """Raise SettingError for a rounding that is no such word, or that a plan cannot have.

    On inputs, plans for a file's bytes are compensated: what codes take depends on how they are rounded. Plans that are
    rounded stochastically are rounded already.
    """
    rounding, plans = checked_rounding(rounding, calibrated=calibrated), list(plans)
    if calibrated and rounding != COMPENSATED and any(map(made_for_file, plans)):
        raise not_compensated(rounding)
    if rounding != NEAREST:
        for plan in plans:
            refuse_stochastic(plan, f"{rounding} rounding")


def checked_calibration(calibrate: "Iterable[Any] | None") -> "list[Any] | None":
    """The batches as a list, for each plan goes through them. Raises SettingError as `checked_batches`."""
    if calibrate is None:
        return None
    from ..models.running import checked_batches  # which takes torch

    return checked_batches(calibrate, "calibrate")


def not_compensated(rounding: str) -> SettingError:
    """What to say of another rounding on inputs for a file's bytes."""
    return SettingError(
        f"rounding: {shown(rounding)} is not allowed for a file's bytes; with inputs it is compensated. Leave it out"
    )


def evaluation_facts(
    model: "nn.Module",
    evaluate: Evaluate | None,
    calibrate: "Sequence[Any] | None" = None,
    rounding: Rounding | None = None,
    files: bool = False,
) -> dict[str, str]:
    """Say what decides what is kept of a plan: the model, the function's code and what is bound to it, the rounding
    and what it is fitted on.

    files: whether what its file takes is kept too.
    """
    from ..models.fingerprint import batches_digest, model_digest, source_digest

    code = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    return {
        "model": model_digest(model), "evaluation": f"{_name(code)} {source_digest(evaluate)}",
        "calibration": "" if calibrate is None else batches_digest(calibrate),
        "rounding": checked_rounding(rounding, calibrated=calibrate is not None),
        **({"files": "written"} if files else {}),
    }  # fmt: skip


def _name(function: object) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
