"""Plans tried on one model: here one after another, or each a unit of work on an executor."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common.deferred import Deferred
from ..plans.plan import Plan
from ..reconstruction.rounding import Rounding
from .scored import Scored
from .scores import Evaluate
from .tried import Tried

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Try:
    """A plan to be tried, None for the float model. name: what errors call it."""

    scored: Scored
    plan: Plan | None
    name: str


def results(tries: Sequence[Try], executor: Executor | None) -> Iterator[tuple[int, Tried]]:
    """What comes of each, by its position: in their order without an executor, and as they come from one.

    A plan is a unit of work. All are of one model and evaluation, and calibrate on the same inputs, if they do.
    """
    if executor is None:
        for position, each in enumerate(tries):
            yield position, each.scored.known(each.plan) or _kept(each, each.scored.evaluated(each.plan, each.name))
        return
    from ..models.units import Job, Unit

    units: list[Unit] = []
    for position, each in enumerate(tries):
        known = each.scored.known(each.plan)
        if known is not None:
            yield position, known
        else:
            units.append(Unit(str(position), each.name, (_Way.of(each.scored), each.plan, each.name)))
    one = tries[0].scored
    batches = [given for each in tries for given in (each.scored.calibrate, each.scored.inputs) if given is not None]
    needs = {"model": one.model, "evaluation": one.evaluate, "calibration inputs": batches[0] if batches else None}
    for unit, tried in Job(evaluate_unit, needs, "evaluating").results(units, executor):
        each = tries[int(unit.name)]
        yield int(unit.name), _kept(each, replace(tried, plan=tried.plan or each.plan))


@dataclass(frozen=True)
class _Way:
    """What a worker is to do with the model, the evaluation and the inputs, as Scored has it."""

    calibrates: bool
    ranges: bool
    rounding: Rounding | None
    files: bool
    timed: bool

    @classmethod
    def of(cls, scored: Scored) -> "_Way":
        return cls(scored.calibrate is not None, scored.inputs is not None, scored.rounding, scored.files, scored.timed)

    def scored(self, model: "nn.Module", evaluate: Evaluate, batches: "Sequence[Any] | None") -> Scored:
        calibrate, inputs = batches if self.calibrates else None, batches if self.ranges else None
        return Scored(model, evaluate, calibrate, None, self.rounding, self.files, inputs, self.timed)


def evaluate_unit(
    model: "nn.Module", evaluate: Evaluate, batches: "Sequence[Any] | None", way: _Way, plan: Plan | None, name: str
) -> Tried:
    """What a worker does: one plan. The result has no plan where it is that of the plan as it was given."""
    tried = way.scored(model, evaluate, batches).evaluated(plan, name)
    return replace(tried, plan=None) if tried.plan is plan else tried


def _kept(each: Try, tried: Tried) -> Tried:
    LOG.info("%s: %s", each.name, tried.scores)
    each.scored.keep(each.plan, tried)
    return tried
