"""Budgets for a transformer: cosine-scaled, input-weighted errors, fitted ranges, corrected biases.

    python -m examples.budget_minilm [--bits 3 2.5 2]

The 36 linear layers of all-MiniLM-L6-v2's encoder, per output row. Calibration: 256 sentences of the odd pairs of STS-B
dev (96 of them for the distance); evaluation: Spearman's correlation on the 750 even pairs. Beside the plan that is
predicted to be best stand those that the guard flags.
"""

import argparse
import csv
import time
import warnings

import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.minilm_torchao import PAIRS, embed, minilm
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel")
BITS = range(1, 7)
BEST = "distance*output_mse"
PLANS = (("distance", False), (BEST, False), (BEST, True), ("output_mse", False), ("mse", False), ("mse", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 2.5, 2.0])
    options = parser.parse_args()
    torch.set_num_threads(2)
    if not PAIRS.exists():
        parser.exit(2, f"no sentence pairs at {PAIRS}; set MPQ_ZOO to the folder that holds stsb\n")
    model, tokenizer = minilm()
    sentences = calibration_sentences()
    batches = [tokens(tokenizer, sentences[i : i + 32]) for i in range(0, 256, 32)]
    few = sentences[:: len(sentences) // 96][:96]
    table = measured(model, batches, [tokens(tokenizer, few[i : i + 32]) for i in range(0, 96, 32)])

    rows = [("float", "", "32", f"{spearman(model, tokenizer):.4f}", "", "")]
    for average in options.bits:
        plans = [(name, parts, budget(table, average, name, parts)) for name, parts in PLANS]
        if average == int(average):
            plans.append(("uniform", False, mpq.Uniform(bits=int(average))(table)))
        for name, parts, plan in plans:
            corrected = mpq.correct(model, plan, batches, fit_ranges=True)
            score = spearman(mpq.apply(corrected, plan), tokenizer)
            found = mpq.compare(table, plan, BEST if parts else "distance")
            assert found is not None
            size = plan.size()
            rows.append((
                name, "channel" if parts else "layer", f"{size.average_bits:.2f} ({size.total_average_bits:.2f})",
                f"{score:.4f}", f"{found.plan:.4f} / {found.uniform or float('nan'):.4f}",
                "worse than uniform" if found.worse else "",
            ))  # fmt: skip
    columns = ("sensitivity", "widths per", "bits (in total)", "Spearman", "predicted / uniform", "guard")
    Console(width=120, highlight=False).print(grid("all-MiniLM-L6-v2, 36 linear layers", columns, rows, left=2))


def sentence_pairs() -> list[list[str]]:
    with PAIRS.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def calibration_sentences() -> list[str]:
    """256 sentences of the odd pairs, from short to long."""
    return sorted((sentence for row in sentence_pairs()[1::2][:128] for sentence in row[:2]), key=len)


def spearman(net: nn.Module, tokenizer: object) -> float:
    """Spearman's correlation of cosine similarity and judgement on the even pairs."""
    pairs = sentence_pairs()[::2]
    first, second = (embed(net, tokenizer, [row[side] for row in pairs]) for side in (0, 1))
    return float(spearmanr(F.cosine_similarity(first, second).numpy(), [float(row[2]) for row in pairs]).statistic)


def tokens(tokenizer: object, sentences: list[str]) -> dict[str, Tensor]:
    made = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")  # type: ignore[operator]
    return dict(made)


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the token embeddings, (sentences, 384)."""
    mask = batch["attention_mask"].unsqueeze(-1)
    total: Tensor = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return total


def measured(model: nn.Module, batches: list[dict[str, Tensor]], few: list[dict[str, Tensor]]) -> mpq.LayerTable:
    start = time.perf_counter()
    table = mpq.measure(model, SCHEME, BITS, per_channel=True, only=["encoder.layer*"])
    table = mpq.sensitivity(model, table, "output_mse", batches, fit_ranges=True)
    table = mpq.sensitivity(model, table, "distance", few, output=embedding, fit_ranges=True)
    print(f"measured in {time.perf_counter() - start:.0f} s")
    return table


def budget(table: mpq.LayerTable, average: float, sensitivity: str, parts: bool) -> mpq.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpq.PlanWarning)  # the table shows what the guard says
        return mpq.Budget(average_bits=average, sensitivity=sensitivity, bits=tuple(BITS), parts=parts)(table)


if __name__ == "__main__":
    main()
