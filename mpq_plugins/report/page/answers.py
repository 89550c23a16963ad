"""What a served page asks of the library: exact plans, and evaluations, one at a time."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...allocation.budget import Budget
from ...allocation.guard import compare, worse_text
from ...allocation.mixquant import MixQuant
from ...allocation.ptilmpq import PTILMPQ
from ...errors import SettingError
from ...evaluation.sweep import SweepRow, sweep
from ...plans.plan import Plan
from ...plans.table import LayerTable
from .commands import plan_command
from .measured import widths_of
from .patterns import pattern_of
from .points import label_of, scores_of
from .points import widths_of as layer_widths

COUNTED = {"codes": "average_bits", "total": "total_average_bits"}
Rows = Callable[[LayerTable, Sequence[Plan], str | None, Callable[[str, int, int], None]], Sequence[SweepRow]]


@dataclass
class Work:
    """What is being done, for a progress bar: a name, steps done, steps in all."""

    name: str = ""
    done: int = 0
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, done: int, total: int) -> None:
        """Note how far it is."""
        self.name, self.done, self.total = name, done, total

    def document(self) -> dict[str, Any]:
        """Give what the page shows."""
        return {"name": self.name, "done": self.done, "total": self.total}


@dataclass(frozen=True)
class Answers:
    """A table, the plans beside it, and what evaluates plans.

    Attributes:
        table: The measured layers.
        file: What commands call the table.
        judge: What plans are compared on.
        plans: Those of the page's points, by place.
        evaluated: What gives rows of plans; None where nothing evaluates.
        work: What is being done.
    """

    table: LayerTable
    file: str
    judge: str | None
    plans: tuple[Plan, ...]
    evaluated: Rows | None = None
    work: Work = field(default_factory=Work)

    @property
    def by_channel(self) -> bool:
        """Whether the table has what it takes to give channels of a layer different widths."""
        granular = self.table.scheme.granularity != "per_tensor"
        return granular and all(layer.channel_errors for layer in self.table.layers)

    def plan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make a plan, exactly.

        Args:
            asked: What is set on the page.

        Returns:
            Plain values: widths, sizes, the guard's word, the command, the plan's file.

        Raises:
            SettingError: Something is asked that there is not, or that cannot be met.
        """
        return self._answer(self._made(asked))

    def evaluate(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make a plan and evaluate it.

        Args:
            asked: What is set on the page, or the place of a point.

        Returns:
            As `plan`, with scores.

        Raises:
            SettingError: As `plan`, or nothing evaluates.
            SourceError: The evaluation fails.
        """
        if self.evaluated is None:
            raise SettingError("eval: nothing evaluates; start mpq explore with --eval package.module:function")
        plan = self._made(asked)
        row = self.evaluated(self.table, [plan], self.judge, self.work)[-1]
        scored = {"scores": scores_of(row), "rounding": row.rounding, "file_bytes": row.file_bytes}
        return self._answer(plan) | scored

    def _made(self, asked: Mapping[str, Any]) -> Plan:
        if "point" in asked:
            place = asked["point"]
            if type(place) is not int or not 0 <= place < len(self.plans):
                raise SettingError(f"point: {place!r:.40} is not allowed; 0 to {len(self.plans) - 1}")
            return self.plans[place]
        allocator = _allocator(asked, self.table)
        if isinstance(allocator, Budget):
            return allocator.solve(self.table, self.work).plan
        made: Plan = allocator(self.table)
        return made

    def _answer(self, plan: Plan) -> dict[str, Any]:
        size = plan.size()
        found = None if self.judge is None else compare(self.table, plan, self.judge)
        guard = None if found is None else worse_text(plan, found) if found.worse else found.text()
        return {
            "title": f"{plan.allocator.name}, {label_of(plan)}, exactly",
            "layers": [layer_widths(layer) for layer in plan.layers],
            "sizes": [size.layers[layer.name].total for layer in plan.layers],
            "weights_only_bits": size.weights_only_bits,
            "total_bits": size.total_bits,
            "cost": None if found is None else found.plan,
            "guard": guard,
            "worse": found is not None and found.worse,
            "command": plan_command(plan.allocator, self.file),
            "json": plan.to_json(),
        }


def evaluator(model: Any, evaluate: Any, calibrate: Any, rounding: Any, store: Any) -> Rows:
    """Make what evaluates plans of one model; what is evaluated once is kept in the store.

    Args:
        model: The float model.
        evaluate: The user's function.
        calibrate: Batches of inputs, or None.
        rounding: As in `apply`.
        store: Where evaluations are kept.

    Returns:
        A function of a table, plans, a judge and a progress callback.
    """

    def rows(
        table: LayerTable, plans: Sequence[Plan], judge: str | None, progress: Callable[[str, int, int], None]
    ) -> Sequence[SweepRow]:
        return sweep(
            table, plans, model, evaluate, judge=judge, calibrate=calibrate, rounding=rounding, files=True, store=store,
            progress=progress,
        )  # fmt: skip

    return rows


def _allocator(asked: Mapping[str, Any], table: LayerTable) -> Any:
    """What is set on the page, as a configured allocator, which checks the values itself. Raises SettingError."""
    name = asked.get("allocator")
    bits = widths_of(table)
    if name == "mixquant":
        own = tuple(b for b in bits if b > 1)
        baseline = 8 if 8 in bits else max(bits)
        return MixQuant(qem=_said(asked, "qem"), metric=_said(asked, "metric"), bits=own, baseline=baseline)
    if name == "ptilmpq":
        middle = _said(asked, "middle")
        if type(middle) is not int:
            raise SettingError(f"middle: {middle!r:.40} is not allowed; a width")
        return PTILMPQ(
            alpha=_said(asked, "alpha"), beta_important=_said(asked, "betaImportant"),
            beta_other=_said(asked, "betaOther"), important_bits=(middle + 1, middle), other_bits=(middle, middle - 1),
        )  # fmt: skip
    if name != "budget":
        raise SettingError(f"allocator: {name!r:.40} is not allowed; budget, mixquant, ptilmpq")
    counted = _said(asked, "counted")
    if not isinstance(counted, str) or counted not in COUNTED:
        raise SettingError(f"counted: {counted!r:.40} is not allowed; {', '.join(COUNTED)}")
    return Budget(
        **{COUNTED[counted]: _said(asked, "budget")}, sensitivity=_said(asked, "sensitivity"), bits=bits,
        parts=bool(asked.get("parts", False)), pin=tuple(_pins(asked.get("pins", []))),
    )  # fmt: skip


def _said(asked: Mapping[str, Any], name: str) -> Any:
    if name not in asked:
        raise SettingError(f"{name}: is missing from what the page asked")
    return asked[name]


def _pins(pins: Any) -> list[str]:
    """Pins that each name one layer."""
    if not isinstance(pins, list):
        raise SettingError(f"pins: {pins!r:.40} is not allowed; a list of layers with their widths")
    found = []
    for pin in pins:
        if not (isinstance(pin, list) and len(pin) == 2 and isinstance(pin[0], str) and type(pin[1]) is int):
            raise SettingError(f"pins: {pin!r:.40} is not allowed; a layer and its width")
        found.append(f"{pattern_of(pin[0])}={pin[1]}")
    return found
