"""Runs test files on a changed copy of the tree."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy2

from .changes import Change
from .related import related

PROCESSOR = 900  # seconds of it that the tests of a change may take; one that takes longer is noticed
WALL = 3600  # seconds, for what waits without working
# Compiled code is cached by the file that holds a loop, not by those it calls: a change there needs a cache anew.
COMPILED = ("mpq_plugins/quantization", "mpq_plugins/compression")


@dataclass
class Tree:
    """A copy of what git tracks, in which one file at a time is changed."""

    root: Path
    scratch: Path
    sound: set[str] = field(default_factory=set)  # tests that pass on the code as it is
    unsound: set[str] = field(default_factory=set)  # tests that fail on it, and would notice anything: left out

    def notices(self, change: Change) -> str:
        """The first test that fails, "timeout", or "" where all pass."""
        for group in related(self.root, change.file):
            while failed := self._failing_with(change, group):
                if "::" not in failed or self._is_sound(failed):
                    return failed
        return ""

    def _failing_with(self, change: Change, group: Sequence[str]) -> str:
        file = self.root / change.file
        whole = file.read_text()
        try:
            file.write_text(change.made_in(whole))
            return self._failing(group, anew=change.file.startswith(COMPILED))
        finally:
            file.write_text(whole)

    def _is_sound(self, test: str) -> bool:
        if test not in self.sound:
            (self.unsound if self._failing([test], anew=True) else self.sound).add(test)
        return test in self.sound

    def _failing(self, group: Sequence[str], anew: bool) -> str:
        without = [f"--deselect={test}" for test in self.unsound]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
                   "--hypothesis-profile=mutants", *without, *group]  # fmt: skip
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            cache = scratch if anew else str(self.scratch / "numba")
            process = subprocess.Popen(
                command, cwd=self.root, env=self._environment(scratch, cache), text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                preexec_fn=_bounded,
            )  # fmt: skip
            try:
                said, _ = process.communicate(timeout=WALL)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                _end(process)
        if process.returncode == 0:
            return ""
        failing = [line.split(" ", 1)[1] for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failing[0].split(" - ")[0] if failing else f"exit {process.returncode}"

    def _environment(self, scratch: str, cache: str) -> dict[str, str]:
        """One thread, the copy's code, and nothing of ours that a changed program could write over."""
        return {
            **os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "MPQ_ZOO": scratch, "TMPDIR": scratch,
            "NUMBA_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(process: subprocess.Popen[str]) -> None:
    """The tests and what they started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def copied(source: Path) -> Iterator[Tree]:
    """The tree of `source` somewhere else, while it is needed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root, scratch = Path(folder, "tree"), Path(folder, "scratch")
        scratch.mkdir()
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (source / name).exists():
                copy2(source / name, target, follow_symlinks=False)
        yield Tree(root, scratch)


def digest(root: Path, files: Sequence[str]) -> str:
    """Of the files' contents, so that a verdict is taken up again only where they are the same."""
    total = hashlib.sha256()
    for file in files:
        total.update((root / file).read_bytes())
    return total.hexdigest()[:16]
