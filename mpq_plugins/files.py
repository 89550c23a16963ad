"""Reading files that end, and writing them so that an interruption leaves the old one whole."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .errors import SourceError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; on success flush it to disk and rename it over `target`.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `target` is untouched.
    Raises SourceError where the folder does not exist or cannot be written.
    """
    if exists(target) and not target.is_file():
        what = "a directory" if target.is_dir() else "no ordinary file"
        raise SourceError(f"{target}: is {what}; name a file to write")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise SourceError(f"{target}: cannot write there ({error.strerror}). Choose another path.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(_new_file_mode())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SourceError(f"{target}: cannot write it ({reason}). Is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; a name the system cannot even look up is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> BinaryIO:
    """Open an ordinary file to read. Raises OSError, which says what it is, for a pipe or a device: those may never
    begin, or never end."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file can be called so", str(path)) from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a directory" if stat.S_ISDIR(mode) else "it is no ordinary file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """All of an ordinary file. Raises OSError, which says why, where it is none or has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and {most} is the most", str(path))
        data = file.read(size + 1)  # never without end, whatever the system says of its size
    if len(data) != size:
        raise OSError(errno.EIO, "it changed while it was read", str(path))
    return data


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
CONFIG_NAME = "config.json"


def source_files(source: Path) -> list[Path]:
    """The files that reading weights from a file or a directory reads: weights, indexes, the configuration."""
    if not (exists(source) and source.is_dir()):
        return [source, source.parent / CONFIG_NAME]
    indexed = any(source.glob("*.index.json"))  # shards may lie deeper
    inside = source.rglob("*") if indexed else source.glob("*")
    return [path for path in inside if path.name.endswith(WEIGHT_SUFFIXES) or path.name == CONFIG_NAME]


@contextmanager
def unchanged(source: object) -> Iterator[None]:
    """Raise SourceError at the end where a file of a source is another than at the start, or was written to.

    What was made of it meanwhile would be of two models. A source that is no path has no files.
    """
    before = _identities(source)
    yield
    after = _identities(source)
    for path in before | after:
        if before.get(path) != after.get(path):
            raise SourceError(
                f"{path}: changed while it was read, so the result would be of two models; run again, and write new "
                "checkpoints beside old ones"
            )


def _identities(source: object) -> dict[Path, tuple[int, ...]]:
    found: dict[Path, tuple[int, ...]] = {}
    for path in source_files(Path(source)) if isinstance(source, str | Path) else ():
        with suppress(OSError, ValueError):  # gone, which its absence here says
            status = path.stat()
            found[path] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _new_file_mode() -> int:
    # mkstemp makes files private; a plan should get the mode any new file gets.
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
