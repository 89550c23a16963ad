"""How long Budget takes where channel-to-part maps count, and how far from the optimum its plans are at most.

    python -m tests.benchmarks.bench_budget_total

The CIFAR-10 ResNets per channel, sizes in total with other candidates, pins, ends, ties and limits beside them.
"""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import mpq_plugins as mpq
from examples.cifar_resnet import resnet

AFFINE = mpq.Affine(granularity="per_channel", range="mse")
FROM_TWO = tuple(range(2, 9))


def main() -> None:
    warnings.simplefilter("ignore", mpq.errors.PlanWarning)
    print("| net | limits | objective | gap | CPU-s |\n|---|---|---|---|---|")
    for depth in (20, 56):
        affine = mpq.measure(resnet(depth), AFFINE, range(1, 9), per_channel=True)
        for settings in affine_settings(depth):
            report(f"ResNet-{depth}", affine, settings)
        regions = mpq.measure(resnet(depth), mpq.Piecewise(granularity="per_channel"), FROM_TWO, per_channel=True)
        for size in (120_000, 150_000) if depth == 20 else (400_000,):
            report(f"ResNet-{depth}, piecewise", regions, {"size_bytes": size, "bits": FROM_TWO})


def affine_settings(depth: int) -> Iterator[dict[str, Any]]:
    """Limits with maps, alone and with what else a plan may be asked for."""
    for size in (60_000, 90_000, 120_000, 160_000) if depth == 20 else (200_000, 300_000, 400_000):
        yield {"size_bytes": size}
    yield {"total_average_bits": 2.6}
    yield {"total_average_bits": 3.5, "bits": FROM_TWO}
    yield {"total_average_bits": 3.2, "bits": (1, 2, 3, 4)}
    yield {"total_average_bits": 4.0, "bits": (2, 4, 8)}
    yield {"total_average_bits": 3.0, "pin": ("conv1=8",)}
    yield {"total_average_bits": 3.0, "ends": 8}
    yield {"total_average_bits": 3.0, "tie": ("layer1.*.conv{1,2}",)}
    yield {"total_average_bits": 3.2, "average_bits": 3.05}
    if depth == 20:
        yield {"size_bytes": 104_000, "weights_only_bytes": 100_000, "total_average_bits": 3.2}
        yield {"size_bytes": 120_000, "bits": (1, 2, 3, 4), "pin": ("conv1=8",)}


def report(net: str, table: mpq.LayerTable, settings: dict[str, Any]) -> None:
    """One row."""
    start = time.process_time()
    found = mpq.Budget(**settings).solve(table)
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    print(f"| {net} | {said} | {found.objective:.6g} | {found.gap:.4%} | {time.process_time() - start:.2f} |")


if __name__ == "__main__":
    main()
