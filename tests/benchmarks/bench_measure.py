"""Speed and memory of measuring, as ratios within one run: `make bench`.

The straightforward loop is the paper's: per bit-width, quantize, dequantize and take both errors of the whole
tensor, in torch, with the same number of threads. Each pair of timings is taken back to back, several times, and
the median ratio is reported, for the machine may not be quiet.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.report.tables import grid
from tests.benchmarks.shapes import ARCHITECTURES

BITS = range(2, 9)
QEMS = tuple(1.1 + 0.3 * i for i in range(10))


class Layers(nn.Module):
    """Seeded normal weights in given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for position, shape in enumerate(shapes):
            layer = nn.Conv2d(1, 1, 1) if len(shape) == 4 else nn.Linear(1, 1)
            layer.weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.05)
            self.add_module(f"layer{position}", layer)


def straightforward(weights: list[Tensor]) -> list[list[tuple[float, float]]]:
    """Relative error and MSE of every weight at every bit-width."""
    return [[one(weight, bits) for bits in BITS] for weight in weights]


def one(weight: Tensor, bits: int) -> tuple[float, float]:
    low, high = weight.min().clamp(max=0), weight.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero_point = torch.round(-low / scale)
    codes = torch.clamp(torch.round(weight / scale) + zero_point, 0, 2**bits - 1)
    error = weight - (codes - zero_point) * scale
    relative = torch.where(weight != 0, error.abs() / weight.abs(), 0).mean()
    return relative.item(), error.square().mean().item()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(out: Console, names: list[str], repeats: int) -> None:
    rows = []
    for name in names:
        net = Layers(ARCHITECTURES[name]())
        weights = [parameter.detach() for key, parameter in net.named_parameters() if key.endswith("weight")]
        table = mpq.measure(net)  # compiled, and warm
        worst = disagreement(table, straightforward(weights[:3]))
        pairs = [(seconds(lambda: straightforward(weights)), seconds(lambda: mpq.measure(net))) for _ in range(repeats)]  # noqa: B023
        ratio = statistics.median(loop / ours for loop, ours in pairs)
        count = sum(weight.numel() for weight in weights)
        ours = statistics.median(ours for _, ours in pairs)
        loop = statistics.median(loop for loop, _ in pairs)
        rows.append((name, f"{count / 1e6:.1f} M", f"{loop:.2f} s", f"{ours:.3f} s", f"{ratio:.1f}x", f"{worst:.0e}"))
    columns = ("network", "weights", "straightforward loop", "mpq.measure", "faster", "largest disagreement")
    out.print(grid("7 bit-widths, per tensor, relative and mse, two threads", columns, rows))


def disagreement(table: mpq.LayerTable, reference: list[list[tuple[float, float]]]) -> float:
    """The largest relative difference from the loop, whose sums are in float32."""
    return max(
        abs(table.error(layer, metric, bits) / by_bits[bits - 2][m] - 1)
        for layer, by_bits in zip(table.layers, reference, strict=False)
        for bits in BITS
        for m, metric in enumerate(("relative", "mse"))
    )


def many_qems(out: Console, repeats: int) -> None:
    net = Layers(ARCHITECTURES["ResNet-50"]())

    def plans(qems: tuple[float, ...]) -> None:
        table = mpq.measure(net)
        for qem in qems:
            mpq.MixQuant(qem=qem)(table)

    plans(QEMS)
    ratios = [seconds(lambda: plans(QEMS)) / seconds(lambda: plans(QEMS[:1])) for _ in range(3 * repeats)]
    table = mpq.measure(net)
    alone = [seconds(lambda: [mpq.MixQuant(qem=qem)(table) for qem in QEMS[1:]]) for _ in range(repeats)]
    measuring = [seconds(lambda: mpq.measure(net)) for _ in range(repeats)]
    share = 1 + statistics.median(alone) / statistics.median(measuring)
    out.print(
        f"ResNet-50, ten QEMs against one: {statistics.median(ratios):.3f}x (median of {len(ratios)} pairs); "
        f"by parts {share:.3f}x"
    )


MEMORY = """
import sys, torch
torch.set_num_threads(2)
import mpq_plugins as mpq
from safetensors.torch import save_file
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
small = sys.argv[2]
mpq.measure(small)  # libraries loaded and code compiled
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = status("VmRSS")
mpq.measure(sys.argv[1])
print(status("VmHWM") - before)
"""


def memory(out: Console, gigabytes: float, shape: tuple[int, int]) -> None:
    """Peak resident memory added by measuring a bfloat16 file, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        count = max(1, round(gigabytes * 1e9 / (2 * shape[0] * shape[1])))
        one_tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        big, small = Path(folder) / "big.safetensors", Path(folder) / "small.safetensors"
        save_file({f"layers.{i}.weight": one_tensor.clone() for i in range(count)}, big)
        save_file({"layer.weight": one_tensor[:64].clone()}, small)
        took = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(big), str(small)], capture_output=True, text=True, check=True
        )
        took = time.perf_counter() - took
        size = big.stat().st_size
    out.print(
        f"{size / 1e9:.2f} GB of bfloat16 in {count} tensors of {shape[0]} x {shape[1]}: "
        f"{float(done.stdout):.0f} MiB of resident memory added at the peak, {took:.1f} s with start-up"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    out = Console(width=120, highlight=False)
    speed(out, options.networks, options.repeats)
    many_qems(out, options.repeats)
    memory(out, options.gigabytes, (4096, 4096))
    memory(out, options.gigabytes, (128_256, 8192))


if __name__ == "__main__":
    main()
