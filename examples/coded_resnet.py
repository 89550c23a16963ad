"""Accuracy over the bytes of a file, on CIFAR-10 ResNets: one step and an entropy coder, or widths by Budget.

    python -m examples.coded_resnet [--nets 20 56] [--bits 2 1.5 1.25 1] [--seeds 0 1 2] [--plot coded.png]

File bits: all bytes of the file but BatchNorm's and biases, for each planned weight. Weights of `Budget` are asymmetric
per channel, clipped by squared error, 1 to 8 bits, and its average is the one whose file takes what is asked. With
inputs: 1,024 training images without labels; synthetic: 256 inputs made from BatchNorm's statistics. Scores: top-1 and
cross-entropy on test_846, and the divergence from the float net's predictions there, the least noisy of the three.
CPU-seconds: of plan, rounding and file, from tables and inputs that are there. nncodec takes part if it is installed.
"""

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import mpq_plugins as mpq
from examples import nncodec_files
from examples.cifar_resnet import calibration, images, need_networks, resnet
from mpq_plugins.report.plots import check_plot, save_plot
from mpq_plugins.report.tables import bytes_text, grid

AFFINE = mpq.Affine(granularity="per_channel", range="mse")
WIDTHS = range(1, 9)
SHAPE = (128, 3, 32, 32)
CLOSE, TRIES = 0.01, 4  # of the file bits asked, and plans made to come so near
SHOWN = 30  # points of top-1, below the best
COMPENSATED, SYNTHETIC, NEAREST = (
    "entropy-coded, compensated", "entropy-coded, synthetic inputs", "entropy-coded, nearest"
)  # fmt: skip
CHANNELS, CORRECTED = "Budget per channel, compensated", "Budget per channel, nearest, corrected"
NNCODEC = "nncodec, its defaults"
METHODS = (COMPENSATED, CHANNELS, CORRECTED, SYNTHETIC, NEAREST, NNCODEC)
SEEDED = (COMPENSATED, CHANNELS, SYNTHETIC)


@dataclass(frozen=True)
class Point:
    """A file and what is in it: one method's, at one size; scores are means over seeds, with all of them beside."""

    method: str
    file_bytes: int
    file_bits: float
    top1: tuple[float, ...]
    loss: float
    divergence: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Made:
    """A quantized net and the bytes of its file."""

    net: nn.Module
    file_bytes: int
    file_bits: float


