"""How long Budget takes, per layer and per channel, how long PTILMPQ, and what replaying saves when KL is measured.

    python -m tests.benchmarks.bench_allocate

Layers of ResNet-152, channels of ResNet-50 and ResNet-152, and 1.36 million channels, as a 7 B transformer has. Costs
fall by about four a bit, with layers and channels that differ as log-normals do. Then ResNet-56 if it is there: KL on
256 images, from the changed layer on and, on one batch, by full runs.
"""

import math
import resource
import time

import numpy as np
import torch
from numpy.typing import NDArray

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, checkpoint, resnet
from mpq_plugins.allocation.knapsack import Problem, solve
from mpq_plugins.measurement.replay import Replay
from tests.benchmarks.shapes import ARCHITECTURES, Shapes

BITS = np.arange(1, 9)
AVERAGES = (2.0, 3.0, 4.0)


def main() -> None:
    torch.set_num_threads(2)
    table = measured_numbers(ARCHITECTURES["ResNet-152"]())
    start = time.perf_counter()
    for average in AVERAGES:
        found = mpq.Budget(average_bits=average, parts=False).solve(table)
        print(f"ResNet-152, {len(table.layers)} layers, {average:g} bits: {since(start)}, gap {found.gap:.1e}")
        start = time.perf_counter()
    start = time.perf_counter()
    mpq.PTILMPQ()(table)
    mpq.PTILMPQ(average_bits=5.2)(table)
    print(f"PTILMPQ of ResNet-152, by alpha and by average bits: {since(start)}")
    for name in ("ResNet-50", "ResNet-152"):
        table = measured_numbers(ARCHITECTURES[name]())
        for average in AVERAGES:
            start = time.perf_counter()
            found = mpq.Budget(average_bits=average).solve(table)
            channels = sum(layer.channels for layer in table.layers)
            print(f"{name}, {channels:,} channels, {average:g} bits: {since(start)}, gap {found.gap:.1e}")
    large_model()
    if checkpoint(56).exists():
        kl()


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.2f} s"


def measured_numbers(shapes: Shapes) -> mpq.LayerTable:
    """A table of these shapes."""
    random = np.random.default_rng(0)
    layers = []
    for position, shape in enumerate(shapes):
        channels, per = shape[0], math.prod(shape[1:])
        errors = curves(random, np.exp(random.normal(0, 1) + random.normal(0, 0.7, channels)))
        layers.append(
            mpq.LayerStats(
                f"layer{position}", "conv2d", shape, 0, 1.0, np.ones(channels), {"mse": errors.mean(1)},
                {"mse": errors}, macs=per * channels,
            )
        )  # fmt: skip
    scheme = mpq.Affine(granularity="per_channel", range="mse")
    return mpq.LayerTable(tuple(layers), scheme, tuple(BITS.tolist()), ("mse",), False, "sha256:made")


def curves(random: np.random.Generator, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors (bits, items) that fall by about four a bit."""
    errors = scale * 4.0 ** -BITS[:, None] * np.exp(random.normal(0, 0.1, (len(BITS), scale.size)))
    falling: NDArray[np.float64] = -np.sort(-errors, axis=0)
    return falling


def large_model() -> None:
    """The rows of a 7 B transformer's linear layers."""
    sizes = np.array([4096] * (32 * (4 * 4096 + 2 * 11008)) + [11008] * (32 * 4096), np.float64)
    random = np.random.default_rng(0)
    costs = curves(random, np.exp(random.normal(0, 1.5, sizes.size)) * sizes)
    problem = Problem(costs, (BITS[:, None] * sizes)[None], np.array([3.0 * sizes.sum()]))
    start = time.perf_counter()
    found = solve(problem)
    assert found is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{sizes.size:,} channels, 3 bits: {since(start)}, gap {found.gap:.1e}, peak memory {peak:.2f} GB")


def kl() -> None:
    """KL of ResNet-56 at 7 bit-widths on 256 images, and what replaying saves."""
    net = resnet(56)
    table = mpq.measure(net, mpq.Affine(granularity="per_channel"), range(2, 9))
    batches = calibration()[:2]
    start = time.perf_counter()
    mpq.sensitivity(net, table, "kl", batches)
    print(f"KL of ResNet-56, {len(table.layers)} layers x 7 widths x 256 images: {since(start)}")
    replay = Replay(net, lambda: net(batches[0]))
    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    start = time.perf_counter()
    for module in convolutions:
        replay.again([module])
    replayed = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        for _ in convolutions:
            net(batches[0])
    full = time.perf_counter() - start
    print(f"one width of each layer, 128 images: replayed {replayed:.1f} s, full {full:.1f} s: {full / replayed:.2f}x")


if __name__ == "__main__":
    main()
