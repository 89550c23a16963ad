"""One input: files, some of them tampered with, and a command line."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mpq_plugins.cli.main import cli

from .odd import WORDS
from .seeds import special, tamper

SOURCES = (
    "net.safetensors",
    "net.safetensors",
    "net.pt",
    "net.pt",
    "net",
    "plan.mpqt",
    "channel.mpqt",
    "tests.fuzz.users:net",
)
CHECKPOINTS = ("net.safetensors", "net.pt", "net")
PLANS = ("plan.json", "channel.json", "group.json", "parts.json", "book.json")
CONTAINERS = ("plan.mpq", "parts.mpq", "book.mpq")
OUTPUTS = ("out.json", "out.mpqt", "out.safetensors", "out.pt", "out.mpq", "out.csv", "out")


@dataclass(frozen=True)
class Case:
    """`mpq` with these arguments, in a folder with these files of the seeds beside the specials."""

    arguments: tuple[str, ...]
    inputs: tuple[str, ...]


def make_case(seed: str, seeds: Path, folder: Path) -> Case:
    """The case of a seed, its files written to `folder`."""
    rng = random.Random(seed)
    arguments = _command(rng)
    whole = {path.name for path in seeds.iterdir()}
    inputs = tuple(dict.fromkeys(word for word in arguments if word in whole))
    for name in inputs:
        if (seeds / name).is_dir():
            shutil.copytree(seeds / name, folder / name)
        else:
            shutil.copyfile(seeds / name, folder / name)
        if rng.random() < 0.75:
            tamper(folder / name, rng)
    special(folder)
    _partials(arguments, seeds, folder, rng)
    return Case(arguments, inputs)


def _command(rng: random.Random) -> tuple[str, ...]:
    templates: Sequence[Sequence[str]] = (
        ("measure", _one(rng, SOURCES), "-o", "out.mpqt"),
        ("measure", _one(rng, SOURCES)),
        ("plan", _one(rng, SOURCES), "-o", "out.json"),
        ("plan", _one(rng, SOURCES), "-a", _one(rng, ("uniform", "sqnr", "ptilmpq", "mixquant"))),
        ("plan", _one(rng, SOURCES), "-a", "budget", "--average-bits", "4"),
        (
            "plan",
            _one(rng, SOURCES),
            "-a",
            "budget",
            "--latency",
            "latency.json",
            "--latency-limit",
            "0.5",
            "--bits",
            "4,8",
        ),
        ("plan", _one(rng, CHECKPOINTS), "--table", _one(rng, ("plan.mpqt", "new.mpqt", "channel.mpqt"))),
        ("show", _one(rng, (*PLANS, "plan.mpqt", "channel.mpqt"))),
        ("show", _one(rng, PLANS), "--json"),
        ("diff", _one(rng, PLANS), _one(rng, PLANS)),
        ("check", _one(rng, PLANS), _one(rng, CHECKPOINTS)),
        (
            "check",
            _one(rng, PLANS),
            _one(rng, CHECKPOINTS),
            "--backend",
            _one(rng, ("fx", "torchao")),
            "-o",
            "out.json",
        ),
        ("apply", source := _one(rng, CHECKPOINTS), _one(rng, PLANS), "-o", f"out{Path(source).suffix}"),
        ("compress", _one(rng, CHECKPOINTS), _one(rng, PLANS), "-o", "out.mpq"),
        ("decompress", _one(rng, CONTAINERS), "-o", "out.safetensors"),
        ("inspect", _one(rng, CONTAINERS)),
        ("inspect", _one(rng, CONTAINERS), "--plan", "out.json", "--json"),
        ("sweep", _one(rng, SOURCES), "--qem", "2,3", "-o", "out.csv"),
        ("sweep", "tests.fuzz.users:net", "--eval", "tests.fuzz.users:score", "--qem", "2,3", "-o", "out.csv"),
        ("pareto", _one(rng, SOURCES), "--budgets", "3,4", "-o", "out.csv"),
        ("measure", "tests.fuzz.users:net", "--sensitivity", "output_mse", "--calibrate", "tests.fuzz.users:batches"),
        (
            "apply",
            source,
            _one(rng, PLANS),
            "-o",
            f"out{Path(source).suffix}",
            "--model",
            "tests.fuzz.users:net",
            "--calibrate",
            "tests.fuzz.users:batches",
        ),
        (
            "reconstruct",
            "tests.fuzz.users:net",
            _one(rng, PLANS),
            "--calibrate",
            "tests.fuzz.users:batches",
            "--steps",
            "1",
            "-o",
            "out.safetensors",
        ),
        ("plugins",),
        (_one(rng, ("measure", "plan", "show", "tune", "reconstruct", "nothing", "--help", "--version", "")),),
    )
    words = list(rng.choice(templates))
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 2, 3))):
            words += _option(words[0], rng)
    if rng.random() < 0.1:
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    # What no system call can be given reaches no program.
    return tuple(word.replace("\0", "").replace("\ud800", "") for word in words)


def _option(command: str, rng: random.Random) -> list[str]:
    """An option of the command, or of another, and most often a value."""
    known = cli.commands.get(command) or rng.choice(list(cli.commands.values()))
    options = [parameter for parameter in known.params if isinstance(parameter, click.Option)]
    option = rng.choice(options)
    name = rng.choice(option.opts)
    takes = not option.is_flag or rng.random() < 0.05
    return [name, rng.choice(WORDS)] if takes and rng.random() < 0.95 else [name]


def _partials(arguments: Sequence[str], seeds: Path, folder: Path, rng: random.Random) -> None:
    """What an earlier run left, at times, whole or not."""
    for output in {"out.csv", "out.mpqt"} & {*arguments}:
        if rng.random() < 0.3:
            left = f"{output}.partial"
            shutil.copyfile(seeds / ("store.partial" if rng.random() < 0.8 else "old.partial"), folder / left)
            if rng.random() < 0.7:
                tamper(folder / left, rng)


def _one(rng: random.Random, words: Sequence[str]) -> str:
    return rng.choice(words)
