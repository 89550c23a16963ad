"""BRECQ on a transformer: all-MiniLM-L6-v2's encoder layers as blocks, under uniform and Budget's plans.

    python -m examples.brecq_minilm [--steps 500] [--bits 3 2]

The 36 linear layers of the encoder, per output row, clipped by squared error. Calibration: 256 sentences of the odd
pairs of STS-B dev, in batches of like length; evaluation: Spearman's correlation on the 750 even pairs.
"""

import argparse
import time

import torch
from rich.console import Console
from torch import nn

import mpq_plugins as mpq
from examples.budget_minilm import calibration_sentences, embedding, spearman, tokens
from examples.minilm_torchao import PAIRS, minilm
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
COLUMNS = ("plan", "bits", "in total", "to nearest", "biases corrected", "BRECQ", "blocks at nearest", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="for each encoder layer")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    options = parser.parse_args()
    torch.set_num_threads(2)
    if not PAIRS.exists():
        parser.exit(2, f"no sentence pairs at {PAIRS}; set MPQ_ZOO to the folder that holds stsb\n")
    model, tokenizer = minilm()
    sentences = calibration_sentences()
    batches = [tokens(tokenizer, sentences[i : i + 32]) for i in range(0, 256, 32)]
    table = mpq.measure(model, SCHEME, range(1, 7), only=["encoder.layer*"])
    few = [tokens(tokenizer, sentences[i : i + 32 : 3]) for i in range(0, 256, 96)]
    table = mpq.sensitivity(model, table, "distance", few, output=embedding)

    def shown(net: nn.Module) -> str:
        return f"{spearman(net, tokenizer):.4f}"

    rows = [("float", "32", "32", shown(model), "", "", "", "")]
    for bits in options.bits:
        best = mpq.Budget(average_bits=bits, sensitivity="distance", bits=tuple(range(1, 7)), parts=False)
        for name, plan in ((f"uniform {bits}", mpq.Uniform(bits=bits)(table)), (f"Budget {bits}", best(table))):
            kept: list[mpq.BlockReport] = []
            start = time.perf_counter()
            learned = mpq.reconstruct(model, plan, batches, steps=options.steps, finished=kept.append)
            seconds, size = time.perf_counter() - start, plan.size()
            mpq.verify(learned, plan, learned)
            rows.append((
                name, f"{size.average_bits:.2f}", f"{size.total_average_bits:.2f}", shown(mpq.apply(model, plan)),
                shown(mpq.apply(model, plan, calibrate=batches, rounding="nearest")), shown(learned),
                str(sum(block.learned >= block.nearest for block in kept)), f"{seconds:.0f}",
            ))  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    title = f"all-MiniLM-L6-v2, {options.steps} steps an encoder layer: Spearman"
    Console(width=120, highlight=False).print(grid(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
