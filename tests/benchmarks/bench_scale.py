"""Planning from large checkpoints: time, rate and peak memory against their size, as ratios within one run.

    python -m tests.benchmarks.bench_scale [--folder FOLDER] [--models 1b 7b]

Checkpoints are made by llm.py (FOLDER keeps them). Files are read once before, so that all of them come from the page
cache where it can hold them. Each measurement runs in a process of its own, which also times the compiled kernel on
data in memory just before and after; what a process needs includes Python, torch and numba. The straightforward loop
is the paper's: whole tensors, one bit-width after the other, in torch.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import mpq_plugins as mpq
from mpq_plugins.allocation.budget import Budget
from mpq_plugins.plans.affine import Affine
from mpq_plugins.quantization.kernel import error_sums, row_stats
from mpq_plugins.quantization.quantize import choose_grids
from mpq_plugins.report.tables import grid
from tests.benchmarks import llm
from tests.benchmarks.bench_measure import one

BITS = range(2, 9)
SCHEME = Affine(granularity="per_channel")
LOOP_WEIGHTS = 300_000_000  # of which the straightforward loop is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(llm.MODELS), default=["1b", "7b-8blocks", "8x7b-2blocks", "7b"]
    )
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(Path(options.child[0]), int(options.child[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        paths = {name: made(name, folder) for name in options.models}
        made("small", folder)
        report(paths, options.repeats)


def made(name: str, folder: Path) -> Path:
    path = folder / name
    return path if path.is_dir() else llm.write(name, path)


def report(paths: dict[str, Path], repeats: int) -> None:
    out = Console(width=150, highlight=False)
    sizes = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in paths.items()}
    cats = {name: cat_seconds(path, repeats) for name, path in paths.items()}
    # In turn, so that whatever else the machine does falls on all of them.
    runs = [
        {(name, workers): child(path, workers) for name, path in paths.items() for workers in (1, 2)}
        for _ in range(repeats)
    ]

    def median(what: Callable[[dict[tuple[str, int], dict[str, float]]], float]) -> float:
        return statistics.median(map(what, runs))

    rows = []
    for name, size in sizes.items():
        seconds = median(lambda run: run[name, 2]["seconds"])  # noqa: B023
        share = median(lambda run: run[name, 2]["share"])  # noqa: B023
        faster = median(lambda run: run[name, 1]["seconds"] / run[name, 2]["seconds"])  # noqa: B023
        peak = max(run[name, workers]["peak"] for run in runs for workers in (1, 2))
        rows.append(
            (
                name, f"{size / 1e9:.2f}", f"{cats[name]:.2f} s", f"{seconds:.2f} s", f"{size / seconds / 1e9:.2f}",
                f"{share:.0%}", f"{faster:.2f}x", f"{peak:.0f} MB",
            )
        )  # fmt: skip
    columns = (
        "checkpoint", "GB", "cat", "two workers", "GB/s", "of the kernel's rate", "against one worker", "peak memory",
    )  # fmt: skip
    out.print(grid("7 bit-widths, per channel, bfloat16, files cached", columns, rows))
    first, *others = sizes
    for name in others:
        slope = median(lambda run: run[name, 2]["seconds"] / sizes[name] / run[first, 2]["seconds"] * sizes[first])  # noqa: B023
        out.print(f"seconds per byte, {name} against {first}: {slope:.3f}")
    out.print(loop(paths[first], median(lambda run: run[first, 2]["seconds"]) / sizes[first]))
    out.print(allocation(paths[list(paths)[-1]]))


def cat_seconds(path: Path, repeats: int) -> float:
    """The median, after a first time that brings the files into the page cache."""
    files = sorted(str(file) for file in path.glob("*.safetensors"))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with Path("/dev/null").open("wb") as nowhere:
            subprocess.run(["cat", *files], stdout=nowhere, check=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)


def child(path: Path, workers: int) -> dict[str, float]:
    """A measurement in a process of its own, of files that are in the page cache whatever was read since."""
    cat_seconds(path, 1)  # twice, for a page's second reading takes longer: it is marked as one to keep
    command = [sys.executable, "-m", "tests.benchmarks.bench_scale", "--child", str(path), str(workers)]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def measured(path: Path, workers: int) -> dict[str, float]:
    """Seconds and peak memory of one measurement, and its rate as a share of the kernel's on data in memory."""
    torch.set_num_threads(2)
    mpq.measure(path.parent / "small", SCHEME, BITS)  # compiled, and warm
    with ThreadPoolExecutor(workers) as executor:
        before = kernel_rate(executor, workers)
        start = time.perf_counter()
        table = mpq.measure(path, SCHEME, BITS, executor=executor)
        seconds = time.perf_counter() - start
        kernel = (before + kernel_rate(executor, workers)) / 2
    rate = sum(layer.numel for layer in table.layers) / seconds
    return {"seconds": seconds, "peak": peak_megabytes(), "share": rate / kernel}


def kernel_rate(executor: ThreadPoolExecutor, workers: int, seconds: float = 1.0) -> float:
    """Weights per second through both passes of the kernel, on a chunk in memory for each worker."""
    chunks = [torch.randn(512, 4096).to(torch.bfloat16) for _ in range(workers)]
    end = time.perf_counter() + seconds
    start = time.perf_counter()
    done = sum(executor.map(partial(until, end), chunks))
    return done / (time.perf_counter() - start)


def until(end: float, rows: Tensor) -> int:
    done = 0
    while time.perf_counter() < end:
        grids = choose_grids(lambda op: op(rows), row_stats(rows), list(BITS), SCHEME)
        error_sums(rows, grids)
        done += rows.numel()
    return done


def peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def loop(path: Path, ours: float) -> str:
    """The straightforward loop's rate on some of the tensors."""
    torch.set_num_threads(2)
    start, done = time.perf_counter(), 0
    for _, weight in itertools.islice(mpq.iter_weights(path), 1, None):
        for bits in BITS:
            one(weight.float(), bits)
        done += weight.numel()
        if done > LOOP_WEIGHTS:
            break
    seconds = (time.perf_counter() - start) / (2 * done)
    return (
        f"the straightforward loop, on {done / 1e6:.0f} M weights: {1 / seconds / 1e9:.3f} GB/s, {seconds / ours:.1f}x"
    )


def allocation(path: Path) -> str:
    """Exact per-layer budgets on the table of a checkpoint, and per channel."""
    torch.set_num_threads(2)
    table = mpq.measure(path, SCHEME, BITS, ("mse",), per_channel=True, skip=["role:embeddings", "role:lm_head"])
    said = []
    for parts in (False, True):
        budget = Budget(average_bits=3.0, bits=tuple(BITS), parts=parts)
        start = time.perf_counter()
        found = budget.solve(table)
        took = time.perf_counter() - start
        said.append(f"per {'channel' if parts else 'layer'} {took:.1f} s, gap {found.gap:.0e}")
    channels = sum(layer.channels for layer in table.layers)
    return (
        f"{path.name}: budgets of 3 bits over {len(table.layers)} layers, {channels / 1e6:.2f} M channels: "
        f"{', '.join(said)}; {peak_megabytes():.0f} MB"
    )


if __name__ == "__main__":
    main()
