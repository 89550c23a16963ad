"""BRECQ under every allocator's plans, on CIFAR-10 ResNets: which plan deserves the reconstruction?

    python -m examples.brecq_table [--nets 20 56] [--steps 2000]

Weights asymmetric per output channel, clipped by squared error; 1,024 training images without labels. `ends at 8` keeps
the first and last layer at 8 bits, as BRECQ's published code does. Bits: of the codes alone, and in total, scales, zero
points and maps of parts included. Corrected first: BatchNorm statistics are corrected before the reconstruction.
test_846: one image is 0.12 points, so look at the cross-entropy.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet
from mpq_plugins.evaluation.pareto import mixquant_at, ptilmpq_at
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
WIDTHS = range(1, 9)
ENDS = ("conv1", "linear")
COLUMNS = (
    "plan",
    "bits",
    "in total",
    "to nearest",
    "corrected",
    "BRECQ",
    "blocks at nearest",
    "seconds",
    "CPU-seconds",
)


@dataclass(frozen=True)
class Row:
    """A plan, and what its reconstruction begins at and sees."""

    name: str
    plan: mpq.Plan
    correct: bool = False
    mix: float = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--steps", type=int, default=2000, help="for each block")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names contain one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(options.threads)
    for depth in options.nets:
        report(depth, options.steps, options.only, options.seed)


def plans(table: mpq.LayerTable) -> Iterator[Row]:
    """The table's rows, in the order of BRECQ's own, MixQuant's, PTILMPQ's and Budget's plans."""
    for b in (4, 3, 2):
        yield Row(f"uniform {b}, ends at 8", ends_at_8(mpq.Uniform(bits=b)(table)))
    yield Row("the same, float inputs never mixed in", ends_at_8(mpq.Uniform(bits=2)(table)), mix=0.0)
    for b in (3, 2):
        yield Row(f"uniform {b}", mpq.Uniform(bits=b)(table))
    yield Row("uniform 2, corrected first", mpq.Uniform(bits=2)(table), correct=True)
    for average in (3.0, 2.5):
        mixquant = mixquant_at(table, average, WIDTHS)
        assert mixquant is not None
        yield Row(f"MixQuant at most {average}", mixquant)
    for average in (3.0, 2.0):
        ptilmpq = ptilmpq_at(table, average, WIDTHS)
        assert ptilmpq is not None
        yield Row(f"PTILMPQ at most {average}", ptilmpq)
    one = mpq.Budget(average_bits=2.0, bits=(1, 2, 3, 4), parts=False)(table)
    yield Row("Budget per layer 2.0, corrected first", one, correct=True)
    for average in (2.0, 1.75, 1.5, 1.25):
        several = mpq.Budget(average_bits=average, bits=(1, 2, 3, 4))(table)
        yield Row(f"Budget per channel {average}, corrected first", several, correct=True)


def ends_at_8(plan: mpq.Plan) -> mpq.Plan:
    layers = [layer.model_copy(update={"bits": 8}) if layer.name in ENDS else layer for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers)})


def report(depth: int, steps: int, only: list[str], seed: int) -> None:
    net, (inputs, labels), batches = resnet(depth), images(), calibration()
    table = mpq.measure(net, SCHEME, WIDTHS, per_channel=True)
    warnings.simplefilter("ignore", mpq.PlanWarning)  # the table says which plans are worse

    def shown(model: torch.nn.Module) -> str:
        top1, loss = evaluate(model, inputs, labels)
        return f"{top1:.2f} / {loss:.3f}"

    rows = [("float", "32", "32", shown(net), "", "", "", "", "")]
    for row in plans(table):
        if not any(part in row.name for part in only):
            continue
        kept: list[mpq.BlockReport] = []
        start, spent = time.perf_counter(), time.process_time()
        learned = mpq.reconstruct(
            net, row.plan, batches, steps=steps, correct=row.correct, mix=row.mix, seed=seed, finished=kept.append
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - spent
        mpq.verify(learned, row.plan, learned)
        size = row.plan.size()
        rows.append((
            row.name, f"{size.average_bits:.3f}", f"{size.total_average_bits:.3f}",
            shown(mpq.apply(net, row.plan)),
            shown(mpq.apply(net, row.plan, calibrate=batches, rounding="nearest")), shown(learned),
            str(sum(block.learned >= block.nearest for block in kept)), f"{seconds:.0f}", f"{cpu:.0f}",
        ))  # fmt: skip
        print(f"ResNet-{depth}, {' | '.join(rows[-1])}", flush=True)
    title = f"ResNet-{depth}, {SCHEME}, {steps} steps a block: top-1 % / cross-entropy"
    Console(width=160, highlight=False).print(grid(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
