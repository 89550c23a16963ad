"""The demo: one measurement, uniform and MixQuant plans, each applied, verified and tried on unseen digits."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from ...allocation.contract import Allocator
from ...allocation.mixquant import MixQuant
from ...allocation.uniform import Uniform
from ...common.progress import Progress
from ...measurement.measure import measure
from ...plans.plan import Plan
from ...plans.size import PlanSize
from ...report.tables import bits_text, bytes_text, grid
from ...simulation.apply import apply, verify
from .net import digit_net, unseen_digits

UNIFORM_BITS = (8, 6, 4, 3)
QEMS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
TOLERATED_LOSS = 0.005  # of accuracy: four of the 797 digits


@dataclass(frozen=True)
class Trial:
    """One plan tried on the digits; accuracy as a fraction, cross-entropy in nats."""

    name: str
    plan: Plan
    accuracy: float
    cross_entropy: float


@dataclass(frozen=True)
class DemoResult:
    """The float network's figures, every trial, and the plan to keep: the smallest MixQuant plan that loses little."""

    digits: int
    weights: int
    accuracy: float
    cross_entropy: float
    trials: tuple[Trial, ...]
    chosen: str
    plan: Plan


def run_demo(progress: Progress | None = None) -> DemoResult:
    """Measure the network once and try every plan."""
    net = digit_net()
    table = measure(net)
    accuracy, cross_entropy = _evaluate(net)
    uniform: list[tuple[str, Allocator]] = [(f"uniform {b}", Uniform(bits=b)) for b in UNIFORM_BITS]
    named = [*uniform, *((f"MixQuant QEM {q:g}", MixQuant(qem=q)) for q in QEMS)]
    trials = []
    for position, (name, allocator) in enumerate(named):
        if progress is not None:
            progress(name, position, len(named))
        trials.append(_try(name, allocator(table), net))
    kept = [t for t in trials[len(UNIFORM_BITS) :] if t.accuracy >= accuracy - TOLERATED_LOSS]
    chosen = min(kept, key=lambda trial: trial.plan.size().total_bits)
    weights = sum(layer.numel for layer in table.layers)
    _, labels = unseen_digits()
    return DemoResult(len(labels), weights, accuracy, cross_entropy, tuple(trials), chosen.name, chosen.plan)


def demo_report(result: DemoResult, out: Console) -> None:
    """Print the table."""
    rows: list[tuple[object, ...]] = [
        (
            "float",
            "32",
            bytes_text(4 * result.weights),
            "1.00x",
            f"{result.accuracy:.2%}",
            f"{result.cross_entropy:.4f}",
            "",
        )
    ]
    for trial in result.trials:
        size = trial.plan.size()
        rows.append(
            (
                trial.name, f"{size.total_average_bits:.2f}", bytes_text(size.total_bytes), f"{size.against_fp32:.2f}x",
                f"{trial.accuracy:.2%}", f"{trial.cross_entropy:.4f}",
                " ".join(bits_text(layer) for layer in trial.plan.layers),
            )
        )  # fmt: skip
    columns = ("plan", "bits a weight", "size", "smaller", "accuracy", "cross-entropy", "bits by layer")
    out.print(
        grid(
            f"{result.digits} handwritten digits, {result.weights:,} weights in {_layers(result)} layers",
            columns,
            rows,
        )
    )
    out.print(
        "Sizes are true: codes, scales and zero points. Compare MixQuant with uniform at equal size, not at equal name."
    )
    out.print(f"Kept: {result.chosen}, the smallest MixQuant plan within {TOLERATED_LOSS:.1%} of the float accuracy.")


def demo_json(result: DemoResult) -> dict[str, Any]:
    """The same figures for programs."""
    return {
        "digits": result.digits,
        "float": {"accuracy": result.accuracy, "cross_entropy": result.cross_entropy},
        "trials": [
            {
                "name": trial.name, "accuracy": trial.accuracy, "cross_entropy": trial.cross_entropy,
                "bits": {layer.name: layer.bits for layer in trial.plan.layers}, **_size(trial.plan.size()),
            }
            for trial in result.trials
        ],
        "kept": result.chosen,
    }  # fmt: skip


def _try(name: str, plan: Plan, net: nn.Module) -> Trial:
    quantized = apply(net, plan)
    verify(quantized, plan, original=net)
    return Trial(name, plan, *_evaluate(quantized))


def _evaluate(net: nn.Module) -> tuple[float, float]:
    images, labels = unseen_digits()
    with torch.no_grad():
        logits = net(images)
    return float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))


def _layers(result: DemoResult) -> int:
    return len(result.plan.layers)


def _size(size: PlanSize) -> dict[str, float]:
    return {"total_bytes": size.total_bytes, "total_average_bits": size.total_average_bits}
