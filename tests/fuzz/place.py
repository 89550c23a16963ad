"""Where inputs are tried: a folder of whole files, and one for each input."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .case import Case, make_case
from .judge import Ran, faults
from .seeds import make

MEMORY = Path("/dev/shm")  # where files cost no disk


@contextmanager
def workplace() -> Iterator[tuple[Path, Path]]:
    """(the folder of whole files, the folder of the inputs'); both are gone at the end."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        seeds, folder = Path(name, "seeds"), Path(name, "cases")
        seeds.mkdir()
        folder.mkdir()
        make(seeds)
        yield seeds, folder


def one(seed: str, seeds: Path, folder: Path) -> tuple[list[str], Case, Ran]:
    """What is wrong with the input of this seed, the input, and how it went."""
    own = folder / seed.replace(":", "-")
    own.mkdir()
    case = make_case(seed, seeds, own)
    found, ran = faults(case, own)
    shutil.rmtree(own)
    return found, case, ran
