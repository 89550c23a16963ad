"""MixQuant and uniform plans on pretrained CIFAR-10 ResNets: true sizes, accuracy, cross-entropy.

    python -m examples.mixquant_resnet [--depth 20 56] [--granularity per_tensor]

Accuracy on 846 test images (one image is 0.12 points; read cross-entropy beside it). The networks and images are
looked for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import mpq_plugins as mpq
from examples.cifar_resnet import checkpoint, evaluate, images, need_networks, resnet
from mpq_plugins.report.tables import bytes_text, grid

QEMS = (1.5, 2.0, 3.0, 3.5, 4.0)
UNIFORM = (8, 7, 6, 5, 4, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20, 56])
    parser.add_argument("--granularity", choices=("per_tensor", "per_channel"), default="per_tensor")
    options = parser.parse_args()
    torch.set_num_threads(2)
    need_networks(parser)
    for depth in options.depth:
        report(depth, mpq.Affine(granularity=options.granularity))


def report(depth: int, scheme: mpq.Affine) -> None:
    start = time.perf_counter()
    table = mpq.measure(checkpoint(depth), scheme, metrics=("relative", "mse"))
    seconds = time.perf_counter() - start
    net, (inputs, labels) = resnet(depth), images()
    accuracy, loss = evaluate(net, inputs, labels)
    rows: list[tuple[object, ...]] = [("float", "32", "", "", "", f"{accuracy:.2f}", f"{loss:.3f}")]
    allocators: list[tuple[str, mpq.Allocator]] = [(f"uniform {b}", mpq.Uniform(bits=b)) for b in UNIFORM]
    mixed = [mpq.MixQuant(qem=qem) for qem in QEMS] + [mpq.MixQuant(qem=qem, metric="mse") for qem in QEMS[-3:]]
    allocators += [(f"MixQuant {one.metric} {one.qem:g}", one) for one in mixed]
    for name, allocator in allocators:
        plan = allocator(table)
        quantized = mpq.apply(net, plan)
        mpq.verify(quantized, plan, original=net)
        rows.append((name, *describe(plan, table), *figures(*evaluate(quantized, inputs, labels))))
    columns = ("plan", "bits a weight", "in total", "mean relative error", "bits: layers", "top-1 %", "cross-entropy")
    title = f"ResNet-{depth}, {scheme}, measured in {seconds:.2f} s from {Path(checkpoint(depth)).name}"
    Console(width=130, highlight=False).print(grid(title, columns, rows))


def describe(plan: mpq.Plan, table: mpq.LayerTable) -> tuple[str, str, str, str]:
    size = plan.size()
    errors = [table.error(layer, "relative", plan.by_name[layer.name].bits or 8) for layer in table.layers]
    counts = sorted(Counter(layer.bits for layer in plan.layers).items(), key=str)
    return (
        f"{size.average_bits:.2f}",
        bytes_text(size.total_bytes),
        f"{np.mean(errors):.2f}",
        " ".join(f"{bits}:{count}" for bits, count in counts),
    )


def figures(accuracy: float, loss: float) -> tuple[str, str]:
    return f"{accuracy:.2f}", f"{loss:.3f}"


if __name__ == "__main__":
    main()
