"""Weights and inputs of ResNets at few bits: ranges of inputs side by side, and Budget over both widths.

    python -m examples.activations_resnet [--nets 20 56] [--steps 2000] [--parts ranges pairs learned fx]

Weights asymmetric per channel, clipped by squared error; inputs asymmetric per tensor, their ranges static. 1,024
training images calibrate; top-1 and cross-entropy on test_846. `ranges`: 8-bit weights with inputs of 8, 6 and 4 bits,
by each way of finding a range. `pairs`: uniform W4A4 with 8 bits at both ends, and Budget over weights and inputs at no
more bit operations, by kl of 64 images, each rounded to nearest and compensated. `learned`: W2A4, 8 bits at both ends.
`fx`: 8-bit weights and inputs simulated and in FX, in the same ranges, by its integers and by its reference in floating
point: with all 256 levels of inputs and, as CPUs without VNNI need, with 128.
"""

import argparse
import time
import warnings
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

import mpq_plugins as mpq
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet
from mpq_plugins.plans.activations import INPUT_RANGES
from mpq_plugins.report.tables import grid

SCHEME = mpq.Affine(granularity="per_channel", range="mse")
IMAGE = (1, 3, 32, 32)
WIDTHS = range(2, 9)
KL_IMAGES = 64
PARTS = ("ranges", "pairs", "learned", "fx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", type=int, default=2_000, help="of learned rounding, a block")
    parser.add_argument("--images", type=int, default=1_024, help="to calibrate on")
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(1)
    for depth in options.nets:
        run(depth, options.parts, options.steps, options.images)


def run(depth: int, parts: Sequence[str], steps: int, count: int) -> None:
    net, batches = resnet(depth), calibration()[: max(1, count // 128)]
    table = mpq.measure(net, SCHEME, WIDTHS, example_input=torch.zeros(IMAGE))
    if "ranges" in parts:
        show(f"ResNet-{depth}: 8-bit weights, inputs by range", ranges(net, table, batches))
    if "pairs" in parts:
        show(f"ResNet-{depth}: weights and inputs together", pairs(net, table, batches))
    if "learned" in parts and depth == 20:
        show(f"ResNet-{depth}: W2A4 learned, {steps} steps", [learned(net, table, batches, steps)])
    if "fx" in parts:
        show(f"ResNet-{depth}: W8A8, simulated and in FX", in_fx(net, table, batches))


def ranges(net: nn.Module, table: mpq.LayerTable, batches: Sequence[torch.Tensor]) -> list[list[str]]:
    """A row a range: the inputs at 8, 6 and 4 bits, beside 8-bit weights to nearest, nothing corrected."""
    rows = [row("float", net, None)]
    plan = mpq.Uniform(bits=8)(table)
    for name in INPUT_RANGES:
        for bits in (8, 6, 4):
            planned = plan.with_activations(mpq.Activations(bits, range=name))
            quantized = mpq.apply(mpq.calibrate_inputs(net, planned, batches), planned)
            rows.append(row(f"W8A{bits} {name}", quantized, planned))
    dynamic = plan.with_activations(mpq.Activations(8, dynamic="per_tensor"))
    return [*rows, row("W8A8 dynamic per_tensor", mpq.apply(net, dynamic), dynamic)]


def pairs(net: nn.Module, table: mpq.LayerTable, batches: Sequence[torch.Tensor]) -> list[list[str]]:
    """Uniform W4A4 and Budget over both widths at its bit operations."""
    few = [batches[0][:KL_IMAGES]]
    table = mpq.sensitivity(net, table, "kl", few)
    table = mpq.measure_activations(net, table, few, WIDTHS, sensitivities=("kl",))
    uniform = ends_at_8(mpq.Uniform(bits=4)(table).with_activation_bits(4))
    budget = mpq.Budget(
        bops=bops(table, uniform), sensitivity="kl", bits=tuple(WIDTHS), input_bits=tuple(WIDTHS), parts=False, ends=8
    )(table)
    rows = []
    for name, plan in (("uniform W4A4", uniform), ("Budget", budget)):
        nearest = mpq.apply(mpq.calibrate_inputs(net, plan, batches), plan)
        rows.append(row(f"{name}, nearest", nearest, plan, table))
        rows.append(row(f"{name}, compensated", mpq.apply(net, plan, calibrate=batches), plan, table))
    return rows


def learned(net: nn.Module, table: mpq.LayerTable, batches: Sequence[torch.Tensor], steps: int) -> list[str]:
    """Two-bit weights and four-bit inputs, 8 bits at both ends, as BRECQ has them."""
    plan = ends_at_8(mpq.Uniform(bits=2)(table).with_activation_bits(4))
    start = time.perf_counter()
    rounded = mpq.reconstruct(net, plan, batches, steps=steps, correct=True)
    name = f"W2A4, learned in {time.perf_counter() - start:.0f} s"
    return row(name, mpq.apply(rounded, plan), plan, table)


def in_fx(net: nn.Module, table: mpq.LayerTable, batches: Sequence[torch.Tensor]) -> list[list[str]]:
    """The same weights and the same ranges of inputs, in floating point and as integers."""
    from mpq_plugins.adapters import fx

    rows = [row("float", net, None)]
    for name in ("minmax", "percentile", "mse"):
        plan = mpq.Uniform(bits=8)(table).with_activations(mpq.Activations(8, range=name))
        ranged = mpq.calibrate_inputs(net, plan, batches)
        rows.append(row(f"{name}, simulated", mpq.apply(ranged, plan), plan))
        for how, reduced, convert in (
            ("FX, 128 levels", True, convert_fx),
            ("FX, 256 levels", False, convert_fx),
            ("FX's reference, 256 levels", False, convert_to_reference_fx),
        ):
            prepared = fx.prepare(ranged, plan, batches[0], reduce_range=reduced)
            with torch.no_grad():
                for batch in batches:  # what is no planned layer's input is observed
                    prepared(batch)
            converted = convert(prepared)
            fx.verify(converted, plan, ranged)
            rows.append(row(f"{name}, {how}", converted, None))
    return rows


def ends_at_8(plan: mpq.Plan) -> mpq.Plan:
    """The plan with 8 bits for weights and inputs of the first and the last layer."""
    first, *middle, last = plan.layers
    eight = [layer.model_copy(update={"bits": 8, "activations": mpq.Activations(8)}) for layer in (first, last)]
    return plan.model_copy(update={"layers": (eight[0], *middle, eight[1])})


def bops(table: mpq.LayerTable, plan: mpq.Plan) -> int:
    """Multiply-accumulates x weight bits x input bits of one image."""
    choices = plan.by_name
    return sum(
        (layer.macs or 0) * (choices[layer.name].bits or 32) * (choices[layer.name].activation_bits or 32)
        for layer in table.layers
    )


def row(name: str, net: nn.Module, plan: mpq.Plan | None, table: mpq.LayerTable | None = None) -> list[str]:
    if plan is not None:
        mpq.verify(net, plan)
    top1, loss = evaluate(net, *images())
    size = "" if plan is None else f"{plan.size().average_bits:.2f}"
    operations = "" if plan is None or table is None else f"{bops(table, plan) / 1e9:.3f}"
    return [name, size, operations, f"{top1:.2f}", f"{loss:.4f}"]


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    columns = ("plan", "weight bits", "1e9 bit operations", "top-1 %", "cross-entropy")
    Console(width=120, highlight=False).print(grid(title, columns, [tuple(own) for own in rows], left=1))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpq.PlanWarning)  # the table shows what comes of it
        main()
