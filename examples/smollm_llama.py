"""SmolLM2 by llama.cpp: its own mixtures beside Budget over GGUF's types at their bytes, by its own perplexity tool.

Budget chooses among Q4_0, Q5_0 and Q8_0 with this package's codes (`int4_g32`, `int5_g32` and `int8_g32`, which those
types hold to the bit), and K-quants where a layer's inputs are whole blocks of 256. Q4_1 and Q5_1 are left out: they
hold the weights of a file of Q4_1 as they are.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mpq_plugins as mpq
from examples.smollm_model import ACTS, TOKENS, gguf_file, text
from mpq_plugins.adapters import gguf

TYPES = ("int4_g32", "int5_g32", "int8_g32", "q4_k", "q5_k", "q6_k")
MIXTURES = ("q3_k_m", "q4_k_m")
THREADS = "2"


@dataclass(frozen=True)
class Scored:
    """A file, the bytes of its matrices, and its perplexity as llama.cpp prints it, with the standard error."""

    name: str
    matrix_bytes: int
    perplexity: str


def beside_mixtures(types: mpq.TypeTable, folder: Path, windows: int) -> Iterator[Scored]:
    """The source; then each mixture, and a plan of no more bytes, exported and read back."""
    with tempfile.TemporaryDirectory() as scratch:
        words = Path(scratch) / "acts.txt"
        words.write_text(text(ACTS)[: 8 * TOKENS * (windows + 2)])  # the tool refuses less than two windows
        yield _scored("the source, Q4_1", gguf_file(), folder, words, windows)
        for mixture in MIXTURES:
            written = Path(scratch) / f"{mixture}.gguf"
            _run(folder / "llama-quantize", "--allow-requantize", gguf_file(), written, mixture)
            theirs = _scored(f"llama.cpp {mixture}", written, folder, words, windows)
            yield theirs
            plan = mpq.Budget(size_bytes=theirs.matrix_bytes, sensitivity="fisher")(types)
            ours = gguf.export(gguf_file(), plan, Path(scratch) / f"{mixture}-budget.gguf")
            gguf.verify(ours.path, plan, gguf_file())
            yield _scored(f"Budget at the bytes of {mixture}", ours.path, folder, words, windows)


def _scored(name: str, path: Path, folder: Path, words: Path, windows: int) -> Scored:
    said = _run(
        folder / "llama-perplexity", "-m", path, "-f", words, "-c", TOKENS, "--chunks", windows, "-t", THREADS
    )  # fmt: skip
    found = re.search(r"Final estimate: PPL = (\S+ \+/- \S+)", said)
    assert found is not None, "llama-perplexity ends with its estimate"
    return Scored(name, matrix_bytes(path), found[1])


def _run(*command: object) -> str:
    """What a program says, errors and all. Raises CalledProcessError."""
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.decode()


def matrix_bytes(path: Path) -> int:
    """Bytes of a GGUF file's matrices."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
