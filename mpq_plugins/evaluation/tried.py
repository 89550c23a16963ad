"""What came of one plan that was tried, and how a store keeps it."""

import json
from dataclasses import dataclass

from ..common.store import Finished
from ..errors import FormatError
from ..plans.plan import Plan
from .scores import Scores

NOT_KEPT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, FormatError)  # of another unit


@dataclass(frozen=True)
class FileTaken:
    """What a container takes: its bytes, and in bits for each planned weight all of them but other tensors'."""

    bytes: int
    bits: float


@dataclass(frozen=True)
class Tried:
    """A plan's scores; the plan, with the steps that were fitted to its file; and what that file takes.

    plan: None for the float model. file: None where none was written.
    """

    scores: Scores
    plan: Plan | None = None
    file: FileTaken | None = None


def keep(finished: Finished, key: str, tried: Tried, given: Plan | None) -> None:
    """Write what came of the plan that was given. Scores alone are a row; with a file or fitted steps it is more."""
    if tried.file is None and tried.plan is given:
        finished.add_row(key, tried.scores)
        return
    file = None if tried.file is None else [tried.file.bytes, tried.file.bits]
    plan = None if tried.plan is given or tried.plan is None else tried.plan.document()
    finished.add(key, json.dumps({"scores": dict(tried.scores), "file": file, "plan": plan}).encode())


def kept(finished: Finished, key: str, given: Plan | None) -> Tried | None:
    """What came of the plan, None where it was not finished or what is there is something else."""
    scores = finished.row(key)
    if scores is not None:
        return Tried(scores, given)
    if key not in finished:
        return None
    try:
        document = json.loads(finished.take(key))
        scores = {str(name): float(value) for name, value in document["scores"].items()}
        file = None if document["file"] is None else FileTaken(int(document["file"][0]), float(document["file"][1]))
        plan = given if document["plan"] is None else Plan.from_document(document["plan"], "the plan that was fitted")
    except NOT_KEPT:
        return None
    return Tried(scores, plan, file)
