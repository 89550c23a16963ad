"""Which types of layers, and which positions, are sensitive: MixQuant's section 6 on three networks.

    python -m examples.study_sensitivity [--nets 20 56 minilm] [--bits 8 6 4 3 2] [--plot sensitivity.png]

By type: the layers of one type at 8 to 2 bits and all others at 8, asymmetric per tensor, min-max, as MixQuant has it;
top-1 and cross-entropy on test_846, and for MiniLM Spearman's correlation and the distance of the sentence embeddings
from the float model's on 150 even pairs of STS-B dev. By position: at each width the layer of the greatest relative
error, mean |w - w'| / |w|, and where it stands among the layers.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

import mpq_plugins as mpq
from examples.budget_minilm import sentence_pairs
from examples.cifar_resnet import evaluate, images, need_networks, resnet
from examples.minilm_torchao import embed, minilm
from examples.pictures import save_small
from mpq_plugins.report.plots import check_plot, write_plain_numbers
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine()
NETS = ("20", "56", "minilm")
PAIRS = 150
RESNET = {
    "first": r"conv1$", "stage 1": r"layer1\.", "stage 2": r"layer2\.", "stage 3": r"layer3\.", "last": r"linear$",
}  # fmt: skip
MINILM = {
    "embeddings": r"embeddings\.", "query and key": r"encoder.*\.(query|key)$", "value": r"encoder.*\.value$",
    "attention output": r"encoder.*\.attention\.output\.dense$", "feed-forward in": r"encoder.*\.intermediate\.dense$",
    "feed-forward out": r"encoder.*\.\d+\.output\.dense$",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, the types of its layers as patterns of names, and what is scored: two numbers, the second a loss."""

    name: str
    net: nn.Module
    types: Mapping[str, str]
    score: Callable[[nn.Module], tuple[float, float]]
    scored: tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    check_plot(options.plot)
    need_networks(parser)
    torch.set_num_threads(1)
    cases = [of_minilm() if net == "minilm" else of_resnet(int(net)) for net in options.nets]
    curves = []
    for case in cases:
        table = mpq.measure(case.net, SCHEME, options.bits, fold_bn=False)
        curves.append(by_type(case, table, options.bits))
        by_position(case, table, options.bits)
    if options.plot is not None:
        draw(cases, curves, options.bits, options.plot)


def of_resnet(depth: int) -> Case:
    data = images()
    return Case(
        f"ResNet-{depth}", resnet(depth), RESNET, lambda net: evaluate(net, *data), ("top-1 %", "cross-entropy")
    )


def of_minilm() -> Case:
    model, tokenizer = minilm()
    pairs = sentence_pairs()[: 2 * PAIRS : 2]
    sentences = [row[side] for side in (0, 1) for row in pairs]
    judged = [float(row[2]) for row in pairs]
    exact = embed(model, tokenizer, sentences)

    def score(net: nn.Module) -> tuple[float, float]:
        made = embed(net, tokenizer, sentences)
        similarity = F.cosine_similarity(made[: len(pairs)], made[len(pairs) :])
        moved = 1 - float(F.cosine_similarity(made, exact).mean())
        return 100 * float(spearmanr(similarity.numpy(), judged).statistic), moved

    return Case("MiniLM", model, MINILM, score, ("Spearman x 100", "distance"))


def by_type(case: Case, table: mpq.LayerTable, widths: Sequence[int]) -> dict[str, list[float]]:
    """The loss of each type at each width, the others at 8 bits."""
    curves, rows = {}, []
    for name, pattern in case.types.items():
        own = [layer for layer in table.layers if re.match(pattern, layer.name)]
        found = [case.score(mpq.apply(case.net, one_type(table, pattern, bits))) for bits in widths]
        curves[name] = [loss for _, loss in found]
        share = sum(layer.numel for layer in own) / sum(layer.numel for layer in table.layers)
        cells = [f"{better:.2f} / {loss:.3f}" for better, loss in found]
        rows.append((name, str(len(own)), f"{100 * share:.1f}", *cells))
    columns = ("type", "layers", "% of weights", *(f"{bits} bits" for bits in widths))
    show(f"{case.name}, one type at these bits, others at 8: {' / '.join(case.scored)}", columns, rows)
    return curves


def one_type(table: mpq.LayerTable, pattern: str, bits: int) -> mpq.Plan:
    """The layers whose names begin so at one width, and all others at 8 bits."""
    plan = mpq.Uniform(bits=8)(table)
    layers = [
        layer.model_copy(update={"bits": bits}) if re.match(pattern, layer.name) else layer for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": tuple(layers)})


def by_position(case: Case, table: mpq.LayerTable, widths: Sequence[int]) -> None:
    """The layer of the greatest relative error at each width."""
    errors, rows = table.errors("relative", tuple(widths)), []
    for column, bits in enumerate(widths):
        order = errors[:, column].argsort()[::-1]
        worst, second = (table.layers[place] for place in order[:2])
        value, middle = errors[order[0], column], sorted(errors[:, column])[len(errors) // 2]
        rows.append((
            f"{bits}", worst.name, f"{order[0] + 1} of {len(errors)}", f"{value:.3g}", f"{value / middle:.1f}",
            second.name,
        ))  # fmt: skip
    columns = ("bits", "most sensitive layer", "place", "relative error", "of the median", "next")
    show(f"{case.name}, relative error by position", columns, rows)


def draw(
    cases: Sequence[Case], curves: Sequence[Mapping[str, Sequence[float]]], widths: Sequence[int], path: Path
) -> None:
    """What each type's bits cost, a panel a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * len(cases), 2.3), layout="constrained")
    for axes, case, of_types in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, curves, strict=True):
        for name, losses in of_types.items():
            axes.plot([*map(str, widths)], losses, marker="o", markersize=3, linewidth=1, label=name)
        axes.set_yscale("log")
        write_plain_numbers(axes.yaxis)
        axes.set_title(case.name, fontsize=8)
        axes.set_xlabel("bits of the type", fontsize=7)
        axes.set_ylabel(case.scored[1], fontsize=7)
        axes.tick_params(which="both", labelsize=6)
        axes.legend(fontsize=5)
    save_small(figure, path)


def show(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    Console(width=140, highlight=False).print(grid(title, columns, rows, left=2))


if __name__ == "__main__":
    main()
