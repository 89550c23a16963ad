"""A MixQuant plan on a pretrained CIFAR-10 ResNet through PyTorch's FX graph mode: accuracy, bytes on disk, time.

    python -m examples.fx_resnet [--depth 20 56] [--qem 2]

Activations at 8 bits, calibrated on 512 training images. FX runs int8 kernels and packs nothing: a weight of any
width takes a byte on disk, which is measured beside what the plan promises. Accuracy on 846 test images (one image
is 0.12 points). The networks and images are looked for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
import copy
import io
import statistics
import time
import warnings

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

import mpq_plugins as mpq
from examples.cifar_resnet import evaluate, images, need_networks, resnet
from mpq_plugins.adapters import fx
from mpq_plugins.report.tables import bytes_text, grid

CALIBRATION = 512
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20, 56])
    parser.add_argument("--qem", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message=".*(torch.ao.quantization is deprecated|quantized tensor creation)")
    need_networks(parser)
    for depth in options.depth:
        report(depth, mpq.MixQuant(qem=options.qem))


def report(depth: int, allocator: mpq.Allocator) -> None:
    net, test, calibration = resnet(depth), images(), images("calib_1024.npz")[0][:CALIBRATION]
    plan = allocator(mpq.measure(net)).with_activation_bits(8)
    prepared = fx.prepare(net, plan, calibration[:1])
    with torch.no_grad():
        for batch in calibration.split(BATCH):
            prepared(batch)
    # Converting takes the prepared model's modules over, so each conversion gets a preparation of its own.
    reference = convert_to_reference_fx(copy.deepcopy(prepared))
    converted = convert_fx(prepared)
    for quantized in (converted, reference):
        fx.verify(quantized, plan, net, batch=calibration[:BATCH])
    simulated = mpq.apply(net, plan.with_activation_bits(None))
    rows = [
        row(name, model, test, calibration)
        for name, model in (
            ("float", net),
            ("apply: weights only", simulated),
            ("FX converted", converted),
            ("FX reference", reference),
        )
    ]
    size = plan.size()
    title = f"ResNet-{depth}, {plan.allocator.name}, {size.average_bits:.2f} bits a weight, activations 8 bits"
    out = Console(width=120, highlight=False)
    out.print(grid(title, ("model", "top-1 %", "cross-entropy", "on disk", f"ms for {BATCH} images"), rows))
    out.print(
        f"The plan's weights alone take {bytes_text(size.total_bytes)}; FX stores a byte for each, whatever its width."
    )


def row(name: str, model: nn.Module, test: tuple[Tensor, Tensor], calibration: Tensor) -> tuple[str, ...]:
    top1, loss = evaluate(model, *test)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    return (
        name,
        f"{top1:.2f}",
        f"{loss:.3f}",
        bytes_text(len(stored.getvalue())),
        f"{milliseconds(model, calibration):.1f}",
    )


@torch.no_grad()
def milliseconds(model: nn.Module, calibration: Tensor) -> float:
    """Median of ten batches."""
    spent = []
    for _ in range(12):
        start = time.perf_counter()
        model(calibration[:BATCH])
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent[2:])


if __name__ == "__main__":
    main()
