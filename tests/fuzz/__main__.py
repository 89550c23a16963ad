"""The fuzzer's driver: child processes that each run some thousand inputs, so that a crash is one finding of many."""

import argparse
import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from unittest.mock import patch

import torch

from .place import one, workplace

BLOCK = 2000  # inputs a child process runs
SILENCE = 120  # seconds without a finished input after which a child is ended
ADDRESS_SPACE = 3 << 30  # bytes beyond what a child has after its imports


def main() -> int:
    """Run the inputs that were asked for; 1 where something was found."""
    options = _options()
    if options.only is not None:
        return _again(options.only)
    if options.child is not None:
        return _child(options.seed, *options.child)
    started = time.monotonic()
    found: dict[str, list[str]] = defaultdict(list)
    blocks = [(first, min(first + BLOCK, options.inputs)) for first in range(0, options.inputs, BLOCK)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done, lines in enumerate(pool.map(functools.partial(_block, options.seed), blocks), 1):
            for line in lines:
                where, _, what = line.partition("\t")
                if not found[what]:
                    print(f"{what}\n    {where}", flush=True)
                found[what].append(where)
            print(f"{min(done * BLOCK, options.inputs):,} inputs, {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"\n{options.inputs:,} inputs of seed {options.seed}: {len(found)} kinds of faults")
    for what, places in sorted(found.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(places):6} {what}; --only {' '.join(places[:3])}")
    return 1 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="SEED:NUMBER", help="Run these again, and show what they print.")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _block(seed: int, block: tuple[int, int]) -> list[str]:
    """What children find in these inputs; one that dies is followed by another, from the next input on."""
    first, last = block
    found: list[str] = []
    while first < last:
        reached, lines, end = _watched(seed, first, last)
        found += lines
        if end is not None:
            found.append(f"{seed}:{reached}\t{end}")
        first = reached + 1
    return found


def _watched(seed: int, first: int, last: int) -> tuple[int, list[str], str | None]:
    """(the input reached, findings, how the child ended if not well)."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(seed), "--child", str(first), str(last)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as cried:
        child = subprocess.Popen(command, stdout=said, stderr=cried)
        size, heard = 0, time.monotonic()
        while child.poll() is None and time.monotonic() - heard < SILENCE:
            time.sleep(0.2)
            if (now := os.fstat(said.fileno()).st_size) != size:
                size, heard = now, time.monotonic()
        silent = child.poll() is None
        if silent:
            child.kill()
        code = child.wait()
        said.seek(0)
        cried.seek(0)
        lines, last_words = said.read().splitlines(), cried.read().splitlines()[-1:]
    begun = [int(line[1:]) for line in lines if line.startswith(">")]
    findings = [line for line in lines if "\t" in line]
    if code == 0:
        return last, findings, None
    end = f"silent for {SILENCE} seconds" if silent else f"the process died ({code}): {' '.join(last_words)}"
    return (begun[-1] if begun else first), findings, end


def _child(seed: int, first: int, last: int) -> int:
    with _bounded_workplace() as (seeds, folder):
        for number in range(first, last):
            print(f">{number}", flush=True)
            for what in one(f"{seed}:{number}", seeds, folder)[0]:
                print(f"{seed}:{number}\t{what}", flush=True)
    return 0


def _again(seeds_given: Sequence[str]) -> int:
    worst = 0
    with _bounded_workplace() as (seeds, folder):
        for seed in seeds_given:
            found, case, ran = one(seed, seeds, folder)
            print(
                f"{seed}: mpq {' '.join(map(repr, case.arguments))}\n{ran.code}\n{ran.out[-1500:]}\n{ran.err[-3000:]}"
            )
            print("\n".join(f"FOUND {what}" for what in found) or "nothing wrong", "\n")
            worst |= bool(found)
    return worst


@contextmanager
def _bounded_workplace() -> Iterator[tuple[Path, Path]]:
    """In a process whose memory is bounded, and that shows where a fault of ours was."""
    torch.set_num_threads(1)
    os.environ["MPQ_DEBUG"] = "1"
    cached = functools.cache(entry_points)  # it reads the metadata of all that is installed
    with patch("mpq_plugins.common.registry.entry_points", cached), workplace() as place:
        limit = ADDRESS_SPACE + _address_space()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        yield place


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
