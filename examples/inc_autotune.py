"""Neural Compressor's accuracy-aware tuning with MixQuant and PTILMPQ on a pretrained CIFAR-10 ResNet.

    python -m examples.inc_autotune [--depth 20] [--tolerable-loss 0.01] [--images 1024] [--save FOLDER]

The criterion is accuracy on training images, of which at most a share may be lost; the trials go up from the smallest
plan. What is kept is then evaluated on 846 test images (one image is 0.12 points), cross-entropy in nats. Weights
alone, activations in float. For Neural Compressor 3.8 and later; examples.inc_classic is for those before.
The networks and images are looked for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import mpq_plugins as mpq
from examples.cifar_resnet import evaluate, images, need_networks, resnet
from mpq_plugins.adapters import inc
from mpq_plugins.report.console import console
from mpq_plugins.report.progress import progress_bar
from mpq_plugins.report.tuning import tuning_table

PER_CHANNEL = mpq.Affine(granularity="per_channel")
CONFIGS: dict[str, Any] = {
    "MixQuant, per tensor": inc.MixQuantConfig(qem=[4, 3, 2, 1.5]),
    "MixQuant, per channel": inc.MixQuantConfig(qem=[14, 8, 4, 3, 2, 1.5], scheme=PER_CHANNEL),
    "PTILMPQ, two regions": inc.PTILMPQConfig(alpha=[0.0, 0.5, 1.0], important_bits=(4, 3), other_bits=(3, 2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20])
    parser.add_argument("--tolerable-loss", type=float, default=0.01, help="share of the float accuracy")
    parser.add_argument("--images", type=int, default=1024, help="of the training set, to tune on")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save what is kept there, and load it again")
    options = parser.parse_args()
    torch.set_num_threads(2)
    need_networks(parser)
    for depth in options.depth:
        report(depth, options)


def report(depth: int, options: argparse.Namespace) -> None:
    from neural_compressor.torch.quantization import TuningConfig

    net, test = resnet(depth), images()
    seen = [tensor[: options.images] for tensor in images("calib_1024.npz")]
    out = console()
    top1, loss = evaluate(net, *test)
    out.print(f"ResNet-{depth} in float: {top1:.2f} %, {loss:.3f} on test images")
    for name, config in CONFIGS.items():
        criterion = TuningConfig(config_set=config, tolerable_loss=options.tolerable_loss)
        with progress_bar(name) as progress:
            try:
                tuned = inc.autotune(net, criterion, lambda model: evaluate(model, *seen)[0], progress=progress)
            except mpq.TuningError as error:
                out.print(f"{name}: {error}")
                continue
        plan = inc.plan_of(tuned)
        inc.verify(tuned, plan, net)
        tuning, (top1, loss) = inc.tuning_of(tuned), evaluate(tuned, *test)
        out.print(tuning_table(tuning, f"ResNet-{depth}, {name}"))
        out.print(f"wanted: {tuning.criterion.text(tuning.baseline)}; kept: {top1:.2f} %, {loss:.3f} on test images")
        if options.save is not None:
            folder = options.save / f"resnet{depth}-{plan.allocator.name}"
            inc.save(tuned, folder)
            inc.verify(inc.load(folder, net), plan, net)
            out.print(f"saved to {folder}, and loaded again: the same weights")


if __name__ == "__main__":
    main()
