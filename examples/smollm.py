"""A language model by types: uniform against Budget at the same bits in total, as its users would run it.

    python -m examples.smollm [--bits 3 3.5 4 4.5] [--windows 16] [--calibration 16] [--compensated] [--mlx]
        [--llama DIR]

SmolLM2-135M-Instruct (examples/smollm_model.py says what its weights are): 211 layers, the embedding is the head too.
Types are full-range symmetric integers of 2 to 8 bits with 16-bit scales for every 32 or 64 weights. Perplexity on
windows of 256 tokens of Acts (King James Version); Fisher information is measured on windows of Luke. With --mlx and
--transformers Budget's plans are exported, and their logits compared with the simulation's (examples/smollm_packed.py).
With --llama, llama.cpp's own mixtures stand beside Budget at no more bytes (examples/smollm_llama.py).
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.smollm_model import ACTS, LUKE, batches_of, need_model, perplexity, smollm, windows
from mpq_plugins.report.tables import grid

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64)
TYPES = tuple(f"int{bits}_g{size}" for size in GROUPS for bits in WIDTHS)
SENSITIVITIES = ("mse", "fisher")
PACKED = 32  # tokens that mlx-lm computes on a CPU, a second each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.0, 4.5])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=24)
    parser.add_argument("--compensated", action="store_true", help="round each plan by mpq.compensate too: slow")
    parser.add_argument("--mlx", action="store_true", help="run plans packed by mlx-lm too")
    parser.add_argument("--transformers", action="store_true", help="run plans as compressed-tensors too")
    parser.add_argument("--llama", type=Path, help="folder of llama-quantize and llama-perplexity (make llama)")
    options = parser.parse_args()
    need_model(parser)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model, tokenizer = smollm()
    evaluated = windows(tokenizer, ACTS, options.windows)
    calibrated = batches_of(windows(tokenizer, LUKE, options.calibration))
    print(f"float: perplexity {perplexity(model, evaluated):.2f} on {evaluated.numel():,} tokens", flush=True)
    types = with_fisher(model, mpq.measure_types(model, TYPES), calibrated)
    ways: list[tuple[str, Callable[[mpq.Plan], nn.Module]]] = [("nearest", lambda plan: mpq.apply(model, plan))]
    if options.compensated:
        ways.append(("compensated", lambda plan: mpq.apply(compensated(model, plan, calibrated), plan)))
    rows = []
    for name, plan in (*uniform(types), *budgets(types, options.bits)):
        for rounding, made in ways:
            row = (name, bits_of(plan), rounding, f"{perplexity(made(plan), evaluated):.2f}")
            print(*row, flush=True)
            rows.append(row)
    show("SmolLM2-135M, integers in groups", ("plan", "bits in total", "rounding", "perplexity"), rows)
    for _, plan in budgets(types, options.bits, SENSITIVITIES[-1:]):
        if options.mlx:
            in_mlx(model, plan, evaluated[:1, :PACKED])
        if options.transformers:
            in_transformers(model, plan, evaluated[:4])
    if options.llama is not None:
        against_llama(model, options.llama, calibrated, options.windows)


def compensated(model: nn.Module, plan: mpq.Plan, batches: Sequence[Tensor]) -> nn.Module:
    """As a checkpoint of a causal language model holds it, which has no place for biases."""
    return mpq.compensate(model, plan, batches, new_biases=False, outliers="shorten")


def with_fisher(model: nn.Module, table: mpq.TypeTable, batches: Sequence[Tensor]) -> mpq.TypeTable:
    started = time.perf_counter()
    measured = mpq.sensitivity(model, table, "fisher", batches)
    print(f"fisher as {len(table.types)} types: {time.perf_counter() - started:.0f} s", flush=True)
    return measured


def uniform(types: mpq.TypeTable) -> Iterator[tuple[str, mpq.Plan]]:
    """One type for all layers."""
    for name in ("int3_g64", "int3_g32", "int4_g64", "int4_g32"):
        table = types.column(name).table
        yield f"uniform {name}", mpq.Uniform(bits=table.bits[0])(table)


def budgets(
    types: mpq.TypeTable, bits: Sequence[float], sensitivities: Sequence[str] = SENSITIVITIES
) -> Iterator[tuple[str, mpq.Plan]]:
    for average in bits:
        for name in sensitivities:
            yield f"budget, {name}", mpq.Budget(total_average_bits=average, sensitivity=name)(types)


def in_mlx(model: nn.Module, plan: mpq.Plan, given: Tensor) -> None:
    from examples import smollm_packed

    print(f"MLX, {bits_of(plan)} bits:", smollm_packed.in_mlx(model, plan, given), flush=True)


def in_transformers(model: nn.Module, plan: mpq.Plan, given: Tensor) -> None:
    from examples import smollm_packed

    found = smollm_packed.in_transformers(model, plan, given)
    print(f"compressed-tensors, planned for {bits_of(plan)} bits:", found, flush=True)


def against_llama(model: nn.Module, folder: Path, batches: Sequence[Tensor], windows: int) -> None:
    """llama.cpp's mixtures, and Budget over the types of GGUF that hold our codes, at their bytes."""
    from examples import smollm_llama

    types = with_fisher(model, mpq.measure_types(model, smollm_llama.TYPES), batches)
    rows = []
    for file in smollm_llama.beside_mixtures(types, folder, windows):
        print(file, flush=True)
        bits = f"{8 * file.matrix_bytes / weights(types):.3f}"
        rows.append((file.name, f"{file.matrix_bytes:,}", bits, file.perplexity))
    columns = ("file", "bytes of matrices", "bits in total", "perplexity by llama-perplexity")
    show("SmolLM2-135M by llama.cpp at the same bytes", columns, rows)


def weights(types: mpq.TypeTable) -> int:
    return sum(layer.numel for layer in types.base.layers)


def bits_of(plan: mpq.Plan) -> str:
    return f"{plan.size().total_average_bits:.3f}"


def show(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    Console(width=110, highlight=False).print(grid(title, columns, rows, left=1))


if __name__ == "__main__":
    main()
