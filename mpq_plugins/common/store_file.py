"""The SQLite file of a store: opened by one process at a time, checked when it is, and mended where it is damaged.

It is in WAL mode under an exclusive lock, so that a process killed at any moment leaves every committed unit readable,
nothing needs memory shared between processes (which network file systems have not), and the system lets go of the lock
with the process. Each piece of a unit has its own checksum, over what job it is of, its name and its bytes.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import MPQError, SettingError, SourceError
from .checksum import checksum
from .files import atomic_path, exists
from .old_stores import refuse_old_store

APPLICATION = 0x4D505173  # "MPQs", in the file's header
VERSION = 1
PIECE = 1 << 26  # bytes; SQLite takes no value of a gigabyte
PAGE = 4096  # bytes
BESIDE = ("", "-wal", "-journal", "-shm")  # the files that SQLite makes of one
SCHEMA = (
    "CREATE TABLE job (kind BLOB PRIMARY KEY, facts BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE unit (id INTEGER PRIMARY KEY, kind BLOB NOT NULL, name BLOB NOT NULL, piece INTEGER NOT NULL, "
    "pieces INTEGER NOT NULL, data BLOB NOT NULL, checksum INTEGER NOT NULL)",
)
FLUSHED = ("NORMAL", "FULL")  # to the disk: by the system in its own time, or before the write is done
OPENING = (
    "PRAGMA trusted_schema = OFF", "PRAGMA locking_mode = EXCLUSIVE",
    "BEGIN EXCLUSIVE", "COMMIT",
)  # fmt: skip
INSERT = "INSERT INTO unit (kind, name, piece, pieces, data, checksum) VALUES (?, ?, ?, ?, ?, ?)"
NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")
NO_LOCKS = ("SQLITE_IOERR_LOCK", "SQLITE_IOERR_RDLOCK", "SQLITE_IOERR_CHECKRESERVEDLOCK", "SQLITE_PROTOCOL")

Place = tuple[int, ...]
"""The rows of a unit's pieces, in their order."""
Facts = Mapping[str, str]


