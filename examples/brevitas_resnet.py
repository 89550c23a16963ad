"""MixQuant and PTILMPQ plans on a pretrained CIFAR-10 ResNet in Brevitas: plain, corrected, GPTQ, learned rounding.

The last is then trained a little.

    python -m examples.brevitas_resnet [--depth 20 56] [--export FOLDER]

Weights of about 3 bits, activations in float. All that follows conversion sees training images without their labels.
Accuracy on 846 test images (one image is 0.12 points), cross-entropy in nats, seconds on two threads. With --export,
ONNX QCDQ files of the learned-rounding models, and what onnxruntime makes of them. The networks and images are looked
for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import evaluate, images, need_networks, resnet
from mpq_plugins.adapters import brevitas
from mpq_plugins.report.progress import progress_bar
from mpq_plugins.report.tables import grid

BATCH = 64
PER_CHANNEL = mpq.Affine(granularity="per_channel")
ALLOCATORS: tuple[mpq.Allocator, ...] = (
    mpq.Uniform(bits=3),
    mpq.MixQuant(qem=14.0),
    mpq.PTILMPQ(alpha=0.3, important_bits=(4, 3), other_bits=(3, 2)),
)
LABELS = {"uniform": "Uniform", "mixquant": "MixQuant", "ptilmpq": "PTILMPQ"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20])
    parser.add_argument("--images", type=int, default=1024, help="of the training set, to calibrate and train on")
    parser.add_argument("--epochs", type=int, default=10, help="of training")
    parser.add_argument("--steps", type=int, default=200, help="of learned rounding, for each layer")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write ONNX QCDQ files there")
    options = parser.parse_args()
    torch.set_num_threads(2)
    need_networks(parser)
    for depth in options.depth:
        report(depth, options)


def report(depth: int, options: argparse.Namespace) -> None:
    net, test = resnet(depth), images()
    batches = list(images("calib_1024.npz")[0][: options.images].split(BATCH))
    table = mpq.measure(net, PER_CHANNEL, range(1, 9))
    out = Console(width=120, highlight=False)
    top1, loss = evaluate(net, *test)
    out.print(f"ResNet-{depth} in float: {top1:.2f} %, {loss:.3f}")
    for allocator in ALLOCATORS:
        plan = allocator(table)
        rows = []
        for name, model, seconds in variants(net, plan, batches, options.steps, options.epochs):
            brevitas.verify_tuned(model, plan)
            top1, loss = evaluate(model, *test)
            rows.append((name, f"{top1:.2f}", f"{loss:.3f}", f"{seconds:.1f}"))
            if options.export is not None and name == "learned rounding":
                out.print(
                    exported(model, plan, test[0][:BATCH], options.export / f"resnet{depth}-{plan.allocator.name}.onnx")
                )
        title = f"ResNet-{depth}, {LABELS[plan.allocator.name]}, {plan.size().average_bits:.2f} bits a weight"
        out.print(grid(title, ("Brevitas model", "top-1 %", "cross-entropy", "seconds"), rows))


def variants(
    net: nn.Module, plan: mpq.Plan, batches: list[Tensor], steps: int, epochs: int
) -> Iterator[tuple[str, nn.Module, float]]:
    """Name, model and seconds, each from the plain conversion but the last."""
    start = time.perf_counter()
    plain = brevitas.to_brevitas(net, plan)
    brevitas.verify(plain, plan, net)
    yield "plain", plain, time.perf_counter() - start
    teacher = brevitas.distillation(net)
    follows: dict[str, Callable[[Any], nn.Module]] = {
        "bias correction": lambda progress: brevitas.correct_bias(plain, batches, progress=progress),
        "GPTQ": lambda progress: brevitas.gptq(plain, batches, progress=progress),
        "learned rounding": lambda progress: brevitas.learned_round(plain, batches, steps=steps, progress=progress),
        "QAT after learned rounding": lambda progress: brevitas.train(
            done["learned rounding"], batches, teacher, epochs=epochs, progress=progress
        ),
    }
    done: dict[str, nn.Module] = {}
    for name, follow in follows.items():
        start = time.perf_counter()
        with progress_bar(name) as progress:
            done[name] = follow(progress)
        yield name, done[name], time.perf_counter() - start


def exported(model: nn.Module, plan: mpq.Plan, example: Tensor, path: Path) -> str:
    """Write the file, and the plan beside where widths differ inside layers; how far onnxruntime is from torch."""
    import onnxruntime

    parts = any(layer.bits is None for layer in plan.layers)
    written = brevitas.export(model, plan, path, example, plan_beside=parts)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])
    with torch.no_grad():
        difference = float((logits - model(example)).abs().max())
    return f"{', '.join(map(str, written))}: onnxruntime within {difference:.1e} of torch"


if __name__ == "__main__":
    main()
