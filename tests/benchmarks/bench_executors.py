"""What a second process is worth, as ratios within one run: kl of ResNet-56, plans evaluated, layers compensated.

    python -m tests.benchmarks.bench_executors [--pairs 3]

One thread each. A pool of one process and one of two take turns; both have started, and have done the work once, before
the first turn counts. Everything that they find is compared with what this process finds alone, to the last bit.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, images, need_networks, resnet
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
Work = Callable[[Executor | None], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*WORKS], default=[*WORKS])
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(1)
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as one, ProcessPoolExecutor(2, mp_context=spawn) as two:
        for name in options.only:
            work = WORKS[name]()
            here = work(None)
            assert work(one) == here
            assert work(two) == here
            pairs = [(seconds(work, one), seconds(work, two)) for _ in range(options.pairs)]
            ratios = sorted(a / b for a, b in pairs)
            middle = [statistics.median(times) for times in zip(*pairs, strict=True)]
            rows.append(
                (name, *(f"{value:.1f}" for value in middle), f"{statistics.median(ratios):.2f}x",
                 f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
            )  # fmt: skip
    columns = ("work", "one process", "two", "ratio", "of all pairs")
    Console(width=110, highlight=False).print(grid("Seconds, one thread each", columns, rows))


def seconds(work: Work, executor: Executor) -> float:
    start = time.perf_counter()
    work(executor)
    return time.perf_counter() - start


def kl() -> Work:
    """56 layers, 2 widths, a batch of 8 images."""
    net = resnet(56)
    table = mpq.measure(net, SCHEME, (2, 4), per_channel=True)
    batches = [calibration()[0][:8]]

    def work(executor: Executor | None) -> list[list[float]]:
        filled = mpq.sensitivity(net, table, "kl", batches, executor=executor)
        return [layer.sensitivities["kl"].tolist() for layer in filled.layers]

    return work


def evaluated() -> Work:
    """Six uniform plans of ResNet-56, to nearest, on 423 images."""
    net = resnet(56)
    table = mpq.measure(net, SCHEME, range(2, 8), per_channel=True)
    plans = {f"{b} bits": mpq.Uniform(bits=b)(table) for b in table.bits}

    def work(executor: Executor | None) -> list[mpq.EvaluatedPlan]:
        return [replace(row, seconds=0) for row in mpq.evaluate(net, plans, accuracy, executor=executor)]

    return work


def accuracy(net: nn.Module) -> float:
    inputs, labels = images()
    with torch.no_grad():
        return float((net(inputs[:423]).argmax(1) == labels[:423]).float().mean())


def compensated() -> Work:
    """ResNet-20 at 3 bits on 512 images in four batches."""
    net, batches = resnet(20), calibration()[:4]
    plan = mpq.Uniform(bits=3)(mpq.measure(net, SCHEME, (3,)))

    def work(executor: Executor | None) -> list[list[float]]:
        rounded = mpq.round_weights(net, plan, batches, executor=executor)
        return [tensor.flatten().tolist() for tensor in rounded.state_dict().values()]

    return work


WORKS: dict[str, Callable[[], Work]] = {"kl": kl, "evaluate": evaluated, "compensate": compensated}

if __name__ == "__main__":
    main()