@dataclass
class StoreFile:
    """facts: of each kind of job, whose it is; places: of each kind, by name, where its whole units are; damaged:
    whether anything was not whole when it was opened."""

    path: Path
    connection: sqlite3.Connection
    facts: dict[str, Facts] = field(default_factory=dict)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    damaged: bool = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Make the file, or read all of it. Raises as Store."""
        if exists(path) and not path.is_file():
            refuse_old_store(path)
            raise SettingError(f"{path}: is in the way, and no ordinary file; move it away, or name another output")
        file = cls(path, _connected(path))
        try:
            file._read()
            if file.damaged:
                file._mend()
        except (sqlite3.Error, UnicodeError) as error:
            file.connection.close()
            raise cannot_write(path, error) from error
        except BaseException:
            file.connection.close()
            raise
        return file

    def begin(self, kind: str, facts: Facts) -> None:
        """Say whose units of a kind are, of which there are none yet."""
        data = json.dumps(dict(facts), sort_keys=True).encode()
        row = (kind.encode(), data, checksum(data, checksum(kind.encode())))
        self.connection.execute("INSERT OR REPLACE INTO job VALUES (?, ?, ?)", row)
        self.facts[kind] = facts

    def write(self, kind: str, name: str, data: bytes, durable: bool) -> None:
        """Write a unit, whole or not at all; `durable`: even if the machine fails."""
        execute = self.connection.execute
        known = self.places.setdefault(kind, {})
        execute(f"PRAGMA synchronous = {FLUSHED[durable]}")
        execute("BEGIN")
        try:
            for row in known.get(name, ()):
                execute("DELETE FROM unit WHERE id = ?", (row,))
            rows = _rows(kind, name, data, _seed(kind, self.facts[kind]))
            place = tuple(int(execute(INSERT, row).lastrowid or 0) for row in rows)
            execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                execute("ROLLBACK")
            raise
        known[name] = place

    def forget(self, kind: str) -> None:
        """Remove a job and its units."""
        for table in ("unit", "job"):
            self.connection.execute(f"DELETE FROM {table} WHERE kind = ?", (kind.encode(),))
        self.facts.pop(kind, None)
        self.places.pop(kind, None)

    def read(self, kind: str, name: str) -> bytes | None:
        """A unit; None where it is no longer what it was."""
        pieces = []
        for row in self.places[kind][name]:
            stored = self.connection.execute("SELECT * FROM unit WHERE id = ?", (row,)).fetchone()
            if stored is None or not _is_whole(stored, _seed(kind, self.facts[kind])):
                return None
            pieces.append(stored[5])
        return b"".join(pieces)

    def close(self, remove: bool) -> None:
        """Let others have the file, or remove it."""
        with suppress(sqlite3.Error):
            if remove:  # what goes at once need not reach the disk
                self.connection.execute("PRAGMA synchronous = OFF")
            self.connection.close()
        for suffix in BESIDE if remove else ():
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _read(self) -> None:
        """Whose units there are, and which of them are whole."""
        if not _is_ours(self.path, self.connection):
            marks = (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}")
            for statement in ("PRAGMA journal_mode = WAL", "BEGIN", *marks, *SCHEMA, "COMMIT"):
                self.connection.execute(statement)
            return
        try:
            self.damaged = self.connection.execute("PRAGMA integrity_check(1)").fetchall() != [(b"ok",)]
            self._read_jobs()
            self._read_units()
        except (sqlite3.Error, UnicodeError) as error:
            if _is_refused(error):
                raise
            self.damaged = True  # what was read until here is whole

    def _read_jobs(self) -> None:
        for kind, facts, stored in self.connection.execute("SELECT * FROM job"):
            plain = _plain_facts(kind, facts, stored)
            if plain is None:
                self.damaged = True
            else:
                self.facts[kind.decode()] = plain

    def _read_units(self) -> None:
        seeds = {kind: _seed(kind, facts) for kind, facts in self.facts.items()}
        pieces: dict[tuple[str, str], dict[int, int]] = {}
        wanted: dict[tuple[str, str], int] = {}
        try:
            for row in self.connection.execute("SELECT * FROM unit ORDER BY id"):
                kind = _text(row[1])
                if kind not in seeds or not _is_whole(row, seeds[kind]):
                    self.damaged = True
                    continue
                key = (kind, _text(row[2]))
                pieces.setdefault(key, {})[row[3]] = row[0]
                wanted[key] = row[4]
        finally:
            for (kind, name), rows in pieces.items():
                if len(rows) == wanted[kind, name]:
                    self.places.setdefault(kind, {})[name] = tuple(rows[piece] for piece in sorted(rows))
                else:
                    self.damaged = True

    def _mend(self) -> None:
        """Write what is whole to a new file in place of this one."""
        with atomic_path(self.path) as temporary:
            with closing(_connected(temporary)) as connection:
                fresh = StoreFile(temporary, connection)
                fresh._read()
                for kind, facts in self.facts.items():
                    fresh.begin(kind, facts)
                for kind, units in self.places.items():
                    for name in units:
                        with suppress(sqlite3.DatabaseError, UnicodeError):
                            if (data := self.read(kind, name)) is not None:
                                fresh.write(kind, name, data, durable=False)
            self.close(remove=False)
            for suffix in BESIDE[1:]:  # of the old file, and nothing to the new one
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self.connection = _connected(self.path)
        self.facts, self.places = {}, {}
        self._read()
        self.damaged = True


def cannot_write(path: Path, error: Exception) -> MPQError:
    """The error for a store that SQLite cannot read or write."""
    name = _name(error)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return SettingError(f"{path}: another run is writing it; wait for that, or name another output")
    if name.startswith(NO_ROOM):
        return SourceError(
            f"{path}: cannot write there ({error}). What is finished stays in it: make room, and run again to go on"
        )
    refuse_old_store(path)
    return SettingError(
        f"{path}: is in the way, and no store of finished work, or damaged; move it away, or name another output"
    )


def _connected(path: Path) -> sqlite3.Connection:
    """The file under a lock that lasts as long as the connection, where the system has locks. Raises as Store."""
    if "\0" in str(path):  # where SQLite would end the name
        raise SourceError(f"{path}: cannot write there (no file can be called so). Choose another path.")
    uri = path.absolute().as_uri()
    try:
        return _locked(uri)
    except sqlite3.Error as error:
        if not _name(error).startswith(NO_LOCKS):
            raise cannot_write(path, error) from error
    try:
        return _locked(f"{uri}?nolock=1")
    except sqlite3.Error as error:
        raise cannot_write(path, error) from error


def _locked(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.text_factory = bytes  # of a damaged file it may be no text
        for statement in (f"PRAGMA page_size = {PAGE}", f"PRAGMA synchronous = {FLUSHED[False]}", *OPENING):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ours(path: Path, connection: sqlite3.Connection) -> bool:
    """Whether there is a store; False where there is nothing yet, or its maker was killed before it had a table."""

    def number(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    tables = connection.execute("SELECT sql FROM sqlite_schema").fetchall()
    application, version = number("application_id"), number("user_version")
    if not tables and not application and not version:
        return False
    if application == APPLICATION and version > VERSION:
        raise SettingError(f"{path}: is of a newer mpq-plugins; remove it, or name another output")
    ours = {sql.encode() for sql in SCHEMA}
    if (application, version) != (APPLICATION, VERSION) or {sql for (sql,) in tables} != ours:
        raise cannot_write(path, sqlite3.DatabaseError())
    return True


def _rows(kind: str, name: str, data: bytes, seed: int) -> Iterator[tuple[Any, ...]]:
    view = memoryview(data)
    pieces = max(1, -(-len(view) // PIECE))
    for piece in range(pieces):
        block = view[piece * PIECE : (piece + 1) * PIECE]
        yield kind.encode(), name.encode(), piece, pieces, block, _checksum(name.encode(), piece, pieces, block, seed)


def _is_whole(row: tuple[Any, ...], seed: int) -> bool:
    _, _, name, piece, pieces, data, stored = row
    kinds = (bytes, bytes, int, int, bytes, int)
    are = all(isinstance(value, kind) for value, kind in zip(row[1:], kinds, strict=True))
    return are and stored == _checksum(name, piece, pieces, data, seed)


def _checksum(name: bytes, piece: int, pieces: int, data: "bytes | memoryview", seed: int) -> int:
    return checksum(data, checksum(b"%d %d %d " % (piece, pieces, len(name)) + name, seed))


def _seed(kind: str, facts: Facts) -> int:
    return checksum(json.dumps([kind, dict(facts)], sort_keys=True).encode())


def _plain_facts(kind: object, facts: object, stored: object) -> Facts | None:
    """Whose units are; None where that is damaged."""
    if not isinstance(kind, bytes) or not isinstance(facts, bytes) or stored != checksum(facts, checksum(kind)):
        return None
    try:
        plain = json.loads(facts)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _name(error: Exception) -> str:
    """SQLite's; none for text that damage made unreadable."""
    return getattr(error, "sqlite_errorname", "")


def _is_refused(error: Exception) -> bool:
    return _name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED", *NO_ROOM))
