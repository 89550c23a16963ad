"""The SQLite file of a store: opened by one process at a time, checked when it is, and mended where it is damaged.

It is in WAL mode under an exclusive lock, so that a process killed at any moment leaves every committed unit readable,
nothing needs memory shared between processes (which network file systems have not), and the system lets go of the lock
with the process. Each piece of a unit has its own checksum, over what job it is of, its name and its bytes.

It comes to its place whole, tables and all, so that what is found there and has none was not made by a run that was
killed. Only files that are those which were opened are removed.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import MPQError, SettingError, SourceError
from .checksum import checksum
from .files import atomic_path, claimed, exists, open_regular
from .old_stores import refuse_old_store

APPLICATION = 0x4D505173  # "MPQs", in the file's header
VERSION = 1
PIECE = 1 << 26  # bytes; SQLite takes no value of a gigabyte
PAGE = 4096  # bytes
SMALLEST = 512  # bytes of a page, and so of a file that has one
LOG, JOURNAL = "-wal", "-journal"  # SQLite's beside a file, by the ends of their names; a store has no journal
LOG_BEGINS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
SCHEMA = (
    "CREATE TABLE job (kind BLOB PRIMARY KEY, facts BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE unit (id INTEGER PRIMARY KEY, kind BLOB NOT NULL, name BLOB NOT NULL, piece INTEGER NOT NULL, "
    "pieces INTEGER NOT NULL, data BLOB NOT NULL, checksum INTEGER NOT NULL)",
)
FLUSHED = ("NORMAL", "FULL")  # to the disk: by the system in its own time, or before the write is done
LOCKING = "PRAGMA locking_mode = EXCLUSIVE"  # before anything is read, or SQLite shares memory after all
INSERT = "INSERT INTO unit (kind, name, piece, pieces, data, checksum) VALUES (?, ?, ?, ?, ?, ?)"
NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")
NO_LOCKS = ("SQLITE_IOERR_LOCK", "SQLITE_IOERR_RDLOCK", "SQLITE_IOERR_CHECKRESERVEDLOCK", "SQLITE_PROTOCOL")

Place = tuple[int, ...]
"""The rows of a unit's pieces, in their order."""
Facts = Mapping[str, str]


