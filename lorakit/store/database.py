"""The one SQLite file of a store (WAL): its tables, its versions, and changes that many processes make."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile, LorakitError, OutOfSpace, disk_errors_named
from lorakit.files.folders import clear_abandoned, free_bytes

FILE = "store.sqlite3"
SPARE = "spare"  # a file that gives way when the disk is full, so that SQLite has room to write what is deleted
ROOM = 1 << 18  # bytes of it
WAIT = 30.0  # seconds for another process's change to end

# One entry a version of the schema: what makes it of the one before.
_VERSIONS = (
    """
    CREATE TABLE IF NOT EXISTS revisions (
        id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER,
        digest TEXT NOT NULL, facts TEXT NOT NULL, rank INTEGER NOT NULL, size INTEGER NOT NULL, source TEXT NOT NULL,
        created REAL NOT NULL, repaired TEXT
    );
    CREATE UNIQUE INDEX IF NOT EXISTS one_content ON revisions (base, run, kind, ifnull(step, -1), digest);
    CREATE TABLE IF NOT EXISTS finishes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE,
        attempt INTEGER NOT NULL, at REAL NOT NULL
    );
    CREATE TABLE IF NOT EXISTS runs (
        base TEXT NOT NULL, run TEXT NOT NULL, pinned INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (base, run)
    );
    CREATE TABLE IF NOT EXISTS aliases (
        base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
        revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE, PRIMARY KEY (base, run, alias)
    );
    CREATE TABLE IF NOT EXISTS moves (
        id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
        revision INTEGER NOT NULL, at REAL NOT NULL, why TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS sources (
        base TEXT NOT NULL, run TEXT NOT NULL, path TEXT NOT NULL, signature TEXT NOT NULL,
        weights_signature TEXT NOT NULL, PRIMARY KEY (base, run, path)
    );
    """,
    """
    ALTER TABLE revisions ADD COLUMN uid TEXT;
    ALTER TABLE revisions ADD COLUMN trashed REAL;
    UPDATE revisions SET uid = lower(hex(randomblob(16)));
    CREATE INDEX revisions_by_digest ON revisions (digest);
    CREATE INDEX finishes_by_revision ON finishes (revision, attempt);
    CREATE TABLE kept (
        id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, run TEXT NOT NULL, label TEXT NOT NULL,
        step INTEGER, attempt INTEGER NOT NULL, digest TEXT NOT NULL, kind TEXT NOT NULL, writer TEXT NOT NULL,
        facts TEXT NOT NULL, base TEXT, rank INTEGER, size INTEGER NOT NULL, source TEXT NOT NULL,
        created REAL NOT NULL, trashed REAL
    );
    CREATE UNIQUE INDEX one_kept ON kept (run, label, ifnull(step, -1), digest);
    CREATE INDEX kept_by_digest ON kept (digest);
    CREATE TABLE trash_folders (folder TEXT PRIMARY KEY);
    CREATE TABLE made (at REAL NOT NULL);
    INSERT INTO made SELECT iif(EXISTS (SELECT 1 FROM revisions), 0, strftime('%s', 'now') - 1);
    CREATE UNIQUE INDEX revisions_by_uid ON revisions (uid);
    CREATE TRIGGER uid_from_the_first_version AFTER INSERT ON revisions WHEN new.uid IS NULL BEGIN
        UPDATE revisions SET uid = lower(hex(randomblob(16))) WHERE id = new.id;
    END;
    """,
    """
    CREATE TABLE mixes (
        base TEXT NOT NULL, recipe TEXT NOT NULL, revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE,
        error REAL NOT NULL, PRIMARY KEY (base, recipe)
    );
    CREATE INDEX mixes_by_revision ON mixes (revision);
    CREATE TABLE mix_names (
        base TEXT NOT NULL, name TEXT NOT NULL, mix TEXT NOT NULL, follow INTEGER NOT NULL, PRIMARY KEY (base, name)
    );
    """,
    """
    CREATE TABLE passed_over (
        revision INTEGER PRIMARY KEY REFERENCES revisions (id) ON DELETE CASCADE, reason TEXT NOT NULL, at REAL NOT NULL
    );
    CREATE INDEX moves_by_alias ON moves (base, run, alias, id);
    """,
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, name TEXT NOT NULL, adapters TEXT NOT NULL,
        admin INTEGER NOT NULL, base INTEGER NOT NULL, rate TEXT NOT NULL, tokens INTEGER NOT NULL,
        created REAL NOT NULL, used REAL, revoked REAL
    );
    CREATE TABLE key_tokens (
        key TEXT NOT NULL REFERENCES keys (id) ON DELETE CASCADE, day TEXT NOT NULL, tokens INTEGER NOT NULL,
        PRIMARY KEY (key, day)
    );
    """,
    """
    CREATE TABLE splits (
        base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL, seed INTEGER NOT NULL,
        PRIMARY KEY (base, run, alias)
    );
    CREATE TABLE split_revisions (
        id INTEGER PRIMARY KEY, base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
        revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE, share REAL,
        UNIQUE (base, run, alias, revision),
        FOREIGN KEY (base, run, alias) REFERENCES splits (base, run, alias) ON DELETE CASCADE
    );
    CREATE INDEX split_revisions_by_revision ON split_revisions (revision);
    """,
)

NEWEST = len(_VERSIONS)


def default_home() -> Path:
    """`$LORAKIT_HOME`, or `lorakit` in `$XDG_DATA_HOME`."""
    if home := os.environ.get("LORAKIT_HOME"):
        return Path(home).absolute()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lorakit"


