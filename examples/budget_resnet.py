"""Budgets for CIFAR-10 ResNets: every allocator at the same sizes, as they are and corrected, with data and without.

    python -m examples.budget_resnet [--nets 20 56] [--bits 4 3 2.5 2]

Weights asymmetric per output channel, clipped by squared error, candidates 1 to 8 bits; size of the codes alone, and in
total. Corrected: BatchNorm statistics and biases from 1,024 training images without labels; without data: from inputs
made of the network's own BatchNorm statistics. test_846: one image is 0.12 points, so look at the cross-entropy.
"""

import argparse
import time

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet
from mpq_plugins.evaluation.pareto import PER_CHANNEL, pareto
from mpq_plugins.report.tables import grid
from mpq_plugins.simulation.synthetic import synthetic_batches

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
SHAPE = (128, 3, 32, 32)
WITHOUT_DATA = 20  # the net for which inputs are made, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.0])
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(2)
    for depth in options.nets:
        report(depth, options.bits)


def report(depth: int, budgets: list[float]) -> None:
    net = resnet(depth)
    start, spent = time.perf_counter(), time.process_time()
    table = mpq.measure(net, SCHEME, range(1, 9), per_channel=True)
    plans = [one for one in pareto(table, budgets) if one.series != "sqnr"]
    print(
        f"ResNet-{depth}: measured, and {len(plans)} plans made, in {time.perf_counter() - start:.1f} s, "
        f"{time.process_time() - spent:.1f} CPU-seconds"
    )
    inputs, labels = images()
    batches = calibration()
    made = synthetic_batches(net, SHAPE, count=2) if depth == WITHOUT_DATA else None
    rows: list[tuple[str, ...]] = [("float", "32", "32", *shown(net, inputs, labels), "", "")]
    for one in sorted(plans, key=lambda one: -one.plan.size().average_bits):
        size = one.plan.size()
        if one.series == "uniform" and size.average_bits not in budgets:
            continue
        free = ("",)
        if made is not None and one.series == PER_CHANNEL:
            free = shown(mpq.apply(net, one.plan, calibrate=made, rounding="nearest"), inputs, labels)
        rows.append((
            one.series, f"{size.average_bits:.3f}", f"{size.total_average_bits:.3f}",
            *shown(mpq.apply(net, one.plan), inputs, labels),
            *shown(mpq.apply(net, one.plan, calibrate=batches, rounding="nearest"), inputs, labels), *free,
        ))  # fmt: skip
    columns = ("plan", "bits", "in total", "as it is", "corrected", "corrected without data")
    Console(width=120, highlight=False).print(grid(f"ResNet-{depth}, {SCHEME}: top-1 % / cross-entropy", columns, rows))


def shown(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[str]:
    top1, loss = evaluate(net, inputs, labels)
    return (f"{top1:.2f} / {loss:.3f}",)


if __name__ == "__main__":
    main()
