"""How many calibration samples each method needs, from 16 to 1,024 training images, on ResNet-20.

    python -m examples.study_samples [--samples 16 64 256 1024] [--draws 3] [--plot samples.png]

Weights asymmetric per channel, clipped. What is fitted on the samples, and what is scored on test_846 (top-1 and
cross-entropy, the mean of several draws of images, and the greatest cross-entropy of them):

- ranges: 4-bit inputs in static ranges of least squared error, beside 8-bit weights to nearest.
- corrected: 3-bit weights to nearest, statistics and biases corrected.
- compensated: 2-bit weights, compensated.
- kl, output_mse: a Budget of 2.5 bits for layers by that sensitivity, corrected on all 1,024 images.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet20
from examples.pictures import save_small
from mpq_plugins.report.plots import check_plot
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
WIDTHS = (2, 3, 4)
Batches = Sequence[Tensor]
Fitted = Callable[[nn.Module, mpq.LayerTable, Batches, Batches], nn.Module]
"""(net, table, samples, all samples) -> the quantized network."""
Scores = dict[int, list[tuple[float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--draws", type=int, default=3, help="of fewer samples than there are")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    check_plot(options.plot)
    need_networks(parser)
    torch.set_num_threads(1)
    net, pool, data = resnet20(), torch.cat(calibration()), images()
    table = mpq.measure(net, SCHEME, (*WIDTHS, 8))
    found: dict[str, Scores] = {name: {} for name in options.methods}
    for name in options.methods:
        for count in options.samples:
            draws = [samples(pool, count, draw) for draw in range(options.draws if count < len(pool) else 1)]
            made = [METHODS[name](net, table, batches, list(pool.split(128))) for batches in draws]
            found[name][count] = [evaluate(quantized, *data) for quantized in made]
    print_scores(found, options.samples)
    if options.plot is not None:
        draw_curves(found, options.plot)


def samples(pool: Tensor, count: int, seed: int) -> list[Tensor]:
    """So many of the images, in batches."""
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]
    return list(pool[chosen].split(128))


def ranges(net: nn.Module, table: mpq.LayerTable, batches: Batches, _: Batches) -> nn.Module:
    plan = mpq.Uniform(bits=8)(table).with_activations(mpq.Activations(4))
    return mpq.apply(mpq.calibrate_inputs(net, plan, batches), plan)


def corrected(net: nn.Module, table: mpq.LayerTable, batches: Batches, _: Batches) -> nn.Module:
    return mpq.apply(net, mpq.Uniform(bits=3)(table), calibrate=batches, rounding="nearest")


def compensated(net: nn.Module, table: mpq.LayerTable, batches: Batches, _: Batches) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpq.RoundingWarning)  # that the samples are few
        return mpq.apply(net, mpq.Uniform(bits=2)(table), calibrate=batches)


def by_sensitivity(name: str) -> Fitted:
    def budget(net: nn.Module, table: mpq.LayerTable, batches: Batches, everything: Batches) -> nn.Module:
        measured = mpq.sensitivity(net, mpq.measure(net, SCHEME, WIDTHS), name, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mpq.PlanWarning)  # the table shows what comes of it
            plan = mpq.Budget(average_bits=2.5, sensitivity=name, bits=WIDTHS, parts=False)(measured)
        return mpq.apply(net, plan, calibrate=everything, rounding="nearest")

    return budget


METHODS: dict[str, Fitted] = {
    "ranges": ranges, "corrected": corrected, "compensated": compensated, "kl": by_sensitivity("kl"),
    "output_mse": by_sensitivity("output_mse"),
}  # fmt: skip


def print_scores(found: dict[str, Scores], counts: Sequence[int]) -> None:
    rows = [(name, *(cell(scores[count]) for count in counts)) for name, scores in found.items()]
    title = "ResNet-20: top-1 % / cross-entropy (the worst draw's)"
    Console(width=140, highlight=False).print(grid(title, ("method", *map(str, counts)), rows, left=1))


def cell(scores: Sequence[tuple[float, float]]) -> str:
    top1, loss = (sum(values) / len(values) for values in zip(*scores, strict=True))
    return f"{top1:.2f} / {loss:.3f} ({max(loss for _, loss in scores):.3f})"


def draw_curves(found: dict[str, Scores], path: Path) -> None:
    """Cross-entropy against the number of samples: the mean, and between what it lies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, scores in found.items():
        losses = [[loss for _, loss in own] for own in scores.values()]
        means = [sum(own) / len(own) for own in losses]
        axes.plot([*map(str, scores)], means, marker="o", markersize=3, linewidth=1, label=name)
        axes.fill_between(
            [*map(str, scores)], [min(own) for own in losses], [max(own) for own in losses], alpha=0.15, linewidth=0
        )
    axes.set_xlabel("calibration samples")
    axes.set_ylabel("cross-entropy")
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    save_small(figure, path)


if __name__ == "__main__":
    main()
