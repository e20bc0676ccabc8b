"""The SQLite file beside the pictures of an image store: tables, versions, opening.

WAL mode: a reader sees the last committed state while a writer works, and a kill loses at most the open transaction.
"""

import json
import math
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rollouts.requests import RenderFailure
from rollouts.store_errors import StoreError, translated

APPLICATION_ID = 0x74326961  # "t2ia"


def _version_1(db: sqlite3.Connection) -> None:
    """`pictures` has what is asked for often, so that its rows stay small; the long texts are in `details`."""
    db.execute(
        "CREATE TABLE pictures ("
        " id INTEGER PRIMARY KEY,"
        " key TEXT NOT NULL UNIQUE,"  # RenderJob.key
        " reason TEXT,"  # why there is no picture; NULL: it was drawn
        " bytes INTEGER,"  # of the file; NULL: there is none
        " pixels TEXT,"  # SHA-256 of the pixels
        " seconds REAL NOT NULL,"  # it took to draw
        " created REAL NOT NULL,"  # seconds since 1970
        " used REAL NOT NULL)"  # when it was last asked for, give or take a day
    )
    db.execute(
        "CREATE TABLE details ("
        " id INTEGER PRIMARY KEY REFERENCES pictures ON DELETE CASCADE,"
        " message TEXT,"  # of a failure
        " metadata TEXT NOT NULL)"  # JSON: job and request
    )
    db.execute("CREATE TABLE scorers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)")
    db.execute(
        "CREATE TABLE scores ("
        " picture INTEGER NOT NULL REFERENCES pictures ON DELETE CASCADE,"
        " scorer INTEGER NOT NULL REFERENCES scorers,"
        " score REAL,"  # NULL: the scorer gave no number
        " PRIMARY KEY (picture, scorer)) WITHOUT ROWID"
    )


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [_version_1]
"""The n-th one (from 0) turns version n into n + 1; version 0 is an empty file. Only ever append."""


class IndexRow(NamedTuple):
    """A job's outcome as the index takes it; `size` None: without a file."""

    key: str
    failure: RenderFailure | None
    size: int | None
    pixels: str | None
    seconds: float
    metadata: Mapping[str, Any]
    scores: Mapping[str, float | None]


_UPSERT = """
INSERT INTO pictures (key, reason, bytes, pixels, seconds, created, used) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET
    reason = excluded.reason, bytes = excluded.bytes, pixels = excluded.pixels, seconds = excluded.seconds,
    created = excluded.created, used = excluded.used
WHERE pictures.reason IS NOT NULL
    OR (excluded.reason IS NULL AND excluded.bytes IS NOT NULL AND pictures.bytes IS NULL)
RETURNING id
"""


def open_index(path: Path, *, create: bool, read_only: bool, busy_seconds: float) -> sqlite3.Connection:
    """Open an index, make it if it is not there, and bring an older one up to date.

    Args:
        path: The SQLite file.
        create: Otherwise it has to be there.
        read_only: Nothing at all is written, not even the small files SQLite keeps beside a database in WAL mode.
        busy_seconds: How long to wait for another process that is writing.

    Raises:
        StoreError: Any reason but those about pictures.
    """
    if not path.exists() and (read_only or not create):
        raise StoreError("no_store", f"There is no image store with the index {path}; check the path.")
    with translated(path):
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        return _connect_read_only(path, busy_seconds) if read_only else _connect(path, busy_seconds)


@contextmanager
def transaction(db: sqlite3.Connection) -> Generator[None]:
    """All of what is done inside, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself after some errors
            db.execute("ROLLBACK")
        raise


def insert_rows(db: sqlite3.Connection, rows: Iterable[IndexRow]) -> None:
    """Store what became of jobs; a picture stays, and replaces a failure. Inside a transaction."""
    now = time.time()
    for row in rows:
        reason, message = row.failure or (None, None)
        values = (row.key, reason, row.size, row.pixels, row.seconds, now, now)
        if new := db.execute(_UPSERT, values).fetchone():
            # SQLite takes no lone surrogates; in JSON they are escaped.
            message = None if message is None else message.encode("utf-8", "replace").decode()
            db.execute("INSERT OR REPLACE INTO details VALUES (?, ?, ?)", (*new, message, json.dumps(row.metadata)))
        insert_scores(db, ((row.key, scorer, score) for scorer, score in row.scores.items()))


def insert_scores(db: sqlite3.Connection, rows: Iterable[tuple[str, str, float | None]]) -> None:
    """Store key, scorer id and score. Inside a transaction; StoreError (`not_stored`) if there is no such key."""
    scorers: dict[str, int] = {}
    for key, scorer, score in rows:
        if scorer not in scorers:
            db.execute("INSERT OR IGNORE INTO scorers(name) VALUES (?)", (scorer,))
            scorers[scorer] = db.execute("SELECT id FROM scorers WHERE name = ?", (scorer,)).fetchone()[0]
        score = float(score) if score is not None and math.isfinite(score) else None
        statement = "INSERT OR REPLACE INTO scores SELECT id, ?, ? FROM pictures WHERE key = ?"
        if db.execute(statement, (scorers[scorer], score, key)).rowcount != 1:
            raise StoreError("not_stored", f"A score of {scorer} is for {key}, which is not in the store.")


def check_index(db: sqlite3.Connection) -> str | None:
    """What is wrong with the database's structure, or None."""
    try:
        answer = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if answer == "ok" else answer


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    db = _sqlite(f"{path.absolute().as_uri()}?mode=rwc", busy_seconds)
    try:
        _check_version(db, path)
        mode = set_wal(db, busy_seconds)
        if mode != "wal":
            raise StoreError(
                "io",
                f"{path}: this file system can't hold a database in WAL mode (it is in mode {mode}); "
                "name a file on a local disk as `index`.",
            )
        # A power failure may undo the last transactions, but leaves the database whole; kills undo nothing.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _connect_read_only(path: Path, busy_seconds: float) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    db = _sqlite(uri, busy_seconds)
    try:
        try:
            version = _check_version(db, path)
        except sqlite3.OperationalError:
            wal = path.with_name(f"{path.name}-wal")
            if wal.exists() and wal.stat().st_size:
                raise  # what is in there would not be seen
            db.close()
            # In a folder that can't be written to, SQLite reads a WAL database only if told that nobody changes it.
            db = _sqlite(f"{uri}&immutable=1", busy_seconds)
            version = _check_version(db, path)
        if version < len(MIGRATIONS):
            raise StoreError(
                "read_only",
                f"{path} is of version {version}; open it once where it can be written to, to bring it to version "
                f"{len(MIGRATIONS)}.",
            )
    except BaseException:
        db.close()
        raise
    return db


def _sqlite(uri: str, busy_seconds: float) -> sqlite3.Connection:
    # Threads may share the connection: the store has a lock of its own.
    return sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False)


def set_wal(db: sqlite3.Connection, busy_seconds: float) -> str:
    """Put a database into WAL mode; the mode that it is in then.

    SQLite does not wait here by itself: of several processes that open a new database at once, one succeeds.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            return db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _check_version(db: sqlite3.Connection, path: Path) -> int:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            "newer_version",
            f"{path} is of version {version}, and this package knows versions up to {len(MIGRATIONS)}: "
            "install the version of t2i-align that wrote it, or use another path.",
        )
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError("no_store", f"{path} is an SQLite database of another program; choose another path.")
    return version


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    with transaction(db):
        version = _check_version(db, path)  # another process may have been quicker
        for step in MIGRATIONS[version:]:
            step(db)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