@dataclass
class StoreFile:
    """facts: of each kind of job, whose it is; places: of each kind, by name, where its whole units are; damaged:
    whether anything was not whole when it was opened; identities: by path, which files were opened."""

    path: Path
    connection: sqlite3.Connection
    identities: dict[Path, os.stat_result] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    damaged: bool = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Make the file and the folders on the way to it, or read all of it. Raises as Store."""
        path = _target(path)
        _refuse_strangers(path)
        file = cls(path, _connected(path) if exists(path) else _made(path))
        try:
            file._read()
            if file.damaged:
                file._mend()
            file._identify()
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
        """Let others have the file, or remove it, unless another lies in its place by now."""
        with suppress(sqlite3.Error):
            if remove:  # what goes at once need not reach the disk
                self.connection.execute("PRAGMA synchronous = OFF")
            self.connection.close()
        for path in self.identities if remove else ():
            self._unlink(path)

    def _identify(self) -> None:
        """Note which files were opened; the log comes first, for without it a store is older but whole."""
        for path in (_beside(self.path, LOG), self.path):
            with suppress(FileNotFoundError):
                self.identities[path] = path.stat()

    def _unlink(self, path: Path) -> None:
        """Remove a file that was opened, unless another lies there by now."""
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), self.identities[path]):
                path.unlink()

    def _read(self) -> None:
        """Whose units there are, and which of them are whole."""
        _check_ours(self.path, self.connection)
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
            with closing(_connected(temporary, self.path)) as connection:
                fresh = StoreFile(temporary, connection)
                _make_tables(connection)
                for kind, facts in self.facts.items():
                    fresh.begin(kind, facts)
                for kind, units in self.places.items():
                    for name in units:
                        with suppress(sqlite3.DatabaseError, UnicodeError):
                            if (data := self.read(kind, name)) is not None:
                                fresh.write(kind, name, data, durable=False)
            self._identify()
            self.close(remove=False)
            for path in self.identities:
                if path != self.path:  # a log of the old file is nothing to the new one
                    self._unlink(path)
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
        remedy = "What is finished stays in it: make room, and run again to go on"
        return SourceError(
            f"{path}: cannot write there ({error}). {remedy if exists(path) else 'Make room, or choose another path.'}"
        )
    refuse_old_store(path)
    return SettingError(
        f"{path}: is in the way, and no store of finished work, or damaged; move it away, or name another output"
    )


def _connected(path: Path, target: Path | None = None) -> sqlite3.Connection:
    """The file under a lock that lasts as long as the connection, where the system has locks.

    target: what errors call it, where it is not in its place yet. Raises as Store.
    """
    target = target or path
    uri = f"{path.as_uri()}?mode=rw"  # what is not there is not made
    try:
        return _locked(uri)
    except (sqlite3.Error, UnicodeError) as error:
        if not _name(error).startswith(NO_LOCKS):
            raise cannot_write(target, error) from error
    try:
        return _locked(f"{uri}&nolock=1")
    except (sqlite3.Error, UnicodeError) as error:
        raise cannot_write(target, error) from error


def _locked(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.text_factory = bytes  # of a damaged file it may be no text
        settings = (f"page_size = {PAGE}", f"synchronous = {FLUSHED[False]}", "trusted_schema = OFF")
        for statement in (LOCKING, *(f"PRAGMA {setting}" for setting in settings), "BEGIN EXCLUSIVE", "COMMIT"):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def _target(path: Path) -> Path:
    """Where the file is or will be, links followed, with its folder made. Raises SourceError where that cannot be."""
    try:
        target = path.resolve()  # which no name with a null byte in it passes, where SQLite would end it
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            target.stat()  # a name too long for the system, or a link that goes in a circle
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{path}: cannot write there ({reason}). Choose another path.") from error
    return target


def _refuse_strangers(path: Path) -> None:
    """Raise SettingError for what SQLite would take for a store of its own, or for a part of one, and change."""
    if exists(path) and not path.is_file():
        refuse_old_store(path)
        raise SettingError(f"{path}: is in the way, and no ordinary file; move it away, or name another output")
    journal = _beside(path, JOURNAL)
    if os.path.lexists(journal):
        raise SettingError(f"{journal}: is in the way of {path.name}, and no part of it; move it away")
    if exists(path) and path.stat().st_size < SMALLEST:  # which SQLite may take for an empty file of its own
        raise cannot_write(path, sqlite3.DatabaseError())


def _made(path: Path) -> sqlite3.Connection:
    """A new file in its place, opened. Raises SettingError where another run makes it too."""
    with claimed(path):
        if not exists(path):
            _remove_left_log(_beside(path, LOG))
            with atomic_path(path) as temporary:
                try:
                    with closing(_connected(temporary, path)) as connection:
                        _make_tables(connection)
                except sqlite3.Error as error:
                    raise cannot_write(path, error) from error
        return _connected(path)


def _remove_left_log(log: Path) -> None:
    """A log whose file somebody removed would be taken for the new one's. Raises SettingError for another file."""
    if not os.path.lexists(log):
        return
    try:
        with open_regular(log) as file:
            begins = file.read(len(LOG_BEGINS[0]))
    except OSError:
        begins = b""
    if begins not in LOG_BEGINS:
        raise SettingError(f"{log}: is in the way, and no log of finished work; move it away, or name another output")
    log.unlink()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _make_tables(connection: sqlite3.Connection) -> None:
    marks = (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}")
    for statement in ("PRAGMA journal_mode = WAL", "BEGIN", *marks, *SCHEMA, "COMMIT"):
        connection.execute(statement)


def _check_ours(path: Path, connection: sqlite3.Connection) -> None:
    """Raise SettingError for what is no store of this version."""

    def number(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    tables = connection.execute("SELECT sql FROM sqlite_schema").fetchall()
    application, version = number("application_id"), number("user_version")
    if application == APPLICATION and version > VERSION:
        raise SettingError(f"{path}: is of a newer mpq-plugins; remove it, or name another output")
    ours = {sql.encode() for sql in SCHEMA}
    if (application, version) != (APPLICATION, VERSION) or {sql for (sql,) in tables} != ours:
        raise cannot_write(path, sqlite3.DatabaseError())


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
