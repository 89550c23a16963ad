"""The demo: four allocators at the same sizes, each plan compensated, verified and tried on unseen digits."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...allocation.budget import Budget
from ...allocation.ptilmpq import PTILMPQ
from ...allocation.uniform import Uniform
from ...common.progress import Progress
from ...errors import SettingError
from ...evaluation.pareto import mixquant_at
from ...evaluation.scored import Scored
from ...evaluation.scores import Scores
from ...measurement.measure import measure
from ...plans.affine import Affine
from ...plans.plan import Plan
from ...plans.table import LayerTable
from ...reconstruction.rounding import COMPENSATED
from ...report.console import PlainConsole
from ...report.tables import bytes_text, grid
from .net import accuracy, calibration_digits, digit_net, unseen_digits

SIZES = (4, 3, 2)  # bits a weight, scales not counted
WIDTHS = tuple(range(1, 9))
SHARES = (0.25, 0.5, 0.75)  # of a layer's channels that PTILMPQ takes for important
TOLERATED_LOSS = 0.005  # of accuracy: four of the 797 digits
COLUMNS = ("plan", "bits a weight", "size", "smaller", "accuracy", "cross-entropy")


@dataclass(frozen=True)
class Trial:
    """One plan, applied and tried on the digits; None is the float network."""

    name: str
    plan: Plan | None
    scores: Scores


@dataclass(frozen=True)
class DemoResult:
    """The float network, every plan by its name, and the name of the one to keep."""

    digits: int
    weights: int
    layers: int
    trials: tuple[Trial, ...]
    kept: str

    @property
    def plan(self) -> Plan:
        """The plan to keep."""
        (plan,) = (trial.plan for trial in self.trials if trial.name == self.kept and trial.plan is not None)
        return plan


def run_demo(progress: Progress | None = None) -> DemoResult:
    """Measure the network once, plan it at every size, and try every plan."""
    net = digit_net()
    table = measure(net, Affine(granularity="per_channel", range="mse"), WIDTHS, per_channel=True)
    plans = dict(_named_plans(table))
    scored = Scored(net, accuracy, calibration_digits(), None, COMPENSATED)
    trials = [Trial("float", None, scored.evaluated(None, "float").scores)]
    for position, (name, plan) in enumerate(plans.items()):
        if progress is not None:
            progress(name, position, len(plans))
        trials.append(Trial(name, plan, scored.evaluated(plan, name).scores))
    weights = sum(layer.numel for layer in table.layers)
    _, labels = unseen_digits()
    return DemoResult(len(labels), weights, len(table.layers), tuple(trials), _kept(trials))


def demo_report(result: DemoResult, out: PlainConsole, plan_file: str) -> None:
    """Print the table, what is kept and why, and what to type next."""
    title = f"{result.digits} handwritten digits, {result.weights:,} weights in {result.layers} layers"
    out.print(grid(title, COLUMNS, [_line(trial, result.weights) for trial in result.trials]))
    for line in (
        "Sizes are true: codes, scales, zero points and channel maps. Every plan is compensated on 200 digits.",
        f"Kept: {result.kept}, the best of the smallest size within {TOLERATED_LOSS:.1%} of the float accuracy.",
        "Next, look at it, make one of your own network, and try it:",
        f"  mpq show {plan_file}",
        "  mpq plan mine.py:net --average-bits 3 -o mine.json",
        "  mpq evaluate mine.py:net mine.json --eval mine.py:score --calibrate mine.py:batches",
    ):
        if line.startswith(" "):
            out.print(line, soft_wrap=True)  # a command is copied as it is
        else:
            out.sentence(line)


def demo_json(result: DemoResult) -> dict[str, Any]:
    """The same figures for programs."""
    return {
        "digits": result.digits,
        "rounding": COMPENSATED,
        "float": dict(result.trials[0].scores),
        "trials": [
            {
                "name": trial.name, **trial.scores, "total_bytes": trial.plan.size().total_bytes,
                "total_average_bits": trial.plan.size().total_average_bits,
            }
            for trial in result.trials if trial.plan is not None
        ],
        "kept": result.kept,
    }  # fmt: skip


def _named_plans(table: LayerTable) -> Iterator[tuple[str, Plan]]:
    """Four plans of each size, less those that an allocator has none of."""
    for bits in SIZES:
        plans = {
            "Budget": Budget(average_bits=bits)(table),
            "PTILMPQ": _ptilmpq(table, bits),
            "MixQuant": mixquant_at(table, bits, WIDTHS),
            "uniform": Uniform(bits=bits)(table),
        }
        for name, plan in plans.items():
            if plan is not None:
                yield f"{name} {bits}", plan


def _ptilmpq(table: LayerTable, bits: int) -> Plan | None:
    """PTILMPQ's largest plan within a size: its shares of important layers and channels step coarsely on six layers."""
    plans = []
    for high, share in itertools.product(range(2, 8), SHARES):
        allocator = PTILMPQ(
            average_bits=bits, beta_important=share, beta_other=share, important_bits=(high + 1, high),
            other_bits=(high, high - 1),
        )  # fmt: skip
        with suppress(SettingError):  # no plan of these widths is as small
            plans.append(allocator(table))
    return max(plans, key=lambda plan: plan.size().weights_only_bits, default=None)


def _kept(trials: Sequence[Trial]) -> str:
    """Of the smallest size at which some plan loses little, the plan of least cross-entropy among those."""
    least = trials[0].scores["accuracy"] - TOLERATED_LOSS
    good = [trial for trial in trials[1:] if trial.scores["accuracy"] >= least]
    smallest = min(map(_bits, good))
    best = min((trial for trial in good if _bits(trial) == smallest), key=lambda trial: trial.scores["cross_entropy"])
    return best.name


def _bits(trial: Trial) -> int:
    """The size that was asked for, as its name ends."""
    return int(trial.name.split()[-1])


def _line(trial: Trial, weights: int) -> tuple[str, ...]:
    scores = (f"{trial.scores['accuracy']:.2%}", f"{trial.scores['cross_entropy']:.4f}")
    if trial.plan is None:
        return trial.name, "32", bytes_text(4 * weights), "1.00x", *scores
    size = trial.plan.size()
    bits, smaller = f"{size.total_average_bits:.2f}", f"{size.against_fp32:.2f}x"
    return trial.name, bits, bytes_text(size.total_bytes), smaller, *scores
