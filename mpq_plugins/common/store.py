"""What an interrupted run goes on from: its finished units, in one SQLite file beside the result.

    with Store.beside(output) as store:      # output.partial
        table = measure(model, store=store)
        table.save(output)

One lifetime: the file is made when the run begins. It is removed where the block ends well, which is once the result is
saved, and kept where it raises or the process dies. Units of a job that this run did not ask for outlast it.

One rule for what is there already: what the same job finished is used, and everything else is refused and left as it
is.
"""

import json
import math
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import MeasureWarning, SettingError, SourceError
from .checks import shown
from .old_stores import refuse_old_store
from .public import public
from .registry import names
from .store_file import Place, StoreFile, cannot_write

SUFFIX = ".partial"
SYNC_AFTER = 1.0  # seconds of work that a failing machine, as against a killed process, may cost

Arrays = Mapping[str, NDArray[np.float64]]
Row = Mapping[str, float]


@public
class Store:
    """A context manager over a file of finished units; `job` gives those of one job.

    Several kinds of work on one result keep their units in one store. Threads may share it; another store on the same
    file, in this process or another, is refused for as long as the block lasts. A MeasureWarning says that the file was
    damaged: units that are whole are used, and the others are done again.

    Args:
        path: The file. It is made where it is not there.

    Raises:
        SettingError: The file is in use, is no store, is one of an earlier or newer version, or is damaged beyond
            telling.
        SourceError: The file cannot be read or written.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> with mpq.Store("net.store") as store:
        ...     table = mpq.measure(net, store=store)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: StoreFile | None = None
        self._lock = threading.RLock()
        self._synced = time.monotonic()
        self._asked: set[str] = set()

    @classmethod
    def beside(cls, result: Path) -> Self:
        """Make the store of a run that writes a result, in a file beside it.

        Args:
            result: The file that the run writes.

        Returns:
            The store, not yet opened.

        Raises:
            SettingError: An earlier version left a store there.
        """
        for kind in ("measure", *names("sensitivities")):  # as earlier versions called theirs
            refuse_old_store(result.with_name(f"{result.name}.{kind}{SUFFIX}"))
        return cls(result.with_name(result.name + SUFFIX))

    def __enter__(self) -> Self:
        self._file = StoreFile.open(self.path)
        if self._file.damaged:
            warnings.warn(MeasureWarning(
                f"{self.path}: is damaged; {len(self)} of its units are whole and used, the others are done again"
            ), stacklevel=4)  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close(remove=self._is_done_with() if kind is None else not len(self))
                self._file = None

    def _is_done_with(self) -> bool:
        """Whether nothing is left once this run's jobs go, whose results are saved."""
        others = any(places for kind, places in self._open.places.items() if kind not in self._asked)
        if others:
            with self._writing() as file:
                for kind in self._asked:
                    file.forget(kind)
        return not others

    def __len__(self) -> int:
        """Finished units, of whatever job."""
        return sum(map(len, self._open.places.values()))

    def job(self, kind: str, facts: Mapping[str, str]) -> "Finished":
        """Give the units of a job.

        Args:
            kind: What names the job within the store.
            facts: All that decides its result, by name.

        Returns:
            The units that are finished, to which others can be added.

        Raises:
            SettingError: The store holds units of the same kind whose facts are others.
        """
        digests = {name: _digest(value) for name, value in facts.items()}
        with self._lock, self._writing() as file:
            stored = file.facts.get(kind)
            if stored != digests and file.places.get(kind):
                names = dict.fromkeys([*digests, *(stored or {})])
                others = [name for name in names if digests.get(name) != (stored or {}).get(name)]
                raise SettingError(
                    f"{self.path}: holds what another job finished (it differs in {', '.join(others)}); remove it to "
                    "give that up, or name another output"
                )
            if stored != digests:
                file.begin(kind, digests)
            self._asked.add(kind)
        return Finished(self, kind)

    @property
    def _open(self) -> StoreFile:
        if self._file is None:
            raise SettingError(f"store: {self.path} is not open; use it in a block, `with Store(path) as store:`")
        return self._file

    @contextmanager
    def _writing(self) -> Iterator[StoreFile]:
        try:
            yield self._open
        except sqlite3.Error as error:
            raise cannot_write(self.path, error) from error

    def _places(self, kind: str) -> Mapping[str, Place]:
        return self._open.places.get(kind, {})

    def _take(self, kind: str, name: str) -> bytes:
        with self._lock:
            try:
                data = self._open.read(kind, name)
            except sqlite3.Error as error:
                raise SourceError(f"{self.path}: cannot be read ({error}); run again") from error
        if data is None:
            raise SourceError(f"{self.path}: was changed by somebody else while in use; run again")
        return data

    def _add(self, kind: str, name: str, data: bytes) -> None:
        with self._lock, self._writing() as file:
            now = time.monotonic()
            durable = now - self._synced > SYNC_AFTER
            file.write(kind, name, data, durable)
            if durable:
                self._synced = now


class Finished:
    """The finished units of one job by name: bytes, or with the methods below rows of numbers and arrays."""

    def __init__(self, store: Store, kind: str) -> None:
        self.store, self.kind = store, kind

    def __contains__(self, name: object) -> bool:
        return name in self.store._places(self.kind)

    def __len__(self) -> int:
        return len(self.store._places(self.kind))

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.store._places(self.kind)))

    def take(self, name: str) -> bytes:
        """A finished unit. Raises SourceError where it is no longer what it was."""
        return self.store._take(self.kind, name)

    def add(self, name: str, data: bytes) -> None:
        """Write a finished unit. Raises SourceError, on a full disk for one: what was written before stays."""
        self.store._add(self.kind, name, data)

    def row(self, name: str) -> Row | None:
        """A finished row (names -> numbers); None for one that is not there, or is no such row."""
        if name not in self:
            return None
        try:
            row = json.loads(self.take(name))
        except (ValueError, RecursionError):
            return None
        return row if _is_row(row) else None

    def add_row(self, name: str, row: Row) -> None:
        """Write a finished row. Raises SourceError as `add`."""
        self.add(name, json.dumps(dict(row)).encode())

    def arrays(self, name: str) -> Arrays | None:
        """Finished arrays; None for what is not there, or holds none."""
        if name not in self:
            return None
        try:
            return load(self.take(name))
        except SafetensorError:
            return None

    def add_arrays(self, name: str, arrays: Arrays) -> None:
        """Write finished arrays. Raises SourceError as `add`."""
        self.add(name, save({part: np.ascontiguousarray(array) for part, array in arrays.items()}))


def opened(store: str | Path | Store | None) -> AbstractContextManager[Store | None]:
    """A block over what an argument `store=` gives: a path's store is the block's own, an open one is its user's."""
    if store is None or isinstance(store, Store):
        return nullcontext(store)
    if not isinstance(store, str | Path):
        raise SettingError(f"store: {shown(store)} is not allowed; a file's path, or an open Store")
    return Store(store)


def _digest(fact: str) -> str:
    return sha256(fact.encode(errors="surrogatepass")).hexdigest()[:32]


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not row:
        return False
    return all(type(value) in (int, float) and not math.isnan(value) for value in row.values())