class Study:
    """A net, and what its methods ask for, made when the first of them does."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.test = images()
        self.exact = predictions(net, self.test[0])
        self.batches = calibration()

    @cached_property
    def coded(self) -> mpq.LayerTable:
        return mpq.measure(self.net, mpq.EntropyCoded())

    @cached_property
    def affine(self) -> mpq.LayerTable:
        return mpq.measure(self.net, AFFINE, WIDTHS, per_channel=True)

    @cached_property
    def synthetic(self) -> list[Tensor]:
        return mpq.synthetic_batches(self.net, SHAPE, count=2)

    def prepare(self, methods: Sequence[str]) -> None:
        """Measure what these methods begin from."""
        needed = {CHANNELS: "affine", CORRECTED: "affine", SYNTHETIC: "synthetic"}
        for name in {"coded", *(needed[method] for method in methods if method in needed)}:
            getattr(self, name)

    def widths_at(self, bits: float) -> mpq.Plan:
        """Widths for channels whose file, rounded to nearest, takes so many bits, or the fewest that there are."""
        average, tried = bits, list[tuple[float, mpq.Plan]]()
        for _ in range(TRIES):
            plan = mpq.Budget(average_bits=max(average, WIDTHS[0]), bits=tuple(WIDTHS))(self.affine)
            tried.append((written(self.net, plan).file_bits, plan))
            off = bits - tried[-1][0]
            if abs(off) <= CLOSE * bits or average <= WIDTHS[0]:
                break
            average += off
        return min(tried, key=lambda one: abs(one[0] - bits))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 56], choices=[20, 56])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.5, 1.25, 1.0], help="file bits a weight")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of compensation")
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose names contain one of these")
    parser.add_argument("--plot", type=Path, help="draw accuracy over file bits to this file")
    options = parser.parse_args()
    need_networks(parser)
    check_plot(options.plot)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", mpq.PlanWarning)  # the table shows what comes of it
    methods = [name for name in METHODS if any(part in name for part in options.only)]
    if NNCODEC in methods and not nncodec_files.installed():
        print("nncodec is not installed, and is left out: pip install nncodec")
        methods.remove(NNCODEC)
    found: dict[str, list[Point]] = {}
    for depth in options.nets:
        study = Study(resnet(depth))
        found[f"ResNet-{depth}"] = list(points(study, methods, options.bits, options.seeds))
        show(f"ResNet-{depth}", study, found[f"ResNet-{depth}"])
    if options.plot is not None:
        draw(found, options.plot)
        print(f"wrote {options.plot}")


def points(study: Study, methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]) -> Iterator[Point]:
    """Each method at each size, printed as it comes."""
    study.prepare(methods)
    for bits in budgets:
        for method in methods:
            own = seeds if method in SEEDED else seeds[:1]
            spent = time.process_time()
            made = [MAKERS[method](study, bits, seed) for seed in own]
            seconds = (time.process_time() - spent) / len(own)
            scored = [scores(study, one.net) for one in made]
            point = Point(
                method, round(fmean(one.file_bytes for one in made)), fmean(one.file_bits for one in made),
                tuple(top1 for top1, _, _ in scored), fmean(loss for _, loss, _ in scored),
                fmean(divergence for _, _, divergence in scored), seconds,
            )  # fmt: skip
            print(" | ".join(row(point)), flush=True)
            yield point


def compensated(study: Study, bits: float, seed: int) -> Made:
    return fitted(study, bits, study.batches, seed)


def on_synthetic(study: Study, bits: float, seed: int) -> Made:
    return fitted(study, bits, study.synthetic, seed)


def to_nearest(study: Study, bits: float, seed: int) -> Made:
    return fitted(study, bits, None, seed)


def fitted(study: Study, bits: float, batches: Sequence[Tensor] | None, seed: int) -> Made:
    """What this project writes at so many file bits."""
    plan = mpq.Budget(file_bits=bits)(study.coded)
    file = mpq.fit_file(study.net, plan, batches, seed=seed)
    return Made(mpq.apply(file.model, file.plan), file.file_bytes, file.file_bits)


def of_channels(study: Study, bits: float, seed: int) -> Made:
    plan = study.widths_at(bits)
    return written(mpq.compensate(study.net, plan, study.batches, seed=seed), plan)


def corrected(study: Study, bits: float, seed: int) -> Made:
    plan = study.widths_at(bits)
    return written(mpq.correct(study.net, plan, study.batches), plan)


def of_nncodec(study: Study, bits: float, seed: int) -> Made:
    weights = {f"{layer.name}.weight" for layer in study.coded.layers}
    file = nncodec_files.nearest(nncodec_files.coder(study.net, weights), bits)
    net = copy.deepcopy(study.net)
    net.load_state_dict(nncodec_files.decoded(file.data, net))
    return Made(net, len(file.data), file.bits)


MAKERS: Mapping[str, Callable[[Study, float, int], Made]] = {
    COMPENSATED: compensated,
    CHANNELS: of_channels,
    CORRECTED: corrected,
    SYNTHETIC: on_synthetic,
    NEAREST: to_nearest,
    NNCODEC: of_nncodec,
}


def written(net: nn.Module, plan: mpq.Plan) -> Made:
    """The net by a plan of widths, and its container."""
    with tempfile.TemporaryDirectory() as folder:
        container = mpq.compress(net, plan, Path(folder) / "net.mpqc")
        return Made(mpq.apply(net, plan), container.size, container.file_bits)


@torch.no_grad()
def predictions(net: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in inputs.split(128)])


def scores(study: Study, net: nn.Module) -> tuple[float, float, float]:
    """Top-1 in percent, cross-entropy, and the divergence from the float net's predictions."""
    inputs, labels = study.test
    logits = predictions(net, inputs)
    p, q = (values.double().log_softmax(-1) for values in (study.exact, logits))
    top1 = 100 * float((logits.argmax(1) == labels).float().mean())
    return top1, float(F.cross_entropy(logits, labels)), float((p.exp() * (p - q)).sum(1).mean())


def show(name: str, study: Study, found: Sequence[Point]) -> None:
    top1, loss, _ = scores(study, study.net)
    whole = sum(tensor.nbytes for tensor in study.net.state_dict().values())
    rows: list[tuple[str, ...]] = [("float", bytes_text(whole), "32", f"{top1:.2f}", f"{loss:.3f}", "0", "")]
    rows += [row(one) for one in found]
    columns = ("method", "file", "file bits", "top-1 %", "cross-entropy", "KL to float", "CPU-s")
    Console(width=120, highlight=False).print(grid(name, columns, rows))


def row(one: Point) -> tuple[str, ...]:
    return (
        one.method, bytes_text(one.file_bytes), f"{one.file_bits:.3f}", top1_text(one.top1), f"{one.loss:.3f}",
        f"{one.divergence:.4f}", f"{one.seconds:.1f}",
    )  # fmt: skip


def top1_text(seeds: Sequence[float]) -> str:
    """The mean, and its seeds' least and most."""
    spread = f" ({min(seeds):.2f} to {max(seeds):.2f})" if len(seeds) > 1 else ""
    return f"{fmean(seeds):.2f}{spread}"


def draw(found: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Top-1 over file bits, a panel for each net."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 4.5), layout="constrained")
    for axes, (name, own) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for method in dict.fromkeys(one.method for one in own):
            line = sorted((one.file_bits, fmean(one.top1)) for one in own if one.method == method)
            axes.plot(*zip(*line, strict=True), "o-", label=method, markersize=4)
        best = max(fmean(one.top1) for one in own)
        axes.set(title=name, xlabel="file bits a weight", ylabel="top-1 %", ylim=(best - SHOWN, best + 2))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    save_plot(figure, path)


if __name__ == "__main__":
    main()
