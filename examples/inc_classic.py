"""The classic Neural Compressor (3.7 and earlier) with MixQuant and PTILMPQ as its tuning strategies, on a ResNet.

    python -m examples.inc_classic [--depth 20] [--tolerable-loss 0.01] [--images 1024]

It runs in .venv-classic, which `make classic-env` builds, for the classic API and its successor share a name.
The criterion is accuracy on training images, of which at most a share may be lost; the trials go up from the smallest
plan. Weights alone first; then the static approach, in which the layers that MixQuant gives fewer than 7 bits run in
int8, with their activations, and the others stay in fp32. What is kept is evaluated on 846 test images (one image is
0.12 points), cross-entropy in nats. The networks and images are looked for in $MPQ_ZOO, by default ../shared/zoo.
"""

import argparse
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

import mpq_plugins as mpq
from examples.cifar_resnet import evaluate, images, need_networks, resnet
from mpq_plugins.adapters import inc_classic
from mpq_plugins.report.console import console
from mpq_plugins.report.tuning import tuning_table

PER_CHANNEL = mpq.Affine(granularity="per_channel")
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MixQuant, per tensor": ("weight_only", "mixquant", {"qem": [4, 3, 2, 1.5]}),
    "MixQuant, per channel": ("weight_only", "mixquant", {"qem": [14, 8, 4, 3, 2, 1.5], "scheme": PER_CHANNEL}),
    "PTILMPQ, two regions": (
        "weight_only", "ptilmpq", {"alpha": [0.0, 0.5, 1.0], "important_bits": (4, 3), "other_bits": (3, 2)},
    ),
    "MixQuant, static int8 below 7 bits": ("static", "mixquant", {"qem": [3, 2, 1.5], "int8_below": 7}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=[20])
    parser.add_argument("--tolerable-loss", type=float, default=0.01, help="share of the float accuracy")
    parser.add_argument("--images", type=int, default=1024, help="of the training set, to tune and calibrate on")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # of torch's own, about the quantized tensors that the compressor makes
    need_networks(parser)
    for depth in options.depth:
        report(depth, options)


def report(depth: int, options: argparse.Namespace) -> None:
    from neural_compressor import PostTrainingQuantConfig
    from neural_compressor.config import AccuracyCriterion

    net, test = resnet(depth), images()
    pictures, labels = (tensor[: options.images] for tensor in images("calib_1024.npz"))
    batches: Any = list(zip(pictures[:256], labels[:256], strict=True))
    out = console()
    top1, loss = evaluate(net, *test)
    out.print(f"ResNet-{depth} in float: {top1:.2f} %, {loss:.3f} on test images")
    for name, (approach, strategy, parameters) in RUNS.items():
        conf = PostTrainingQuantConfig(
            approach=approach,
            quant_level=1,
            tuning_criterion=inc_classic.TuningCriterion(strategy, parameters),
            accuracy_criterion=AccuracyCriterion(tolerable_loss=options.tolerable_loss),
        )
        try:
            q_model = inc_classic.fit(
                net, conf, calib_dataloader=DataLoader(batches, 64),
                eval_func=lambda model: evaluate(model, pictures, labels)[0],
            )  # fmt: skip
        except mpq.TuningError as error:
            out.print(f"{name}: {error}")
            continue
        inc_classic.verify(q_model, inc_classic.plan_of(q_model), net)
        tuning, (top1, loss) = inc_classic.tuning_of(q_model), evaluate(q_model.model, *test)
        out.print(tuning_table(tuning, f"ResNet-{depth}, {name}"))
        out.print(f"wanted: {tuning.criterion.text(tuning.baseline)}; kept: {top1:.2f} %, {loss:.3f} on test images")


if __name__ == "__main__":
    main()
