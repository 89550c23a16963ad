"""Reading files that end; writing them so that an interruption leaves the old one whole, and two runs never at once.

What is unfinished lies in a folder of our own beside its target, `.mpq-MARK-XXXXXXXX.tmp`, MARK being of the target's
name; the system locks it for as long as its process lives. What a killed run left is therefore told from what another
is writing, and removed by the next that writes the same target.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ..errors import SettingError, SourceError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = bool(fcntl)
ATTEMPTS = 100  # to make a folder that another run takes for a killed one's before it is locked


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; on success flush it to disk and rename it over `target`.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `target` is untouched.
    Raises SourceError where the folder does not exist or cannot be written.
    """
    if exists(target) and not target.is_file():
        what = "a directory" if target.is_dir() else "no ordinary file"
        raise SourceError(f"{target}: is {what}; name a file to write")
    with _workplace(target) as folder, _writing(target):
        temporary = folder / "new"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(_new_file_mode())
        temporary.replace(target)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory beside `target`; on success rename it to `target`, which may be an empty directory.

    On any exception it is removed with all it holds. Raises SourceError where nothing can be written.
    """
    with _workplace(target) as folder, _writing(target):
        temporary = folder / "new"
        temporary.mkdir()
        yield temporary
        temporary.replace(target)


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Hold `target` for one run, so that a second is refused before its work and not after it.

    Raises SettingError where another run holds it, SourceError where nothing can be written beside it. A process that
    was killed holds nothing.
    """
    if not CAN_LOCK:
        yield
        return
    with _placing(target):
        _sweep(target)
        lock = target.parent / f".mpq-{_mark(target)}.lock"
        handle = _locked_file(lock)
    if handle is None:
        raise SettingError(f"{target}: another run is writing it; wait for that, or name another output")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; a name the system cannot even look up is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths, links followed, are of one file, be it there or not."""
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, ValueError, RuntimeError):  # not there, or nowhere
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
    identities: dict[Path, tuple[int, ...]] = {}
    for path in source_files(Path(source)) if isinstance(source, str | Path) else ():
        with suppress(OSError, ValueError):  # gone, which its absence here says
            status = path.stat()
            identities[path] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return identities


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Raises SettingError for halves of surrogate pairs, which UTF-8 has not."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end]
        raise SettingError(f"{target}: cannot hold {broken!r}, which is no character; rename what has it") from error
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _placing(target: Path) -> Iterator[None]:
    try:
        with suppress(FileNotFoundError):
            target.lstat()  # a name too long for the system is found before the work
        yield
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise SourceError(f"{target}: cannot write there ({_reason(error)}). Choose another path.") from error


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{target}: cannot write it ({_reason(error)}). Is the disk full?") from error


def _reason(error: Exception) -> object:
    return error.strerror if isinstance(error, OSError) and error.strerror else error


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A folder of our own beside `target`, locked while in use and then removed."""
    with _placing(target):
        _sweep(target)
        folder, lock = _made(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _made(target: Path) -> tuple[Path, int | None]:
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".mpq-{_mark(target)}-", suffix=".tmp"))
        if not CAN_LOCK:
            return folder, None
        with suppress(FileNotFoundError):  # swept away before it was locked
            lock = os.open(folder, os.O_RDONLY)
            if _locked(lock, folder) is not False:
                return folder, lock
            os.close(lock)
    raise OSError(None, "what is made there disappears")


def _sweep(target: Path) -> None:
    """Remove what killed runs left of this target; what is locked belongs to a run that lives."""
    if not CAN_LOCK:
        return
    for left in target.parent.glob(f".mpq-{_mark(target)}-????????.tmp"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _locked(lock, left):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _locked_file(path: Path) -> int | None:
    """A handle that holds the lock file `path`; None where another process does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if _locked(handle, path) is not False:
            return handle
        held = _is_at(handle, path)
        os.close(handle)
        if held:
            return None


def _locked(handle: int, path: Path) -> bool | None:
    """Whether the lock is ours and still that of what lies at `path`; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return _is_at(handle, path)


def _is_at(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.lstat())
    return False


def _mark(target: Path) -> str:
    return sha256(os.fsencode(target.name)).hexdigest()[:16]


def _new_file_mode() -> int:
    # A temporary file may be private; a plan should get the mode any new file gets.
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
