"""PTILMPQ's first three experiments and an open question on pretrained ResNets (arXiv 2404.02947), with true sizes.

    python -m examples.ptilmpq_resnet [--depth 20 56] [--experiment 1 2 3 4]

1. Theoretical against actual size at alpha = beta = 0.5: what the shares promise, what the plan says, what packed
   codes take on disk.
2. alpha from 0.1 to 0.9: size, error, accuracy.
3. Two regions against one uniform quantizer at the same true size, the bit that tells the interval included.
4. Ternary and binary widths for what is not important (its third open question), at its alpha and beta: channels, or
   channels of other layers alone, rounded to nearest, corrected and compensated on 1,024 training images. Ternary is
   2 bits of the symmetric scheme, -s, 0 and s; binary 1 bit, -s and s; s is that of least squared error.

Accuracy on 846 test images (one image is 0.12 points; read cross-entropy beside it). The networks and images are
looked for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import mpq_plugins as mpq
from examples.cifar_resnet import ResNet, calibration, evaluate, images, need_networks, resnet, score
from mpq_plugins.compression.bitpack import pack
from mpq_plugins.evaluation.sweep import sweep
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.layers import LayerChoice, Part
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization.piecewise import PiecewiseTensor, quantize
from mpq_plugins.report.sweep import sweep_notes, sweep_table
from mpq_plugins.report.tables import bytes_text, grid

TWO_REGIONS = mpq.Piecewise(granularity="per_channel")
SCHEMES: dict[str, Scheme] = {
    "uniform, min-max": mpq.Affine(granularity="per_channel"),
    "uniform, clipped": mpq.Affine(granularity="per_channel", range="mse"),
    "two regions + bit": TWO_REGIONS,
    "two regions, shared": mpq.Piecewise(granularity="per_channel", storage="shared"),
}
CLIPPED = mpq.Affine(granularity="per_channel", range="mse")
TERNARY = mpq.Affine(granularity="per_channel", range="mse", symmetric=True)
FEW_LEVELS: dict[str, tuple[mpq.Affine, tuple[int, int], tuple[int, int]]] = {
    "3 bits": (CLIPPED, (5, 4), (4, 3)),
    "channels, 2 bits": (CLIPPED, (5, 2), (4, 2)),
    "channels, ternary": (TERNARY, (5, 2), (4, 2)),
    "channels, binary": (TERNARY, (5, 1), (4, 1)),
    "of other layers, 2 bits": (CLIPPED, (5, 4), (4, 2)),
    "of other layers, ternary": (TERNARY, (5, 4), (4, 2)),
    "of other layers, binary": (TERNARY, (5, 4), (4, 1)),
    "other layers, ternary and binary": (TERNARY, (5, 4), (2, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20, 56])
    parser.add_argument("--experiment", type=int, nargs="+", choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(2)
    need_networks(parser)
    out = Console(width=130, highlight=False, markup=False)
    for number in options.experiment:
        (sizes, alphas, intervals, few_levels)[number - 1](options.depth, out)


def sizes(depths: list[int], out: Console) -> None:
    """Theoretical against actual size."""
    rows = []
    for depth in depths:
        net = resnet(depth)
        allocator = mpq.PTILMPQ(alpha=0.5, beta_important=0.5, beta_other=0.5)
        plan = allocator(mpq.measure(net, TWO_REGIONS, allocator.needs.bits))
        promised = np.mean([*allocator.important_bits, *allocator.other_bits])  # every share is one half
        size = plan.size()
        packed, entropy = on_disk(net, plan)
        codes = sum(layer.codes for layer in size.layers.values())
        counts = (promised * size.numel, codes, size.weights_only_bits, size.total_bits, 8 * packed, entropy)
        rows.append((f"ResNet-{depth}", *(f"{bytes_text(round(n / 8))} ({n / size.numel:.3f})" for n in counts)))
    columns = ("net", "theoretical", "codes", "with region bit", "in total", "packed file", "entropy coded")
    out.print(grid("1. Size at alpha = beta = 0.5, bits 5,4 and 4,3: bytes (bits a weight)", columns, rows))
    out.print(
        "Theoretical: the mean of the four widths. Important layers are those with much weight, so codes take more.\n"
    )


def alphas(depths: list[int], out: Console) -> None:
    """Alpha from 0.1 to 0.9."""
    for depth in depths:
        net = resnet(depth)
        table = mpq.measure(net, TWO_REGIONS, per_channel=True)
        plans = [mpq.PTILMPQ(alpha=k / 10)(table) for k in range(1, 10)]
        plans += [mpq.Uniform(bits=b)(table) for b in (3, 4, 5)]
        rows = sweep(table, plans, net, score)
        out.print(sweep_table(rows, f"2. ResNet-{depth}, beta = 0.5, {TWO_REGIONS}"))
        out.print("\n".join(sweep_notes(rows)) + "\n")


def intervals(depths: list[int], out: Console) -> None:
    """Two regions against one, at the same true size."""
    data = images()
    for depth in depths:
        net = resnet(depth)
        rows = []
        for true_bits in (2, 3, 4, 5):
            cells = []
            for scheme in SCHEMES.values():
                bits = true_bits - scheme.interval_bits(true_bits)
                if bits < 2:
                    cells.append("")
                    continue
                plan = mpq.Uniform(bits=bits)(mpq.measure(net, scheme, (bits,)))
                assert plan.size().average_bits == true_bits
                top1, loss = evaluate(mpq.apply(net, plan), *data)
                cells.append(f"{top1:.2f} / {loss:.3f}")
            rows.append((f"{true_bits}", *cells))
        title = f"3. ResNet-{depth}, per channel, every layer alike: top-1 % / cross-entropy"
        out.print(grid(title, ("bits a weight", *SCHEMES), rows))
    out.print("A paper's 'b bits' with two regions stands in the row b + 1: the region bit is stored too.")


def few_levels(depths: list[int], out: Console) -> None:
    """Other channels at 3 bits, 2 bits, three levels and two."""
    data, batches = images(), calibration()
    for depth in depths:
        net, rows = resnet(depth), []
        for name, (scheme, important, other) in FEW_LEVELS.items():
            allocator = mpq.PTILMPQ(important_bits=important, other_bits=other)
            plan = allocator(mpq.measure(net, scheme, allocator.needs.bits))
            rounded = [
                mpq.apply(net, plan),
                mpq.apply(net, plan, calibrate=batches, rounding="nearest"),
                mpq.apply(net, plan, calibrate=batches),
            ]
            scores = [f"{top1:.2f} / {loss:.3f}" for top1, loss in (evaluate(own, *data) for own in rounded)]
            widths = " and ".join(f"{high},{low}" for high, low in (important, other))
            size = plan.size()
            rows.append((name, widths, f"{size.average_bits:.2f} ({file_bits(net, plan):.2f})", *scores))
        columns = ("not important", "widths", "bits (in a file)", "nearest", "corrected", "compensated")
        out.print(grid(f"4. ResNet-{depth}, alpha = beta = 0.5: top-1 % / cross-entropy", columns, rows, left=2))


def file_bits(net: ResNet, plan: mpq.Plan) -> float:
    """Bits a weight of the container, codes entropy coded where that is smaller."""
    with tempfile.TemporaryDirectory() as folder:
        return mpq.compress(net, plan, Path(folder) / "net.mpq").file_bits


def on_disk(net: ResNet, plan: mpq.Plan) -> tuple[int, float]:
    """Bytes of a file with every code, interval bit, unit and part map packed; bits with intervals entropy coded."""
    weights = quantizable_weights(net)
    saved = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.bin"
        with path.open("wb") as file:
            for layer in plan.layers:
                for part in layer.all_parts:
                    tensor = quantized_part(weights[layer.name], layer, part)
                    saved += tensor.interval_bits - tensor.interval_entropy_bits
                    file.write(pack(_flat(tensor.codes), part.bits))
                    file.write(pack(_flat(tensor.tail), 1))
                    file.write(tensor.grid.dense.tobytes() + tensor.grid.tail.tobytes())
                if layer.parts is not None:
                    high = set(layer.all_parts[-1].channels)
                    file.write(pack(np.array([channel in high for channel in range(layer.channels)], np.uint8), 1))
        size = path.stat().st_size
    return size, plan.size().total_bits - saved


def quantized_part(weight: torch.Tensor, layer: LayerChoice, part: Part) -> PiecewiseTensor:
    """The codes of some channels of a layer."""
    assert isinstance(layer.scheme, mpq.Piecewise)
    return quantize(weight.detach()[list(part.channels)], part.bits, layer.scheme, layer=layer.name)


def _flat(codes: torch.Tensor) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = codes.reshape(-1).to(torch.uint8).numpy()
    return values


if __name__ == "__main__":
    main()