def is_store(home: Path) -> bool:
    return (home / FILE).is_file()


class Database:
    """A connection that threads may share. Opening it makes the store where there is none, and brings it up to date.

    Args:
        or_read: where it can't be written, open it to be read; then it is `change` that says why.
        freeing: what is about to be written frees space: let it have what was kept back for that.

    Raises:
        InvalidFile: it is no database, or a damaged one.
        OutOfSpace: the disk is full.
        LorakitError: it can't be opened, or was written by a newer lorakit.
    """

    def __init__(self, home: Path, *, or_read: bool = False, freeing: bool = False) -> None:
        self.home = home
        self._lock = threading.RLock()
        self._freeing = freeing
        self._unwritable: LorakitError | None = None
        try:
            self._connection = self._opened()
        except LorakitError as error:
            found = self._opened_to_read() if or_read else None
            if found is None:
                raise
            self._connection, self._unwritable = found, error

    def _opened(self) -> sqlite3.Connection:
        with disk_errors_named(self.home):
            for folder in (self.home / "revisions", self.home / "tmp"):
                folder.mkdir(parents=True, exist_ok=True)
        clear_abandoned(self.home / "tmp", "")
        if self._freeing and free_bytes(self.home) < ROOM:
            with suppress(OSError):
                (self.home / SPARE).unlink()
        with self._sqlite_errors_named("used"):
            connection = sqlite3.connect(self.home / FILE, timeout=WAIT, check_same_thread=False, isolation_level=None)
            try:
                _use_wal(connection)
                self._bring_up_to_date(connection)
            except BaseException:
                connection.close()
                raise
        _keep_room(self.home)
        return connection

    def _opened_to_read(self) -> sqlite3.Connection | None:
        """None where that can't be, either. A file that nobody writes to needs no other beside it."""
        try:
            apart = (self.home / f"{FILE}-wal").stat().st_size
        except OSError:
            apart = 0
        for way in ("mode=ro",) if apart else ("mode=ro", "immutable=1"):
            where = f"{(self.home / FILE).absolute().as_uri()}?{way}"
            with suppress(sqlite3.Error), ExitStack() as opened:
                connection = sqlite3.connect(
                    where, uri=True, timeout=WAIT, check_same_thread=False, isolation_level=None
                )
                opened.callback(connection.close)
                if _version(connection) == len(_VERSIONS):
                    opened.pop_all()
                    return connection
        return None

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        if _version(connection) == len(_VERSIONS):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = _version(connection)
            if version > len(_VERSIONS):
                raise LorakitError(
                    f"the store '{self.home}' was written by a newer lorakit (schema {version}): upgrade, "
                    f"or set LORAKIT_HOME to another folder"
                )
            for script in _VERSIONS[version:]:
                for statement in _statements(script):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(_VERSIONS)}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _sqlite_errors_named(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free_bytes(self.home) < ROOM):
                cure = "`lorakit store gc --older-than 0s` or `lorakit rm ID --purge` frees some"
                raise OutOfSpace(
                    f"no space left for the store '{self.home}' ({error}), and nothing is changed there: "
                    f"{'remove something else there first' if self._freeing else cure}"
                ) from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise InvalidFile(
                    f"the database of the store '{self.home}' is damaged: {error}; put a backup of '{FILE}' in its "
                    f"place, or set LORAKIT_HOME to another"
                ) from error
            if self.home.is_dir() and os.statvfs(self.home).f_flag & os.ST_RDONLY:
                raise LorakitError(f"the store '{self.home}' can't be written: its file system is read-only") from error
            cure = "; set LORAKIT_HOME to another" if what == "used" else ""
            raise LorakitError(f"the store '{self.home}' can't be {what}: {error}{cure}") from error
        except (UnicodeEncodeError, OverflowError) as error:
            raise LorakitError(f"the store '{self.home}' can't be {what}: {error}") from error

    @property
    def unwritable(self) -> LorakitError | None:
        """Why it was opened to be read alone; None when it can be written."""
        return self._unwritable

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds.

        Raises:
            InvalidFile: the database is damaged.
            LorakitError: SQLite can't read it.
        """
        with self._lock, self._sqlite_errors_named("read"):
            try:
                return self._connection.execute(query, values).fetchall()
            except UnicodeEncodeError:  # no row holds what can't be written
                return []

    def check(self) -> list[str]:
        """What SQLite finds wrong with its file."""
        return [said for (said,) in self.rows("PRAGMA quick_check") if said != "ok"]

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, also against other processes on the same store.

        Raises:
            LorakitError: SQLite can't do it, and nothing is changed.
        """
        if self._unwritable:
            raise self._unwritable
        with self._lock, self._sqlite_errors_named("written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


@contextmanager
def open_database(home: Path, *, freeing: bool = False) -> Iterator[Database]:
    """A store's database for as long as it is looked at; one that can't be written can be looked at all the same."""
    database = Database(home, or_read=True, freeing=freeing)
    try:
        yield database
    finally:
        database.close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait here when another process makes the same new file."""
    until = time.monotonic() + WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _statements(script: str) -> Iterator[str]:
    """One by one, as `executescript` would end the transaction; a trigger has semicolons of its own."""
    begun = ""
    for part in script.split(";"):
        begun += f"{part};"
        if sqlite3.complete_statement(begun):
            yield begun
            begun = ""


def _keep_room(home: Path) -> None:
    """While there is plenty."""
    spare = home / SPARE
    with suppress(OSError):
        if not (spare.is_file() and spare.stat().st_size == ROOM) and free_bytes(home) > 4 * ROOM:
            with spare.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, ROOM)
