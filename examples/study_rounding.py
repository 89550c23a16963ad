"""Stochastic rounding beside the others: to nearest, corrected, compensated and learned, at 4, 3 and 2 bits.

    python -m examples.study_rounding [--bits 4 3 2] [--seeds 3] [--steps 200] [--ranges mse]

ResNet-20, one width for all layers, per channel, asymmetric, in ranges of least squared error (mse) or from extremes
(minmax); 1,024 training images. Stochastic rounding (Gupta et al. 2015, arXiv 1502.02551) is drawn with several seeds:
the means of the scores, and in brackets the least and the greatest top-1. Learned rounding takes so many steps a block;
0 leaves it out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet20
from mpq_plugins.report.tables import grid

SCHEMES = {range_: mpq.Affine(granularity="per_channel", range=range_) for range_ in ("mse", "minmax")}
Score = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranges", nargs="+", choices=list(SCHEMES), default=["mse"])
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(1)
    net, batches = resnet20(), calibration()
    for name in options.ranges:
        scheme = SCHEMES[name]
        rows = [(f"{bits}", *row(net, scheme, bits, batches, options.seeds, options.steps)) for bits in options.bits]
        columns = ("bits", "nearest", "stochastic", "nearest, corr.", "stochastic, corr.", "compensated", "learned")
        title = f"ResNet-20, {name} ranges: top-1 % / cross-entropy"
        Console(width=150, highlight=False).print(grid(title, columns, rows, left=1))


def row(
    net: nn.Module, scheme: mpq.Affine, bits: int, batches: Sequence[Tensor], seeds: int, steps: int
) -> tuple[str, ...]:
    """Top-1 and cross-entropy of each rounding at one width."""
    data = images()
    plan = mpq.Uniform(bits=bits)(mpq.measure(net, scheme, (bits,)))
    drawn = [drawn_by(plan, seed) for seed in range(seeds)]

    def corrected(one: mpq.Plan) -> Score:
        return evaluate(mpq.apply(net, one, calibrate=batches, rounding="nearest"), *data)

    learned = ""
    if steps:
        learned = one_score(evaluate(mpq.apply(mpq.reconstruct(net, plan, batches, steps=steps), plan), *data))
    return (
        one_score(evaluate(mpq.apply(net, plan), *data)),
        spread([evaluate(mpq.apply(net, one), *data) for one in drawn]),
        one_score(corrected(plan)),
        spread([corrected(one) for one in drawn]),
        one_score(evaluate(mpq.apply(net, plan, calibrate=batches), *data)),
        learned,
    )


def drawn_by(plan: mpq.Plan, seed: int) -> mpq.Plan:
    """The plan, rounded stochastically."""
    layers = [layer.model_copy(update={"scheme": replace(layer.scheme, stochastic=seed)}) for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers)})


def one_score(score: Score) -> str:
    return f"{score[0]:.2f} / {score[1]:.3f}"


def spread(scores: Sequence[Score]) -> str:
    """The means, and between what they lie."""
    top1, loss = (sorted(values) for values in zip(*scores, strict=True))
    means = [sum(values) / len(values) for values in (top1, loss)]
    return f"{means[0]:.1f} / {means[1]:.2f} ({top1[0]:.1f}-{top1[-1]:.1f})"


if __name__ == "__main__":
    main()
