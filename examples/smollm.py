"""A language model by types: uniform against Budget at the same bits in total, as its users would run it.

    python -m examples.smollm [--bits 3 3.5 4 4.5] [--windows 16] [--calibration 16] [--compensated] [--mlx]
        [--llama DIR]

SmolLM2-135M-Instruct (examples/smollm_model.py says what its weights are): 211 layers, the embedding is the head too.
Types are full-range symmetric integers of 2 to 8 bits with 16-bit scales for every 32 or 64 weights. Perplexity on
windows of 256 tokens of Acts (King James Version); Fisher information is measured on windows of Luke. With --llama, a
folder that holds llama-quantize, llama.cpp's own mixtures beside Budget over ggml's types at no more bytes, each
dequantized and run in float.
"""

import argparse
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.smollm_model import ACTS, LUKE, batches_of, gguf_file, need_model, perplexity, smollm, windows
from mpq_plugins.report.tables import grid

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64)
TYPES = tuple(f"int{bits}_g{size}" for size in GROUPS for bits in WIDTHS)
SENSITIVITIES = ("mse", "fisher")
GGML = ("q2_k", "q3_k", "q4_0", "q4_k", "iq4_xs", "iq4_nl", "q5_0", "q5_k", "q6_k", "q8_0")
"""Without q4_1 and q5_1, which hold the weights of a file of Q4_1 as they are."""
MIXTURES = ("q3_k_m", "q4_k_m")
Row = tuple[str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.0, 4.5])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=24)
    parser.add_argument("--compensated", action="store_true", help="round each plan by mpq.compensate too: slow")
    parser.add_argument("--mlx", action="store_true", help="run the first plan packed, by mlx-lm, too")
    parser.add_argument("--llama", type=Path, help="folder of llama-quantize, for llama.cpp's own mixtures")
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
        ways.append(("compensated", lambda plan: mpq.apply(mpq.compensate(model, plan, calibrated), plan)))
    rows = []
    for name, plan in (*uniform(types), *budgets(types, options.bits)):
        for rounding, made in ways:
            row = (name, bits_of(plan), rounding, f"{perplexity(made(plan), evaluated):.2f}")
            print(*row, flush=True)
            rows.append(row)
    show("SmolLM2-135M, integers in groups", ("plan", "bits in total", "rounding", "perplexity"), rows)
    if options.llama is not None:
        against_llama(model, options.llama, calibrated, evaluated)
    if options.mlx:
        packed(model, next(budgets(types, options.bits[:1], SENSITIVITIES[-1:]))[1], evaluated)


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


def against_llama(model: nn.Module, folder: Path, batches: Sequence[Tensor], evaluated: Tensor) -> None:
    """llama.cpp's mixtures, and Budget over ggml's types at their bytes."""
    types = with_fisher(model, mpq.measure_types(model, GGML), batches)
    rows: list[Row] = []
    for mixture in MIXTURES:
        mixed, size = mixture_of(model, folder, mixture)
        bits, score = f"{8 * size / weights(types):.3f}", perplexity(mixed, evaluated)
        rows.append((f"llama.cpp {mixture}", bits, "ggml", f"{score:.2f}"))
        for name in SENSITIVITIES:
            plan = mpq.Budget(size_bytes=size, sensitivity=name)(types)
            score = perplexity(mpq.apply(model, plan), evaluated)
            rows.append((f"budget over ggml's types, {name}", bits_of(plan), "ggml", f"{score:.2f}"))
        for row in rows[-3:]:
            print(*row, flush=True)
    show("SmolLM2-135M, ggml's types at the same bytes", ("plan", "bits in total", "rounding", "perplexity"), rows)


def mixture_of(model: nn.Module, folder: Path, mixture: str) -> tuple[nn.Module, int]:
    """The model with the weights of llama.cpp's own mixture, and the bytes of its matrices."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / f"{mixture}.gguf"
        command = [folder / "llama-quantize", "--allow-requantize", gguf_file(), written, mixture]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        mixed: nn.Module = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=written.name, dtype=torch.float32)
        return mixed.eval(), matrix_bytes(written)


def matrix_bytes(path: Path) -> int:
    """Bytes of a GGUF file's matrices."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)


def packed(model: nn.Module, plan: mpq.Plan, evaluated: Tensor) -> None:
    """The plan as an MLX checkpoint, run packed, against its simulation."""
    from examples.smollm_mlx import mlx_perplexity

    simulated = perplexity(mpq.apply(model, plan), evaluated)
    print(
        f"{bits_of(plan)} bits, simulated {simulated:.3f}, packed in MLX {mlx_perplexity(model, plan, evaluated):.3f}"
    )


def weights(types: mpq.TypeTable) -> int:
    return sum(layer.numel for layer in types.base.layers)


def bits_of(plan: mpq.Plan) -> str:
    return f"{plan.size().total_average_bits:.3f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    Console(width=110, highlight=False).print(grid(title, columns, rows, left=1))


if __name__ == "__main__":
    main()
