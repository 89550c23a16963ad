"""PTILMPQ's alpha on other data and other networks: CIFAR-10, the same as JPEG has it, digits, sentences.

    python -m examples.study_alpha [--data cifar jpeg digits sentences] [--alphas 0 0.25 0.5 0.75 1] [--plot alpha.png]

beta = 0.5, widths 5,4 and 4,3 of its own two-region scheme, rounded to nearest. ResNet-20 on the 846 test images, and
on the same compressed by JPEG at a quality of 20; the demo's network on its digits; the encoder of all-MiniLM-L6-v2 on
150 even pairs of STS-B dev, in Spearman's correlation and the distance of sentence embeddings from the float model's.
Beside it, uniform widths of 3 and 4 bits under the same scheme, and as many layers chosen by the least F.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import MEAN, STD, evaluate, images, need_networks, resnet20
from examples.pictures import save_small
from examples.study_sensitivity import of_minilm
from mpq_plugins.cli.demo.net import digit_net, unseen_digits
from mpq_plugins.report.plots import check_plot
from mpq_plugins.report.tables import grid

SCHEME = mpq.Piecewise(granularity="per_channel")
DATA = ("cifar", "jpeg", "digits", "sentences")
QUALITY = 20  # of JPEG


@dataclass(frozen=True)
class Case:
    """A network, globs of the layers that are planned, and what is scored: two numbers, the second a loss."""

    name: str
    net: nn.Module
    score: Callable[[nn.Module], tuple[float, float]]
    scored: tuple[str, str] = ("top-1 %", "cross-entropy")
    only: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    check_plot(options.plot)
    need_networks(parser)
    torch.set_num_threads(1)
    cases = [MAKE[name]() for name in options.data]
    curves = [by_alpha(case, options.alphas) for case in cases]
    if options.plot is not None:
        draw(cases, curves, options.alphas, options.plot)


def cifar() -> Case:
    data = images()
    return Case("CIFAR-10", resnet20(), lambda net: evaluate(net, *data))


def jpeg() -> Case:
    data = compressed(*images())
    return Case(f"CIFAR-10, JPEG {QUALITY}", resnet20(), lambda net: evaluate(net, *data))


def digits() -> Case:
    data = unseen_digits()
    return Case("digits", digit_net(), lambda net: evaluate(net, *data))


def sentences() -> Case:
    case = of_minilm()
    return Case("sentences", case.net, case.score, case.scored, ("encoder.layer*",))


MAKE = {"cifar": cifar, "jpeg": jpeg, "digits": digits, "sentences": sentences}


def compressed(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images as JPEG leaves them."""
    from PIL import Image

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    made: list[NDArray[np.uint8]] = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
        made.append(np.asarray(Image.open(file)))
    scaled = torch.from_numpy(np.stack(made)).float().div(255).permute(0, 3, 1, 2)
    return (scaled - mean) / std, labels


def by_alpha(case: Case, alphas: Sequence[float]) -> list[float]:
    """The loss at each alpha; the table says more."""
    table = mpq.measure(case.net, SCHEME, (3, 4, 5), only=case.only)
    rows = [("float", "", scored(case.score(case.net)), "", "")]
    losses = []
    for alpha in alphas:
        plan = mpq.PTILMPQ(alpha=alpha)(table)
        found = case.score(mpq.apply(case.net, plan))
        losses.append(found[1])
        least = other_way(table, alpha)
        mirrored = scored(case.score(mpq.apply(case.net, least))) if 0 < alpha < 1 else ""
        rows.append((f"alpha {alpha:g}", bits_of(plan), scored(found), bits_of(least) if mirrored else "", mirrored))
    for bits in (3, 4):
        plan = mpq.Uniform(bits=bits)(table)
        rows.append((f"uniform {bits}", bits_of(plan), scored(case.score(mpq.apply(case.net, plan))), "", ""))
    columns = ("plan", "bits, in total", " / ".join(case.scored), "least F first", "then")
    show(f"{case.name}, {len(table.layers)} layers", columns, rows)
    return losses


def other_way(table: mpq.LayerTable, alpha: float) -> mpq.Plan:
    """As many important layers, those of the least F: what the ranking is worth."""
    low, high = (mpq.PTILMPQ(alpha=share)(table).layers for share in (0.0, 1.0))
    plan = mpq.PTILMPQ(alpha=alpha)(table)
    count = sum(own == all_high for own, all_high in zip(plan.layers, high, strict=True))
    least = {layer.name for layer in sorted(table.layers, key=lambda layer: layer.importance)[:count]}
    layers = tuple(above if above.name in least else below for below, above in zip(low, high, strict=True))
    return plan.model_copy(update={"layers": layers})


def bits_of(plan: mpq.Plan) -> str:
    return f"{plan.size().total_average_bits:.2f}"


def scored(found: tuple[float, float]) -> str:
    return f"{found[0]:.2f} / {found[1]:.3f}"


def draw(cases: Sequence[Case], curves: Sequence[Sequence[float]], alphas: Sequence[float], path: Path) -> None:
    """The loss against alpha, a panel each, for their units differ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * len(cases), 1.9), layout="constrained")
    for axes, case, losses in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, curves, strict=True):
        axes.plot(alphas, losses, marker="o", markersize=3, linewidth=1)
        axes.set_title(case.name, fontsize=8)
        axes.set_xlabel("alpha", fontsize=7)
        axes.set_ylabel(case.scored[1], fontsize=7)
        axes.tick_params(labelsize=6)
    save_small(figure, path)


def show(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    Console(width=120, highlight=False).print(grid(title, columns, rows, left=1))


if __name__ == "__main__":
    main()
