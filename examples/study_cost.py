"""What every method costs: processor seconds, memory, and the data that it needs, side by side on the same networks.

    python -m examples.study_cost [--nets 20 minilm] [--methods mse kl ...] [--plot cost.png]

Each method runs once, by itself, in a process that has the network, its table and its samples already; one thread.
Memory is what the process takes at its peak beyond what it began with. ResNet-20 on 256 training images, the encoder of
all-MiniLM-L6-v2 on 64 sentences; per channel, widths of 2 to 8 bits. Learned rounding takes 100 steps a block, and
what it takes grows with them: 2,000 to 20,000 are usual.
"""

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import mpq_plugins as mpq
from examples.budget_minilm import calibration_sentences, embedding, tokens
from examples.cifar_resnet import calibration, need_networks, resnet20
from examples.minilm_torchao import minilm
from examples.pictures import save_small
from mpq_plugins.report.plots import check_plot, write_plain_numbers
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel")
CLIPPED = mpq.Affine(granularity="per_channel", range="mse")
WIDTHS = range(2, 9)
STEPS = 100
NETS = ("20", "minilm")


@dataclass(frozen=True)
class Case:
    """A network with its table, and samples: some hundreds, and the first few dozen of them."""

    name: str
    net: nn.Module
    table: mpq.LayerTable
    batches: Sequence[Any]
    few: Sequence[Any]
    only: tuple[str, ...] = ()
    output: Callable[..., Any] | None = None

    @property
    def plan(self) -> mpq.Plan:
        return mpq.Uniform(bits=3)(self.table)


Method = Callable[[Case], Any]


def sensitivity(name: str, few: bool) -> Method:
    def measured(case: Case) -> Any:
        named = "distance" if name == "kl" and case.output is not None else name
        return mpq.sensitivity(
            case.net, case.table, named, case.few if few else case.batches, output=case.output if few else None
        )

    return measured


NONE, SAMPLES, FEW = "none", "samples", "a quarter of them"
METHODS: dict[str, tuple[str, Method]] = {
    "measure, min-max": (NONE, lambda case: mpq.measure(case.net, SCHEME, WIDTHS, only=case.only)),
    "measure, clipped": (NONE, lambda case: mpq.measure(case.net, CLIPPED, WIDTHS, only=case.only)),
    "output_mse": (SAMPLES, sensitivity("output_mse", few=False)),
    "kl or distance": (FEW, sensitivity("kl", few=True)),
    "inputs' output_mse": (SAMPLES, lambda case: mpq.measure_activations(case.net, case.table, case.batches, (4, 8))),
    "Uniform": (NONE, lambda case: mpq.Uniform(bits=3)(case.table)),
    "MixQuant": (NONE, lambda case: mpq.MixQuant(bits=tuple(WIDTHS))(case.table)),
    "PTILMPQ": (NONE, lambda case: mpq.PTILMPQ()(case.table)),
    "Budget, layers": (NONE, lambda case: mpq.Budget(average_bits=3, bits=tuple(WIDTHS), parts=False)(case.table)),
    "Budget, channels": (NONE, lambda case: mpq.Budget(average_bits=3, bits=tuple(WIDTHS))(case.table)),
    "to nearest": (NONE, lambda case: mpq.apply(case.net, case.plan)),
    "corrected": (SAMPLES, lambda case: mpq.correct(case.net, case.plan, case.batches)),
    "ranges of inputs": (
        SAMPLES,
        lambda case: mpq.calibrate_inputs(case.net, case.plan.with_activation_bits(8), case.batches),
    ),
    "compensated": (SAMPLES, lambda case: mpq.compensate(case.net, case.plan, case.batches)),
    f"learned, {STEPS} steps": (SAMPLES, lambda case: mpq.reconstruct(case.net, case.plan, case.batches, steps=STEPS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    check_plot(options.plot)
    need_networks(parser)
    torch.set_num_threads(1)
    costs = {net: {name: cost_of(case, name) for name in options.methods} for net, case in cases(options.nets)}
    rows = [
        (name, METHODS[name][0], *(f"{seconds:.2f} s, {mebibytes:.0f} MiB" for seconds, mebibytes in of(costs, name)))
        for name in options.methods
    ]
    columns = ("method", "data", *costs)
    Console(width=120, highlight=False).print(grid("Processor seconds and memory", columns, rows, left=2))
    if options.plot is not None:
        draw(costs, options.methods, options.plot)


def of(costs: dict[str, dict[str, tuple[float, float]]], name: str) -> list[tuple[float, float]]:
    return [own[name] for own in costs.values()]


def cases(names: Sequence[str]) -> list[tuple[str, Case]]:
    return [(case.name, case) for case in (of_minilm() if name == "minilm" else of_resnet() for name in names)]


def of_resnet() -> Case:
    net, batches = resnet20(), calibration()[:2]
    table = mpq.measure(net, SCHEME, WIDTHS, per_channel=True)
    return Case("ResNet-20", net, table, batches, [batches[0][:64]])


def of_minilm() -> Case:
    model, tokenizer = minilm()
    chosen = calibration_sentences()[::4]
    batches = [tokens(tokenizer, chosen[start : start + 16]) for start in range(0, len(chosen), 16)]
    table = mpq.measure(model, SCHEME, WIDTHS, per_channel=True, only=["encoder.layer*"])
    return Case("MiniLM", model, table, batches, batches[:1], ("encoder.layer*",), embedding)


def cost_of(case: Case, name: str) -> tuple[float, float]:
    """Processor seconds and mebibytes at the peak, of a process of its own."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_tried, args=(case, name, there))
    child.start()
    there.close()
    seconds, mebibytes = here.recv()
    child.join()
    return seconds, mebibytes


def _tried(case: Case, name: str, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    METHODS[name][1](case)
    seconds = time.process_time() - start
    answer.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def draw(costs: dict[str, dict[str, tuple[float, float]]], names: Sequence[str], path: Path) -> None:
    """Processor seconds, a bar a method and network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 0.2 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    high = 0.8 / len(costs)
    for number, (net, own) in enumerate(costs.items()):
        places = [place + number * high for place in range(len(names))]
        axes.barh(places, [max(own[name][0], 1e-3) for name in names], height=high, label=net)
    axes.set_yticks([place + 0.4 - high / 2 for place in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    write_plain_numbers(axes.xaxis)
    axes.set_xlabel("processor seconds", fontsize=7)
    axes.tick_params(which="both", labelsize=7)
    axes.legend(fontsize=7)
    save_small(figure, path)


if __name__ == "__main__":
    main()
