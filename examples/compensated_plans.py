"""Plans for compensated rounding: which sensitivity a budget should go by where `mpq.compensate` follows.

    python -m examples.compensated_plans [--nets 20 56 minilm] [--bits 2 1.5]

Weights asymmetric per channel, clipped by squared error. ResNets: 1 to 8 bits for each channel, 1,024 training images;
top-1 and cross-entropy on test_846, and the divergence from the float net's predictions there, the least noisy of the
three. MiniLM's 36 linear layers: 1 to 6 bits, 250 sentences of the odd pairs of STS-B dev; Spearman's correlation on
the even pairs, and the distance of the sentence embeddings from the float model's.
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.budget_minilm import embedding, sentence_pairs, tokens
from examples.cifar_resnet import calibration, images, need_networks, resnet
from examples.minilm_torchao import embed, minilm
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
MINILM = "minilm"
NAMES = ("mse", "output_mse", "compensated_mse")
OF_RESNET = (*NAMES, "kl*output_mse", "kl*compensated_mse", "mse*compensated_mse")
OF_MINILM = (*NAMES, "distance*output_mse", "distance*compensated_mse")
LAYERWISE = (*NAMES, "distance", "distance*compensated_mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["20", "56", MINILM], choices=["20", "56", MINILM])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.5])
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(1)
    for net in options.nets:
        of_minilm(options.bits) if net == MINILM else of_resnet(int(net), options.bits)


def of_resnet(depth: int, budgets: Sequence[float]) -> None:
    net, batches = resnet(depth), calibration()
    inputs, labels = images()
    table = with_sensitivities(mpq.measure(net, SCHEME, range(1, 9), per_channel=True), net, batches)
    table = mpq.sensitivity(net, table, "kl", [batches[0][: 128 if depth == 20 else 24]])
    exact = predictions(net, inputs)
    rows = []
    for name, widths, plan in plans(table, budgets, OF_RESNET, ()):
        logits = predictions(mpq.apply(mpq.compensate(net, plan, batches), plan), inputs)
        top1 = 100 * float((logits.argmax(1) == labels).float().mean())
        loss = float(F.cross_entropy(logits, labels))
        p, q = (values.double().log_softmax(-1) for values in (exact, logits))
        divergence = float((p.exp() * (p - q)).sum(1).mean())
        rows.append((name, widths, bits_of(plan), f"{top1:.2f}", f"{loss:.3f}", f"{divergence:.4f}"))
    columns = ("sensitivity", "widths per", "bits", "top-1 %", "cross-entropy", "KL to float")
    show(f"ResNet-{depth}, compensated", columns, rows)


def of_minilm(budgets: Sequence[float]) -> None:
    model, tokenizer = minilm()
    sentences = sorted([sentence for row in sentence_pairs()[1::2] for sentence in row[:2]][::6], key=len)
    batches = [tokens(tokenizer, sentences[i : i + 32]) for i in range(0, len(sentences), 32)]
    few = sentences[:: len(sentences) // 96][:96]
    table = mpq.measure(model, SCHEME, range(1, 7), per_channel=True, only=["encoder.layer*"])
    table = with_sensitivities(table, model, batches)
    some = [tokens(tokenizer, few[i : i + 32]) for i in range(0, 96, 32)]
    table = mpq.sensitivity(model, table, "distance", some, output=embedding)
    pairs = sentence_pairs()[::2]

    def embedded(net: nn.Module) -> list[Tensor]:
        return [embed(net, tokenizer, [row[side] for row in pairs]) for side in (0, 1)]

    exact = embedded(model)
    rows = []
    for name, widths, plan in plans(table, budgets, OF_MINILM, LAYERWISE):
        first, second = embedded(mpq.apply(mpq.compensate(model, plan, batches), plan))
        score = spearmanr(F.cosine_similarity(first, second).numpy(), [float(row[2]) for row in pairs]).statistic
        moved = 1 - float(F.cosine_similarity(torch.cat(exact), torch.cat((first, second))).mean())
        rows.append((name, widths, bits_of(plan), f"{score:.4f}", f"{moved:.4f}"))
    show("all-MiniLM-L6-v2, compensated", ("sensitivity", "widths per", "bits", "Spearman", "distance"), rows)


def with_sensitivities(table: mpq.LayerTable, model: nn.Module, batches: Sequence[Any]) -> mpq.LayerTable:
    for name in NAMES[1:]:
        table = mpq.sensitivity(model, table, name, batches)
    return table


def plans(
    table: mpq.LayerTable, budgets: Sequence[float], of_channels: Sequence[str], of_layers: Sequence[str]
) -> Iterator[tuple[str, str, mpq.Plan]]:
    """Uniform widths, and budgets by these sensitivities, for channels and for layers."""
    for average in budgets:
        if average == int(average):
            yield "uniform", "layer", mpq.Uniform(bits=int(average))(table)
        for widths, names in (("channel", of_channels), ("layer", of_layers)):
            for name in names:
                yield name, widths, budget(table, average, name, parts=widths == "channel")


def budget(table: mpq.LayerTable, average: float, name: str, parts: bool) -> mpq.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpq.PlanWarning)  # the table shows what comes of it
        return mpq.Budget(average_bits=average, sensitivity=name, bits=table.bits, parts=parts)(table)


@torch.no_grad()
def predictions(net: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in inputs.split(128)])


def bits_of(plan: mpq.Plan) -> str:
    return f"{plan.size().average_bits:.2f}"


def show(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    Console(width=120, highlight=False).print(grid(title, columns, rows, left=2))


if __name__ == "__main__":
    main()
