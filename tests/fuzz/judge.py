"""Running one input in this process, and what is wrong with how it went."""

import gc
import hashlib
import io
import itertools
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mpq_plugins.cli import main as cli

from .case import Case

SECONDS = 20
CLEAN = (0, 2)
NOT_OURS = ("mpq: ", "Failed to load")  # torchao says so of itself where it was built for another Python
MOST_GROWTH = 400 << 10  # kilobytes of memory for files of a few kilobytes


class OutOfTimeError(BaseException):
    """An input took too long; nothing should catch it."""


@dataclass(frozen=True)
class Ran:
    """How it went."""

    code: int
    out: str
    err: str


def faults(case: Case, folder: Path) -> tuple[list[str], Ran]:
    """Each thing that is wrong, in words that are the same for the same fault."""
    before, memory = _contents(folder), _peak()
    try:
        ran = run(case.arguments, folder)
    except OutOfTimeError:
        return [f"timeout: over {SECONDS} seconds"], Ran(-1, "", "")
    after = _contents(folder)
    found = [*_exit_faults(ran), *_text_faults(ran, case.arguments)]
    changed = [name for name in case.inputs if _under(before, name) != _under(after, name)]
    changed = [name for name in changed if not (ran.code == 0 and _is_output(case.arguments, name))]
    found += [f"input changed: {name}" for name in changed]
    found += _left(before, after, ran, case.arguments)
    if _peak() - memory > MOST_GROWTH:
        found.append(f"memory: {(_peak() - memory) >> 10} MB more")
    return found, ran


def run(arguments: tuple[str, ...], folder: Path) -> Ran:
    """`mpq` in this folder, with streams of its own."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, here = (sys.stdout, sys.stderr, sys.argv), Path.cwd()
    sys.stdout, sys.stderr, sys.argv = out, err, ["mpq", *arguments]
    code = 0
    try:
        os.chdir(folder)
        with _limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("default")
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(here)
        sys.stdout, sys.stderr, sys.argv = before
        gc.collect(0)
    return Ran(code, *(stream.buffer.getvalue().decode(errors="surrogateescape") for stream in (out, err)))


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _exit_faults(ran: Ran) -> Iterator[str]:
    if "not enough memory" in ran.err or "can't allocate memory" in ran.err or "MemoryError" in ran.err:
        yield "memory: an allocation failed"
    if ran.code == 70:
        lines = [line.strip() for line in ran.err.splitlines() if line.strip()]
        where = [line for line in lines if line.startswith("File ") and "mpq_plugins" in line][-1:]
        yield f"internal: {lines[-2][:100]} at {where[0].split('/')[-1] if where else '?'}"
    elif ran.code not in CLEAN:
        yield f"exit {ran.code}"
    if "Traceback" in ran.err and ran.code != 70:
        yield "traceback"


def _text_faults(ran: Ran, arguments: tuple[str, ...]) -> Iterator[str]:
    raw = sorted({repr(one) for one in ran.out + ran.err if one != "\n" and not one.isprintable()})
    if raw and "printed" not in ran.out + ran.err:
        yield f"raw characters: {', '.join(raw)}"
    errors = ran.err.count("mpq: error: ")
    if ran.code == 2 and ran.err and (not ran.err.splitlines()[-1].startswith("mpq: error: ") or errors < 1):
        yield f"no error line: {ran.err.splitlines()[-1][:80]!r}"
    if sum(line.startswith("mpq: error: ") for line in ran.err.splitlines()) > 1:
        yield "more than one error line"
    strange = [line for line in ran.err.splitlines() if line and not line.startswith(NOT_OURS)]
    if strange and ran.code != 70 and "printed" not in ran.err:
        yield f"a line on stderr that is not ours: {strange[0][:100]!r}"
    if (
        ran.code == 0
        and "--json" in arguments
        and "-h" not in arguments
        and "--help" not in arguments
        and _no_json(ran.out)
    ):
        yield "no JSON on stdout"


def _no_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=float)
    except ValueError:
        return True
    return False


def _left(before: dict[str, str], after: dict[str, str], ran: Ran, arguments: tuple[str, ...]) -> Iterator[str]:
    new = sorted(name for name in after.keys() - before.keys())
    ours = [name for name in new if "/.mpq-" in f"/{name}"]
    if ours:
        yield f"temporary left behind: {ours[0][-8:]}"
    if ran.code == 2:
        kept = [name for name in new if name.endswith(".partial")]  # what is finished, for the next run
        kept += [table for word, table in itertools.pairwise(arguments) if word == "--table"]  # a result by itself
        others = [name for name in new if name not in kept and name not in ours]
        if others:
            yield f"left behind after an error: {others[0][:60]!r}"
        lost = sorted(before.keys() - after.keys())
        if lost:
            yield f"removed by an error: {lost[0][:60]!r}"


def _contents(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_symlink():
            found[str(path.relative_to(folder))] = "no file"
    return found


def _is_output(arguments: tuple[str, ...], name: str) -> bool:
    """Whether the command was asked to write it: a table that is measured again, say."""
    before = [first for first, second in itertools.pairwise(arguments) if second == name]
    return any(word in ("-o", "--output", "--table", "--plot", "--plan") for word in before)


def _under(contents: dict[str, str], name: str) -> dict[str, str]:
    return {path: digest for path, digest in contents.items() if path == name or path.startswith(f"{name}/")}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
