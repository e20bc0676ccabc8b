"""Is everything in an image store there and intact, and how to put it right."""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rollouts.picture_png import Decoded
from rollouts.requests import RenderFailure
from rollouts.store import ImageStore, index_path
from rollouts.store_errors import StoreError, translated
from rollouts.store_files import NAME, file_name
from rollouts.store_index import IndexRow

logger = logging.getLogger(__name__)

TEMPORARY_AGE = 600.0
"""Seconds after which a temporary file is no living writer's: one exists for as long as a picture takes to write."""


@dataclass
class StoreReport:
    """What is in a store and what is wrong with it. The first four are counts, the others keys or file names."""

    drawn: int = 0
    """Pictures with a file."""
    dropped: int = 0
    failed: int = 0
    bytes: int = 0
    """Of the files of `drawn`, by the index."""
    missing: list[str] = field(default_factory=list)
    """Keys whose file is gone."""
    corrupt: dict[str, str] = field(default_factory=dict)
    """Keys whose file is not what the index says, and why."""
    orphans: list[str] = field(default_factory=list)
    """Keys of files that the index does not know, or knows as dropped."""
    temporary: list[str] = field(default_factory=list)
    """Files that a kill has left behind half-written."""
    foreign: list[str] = field(default_factory=list)
    """Files below `images/` that are no pictures of ours. They are left alone and are nothing wrong."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not (self.missing or self.corrupt or self.orphans or self.temporary)

    def text(self) -> str:
        """For people: a line of counts, and some of what is wrong."""
        lines = [
            f"{self.drawn} pictures ({self.bytes} bytes), {self.dropped} dropped, {self.failed} failures; "
            f"{len(self.missing)} missing, {len(self.corrupt)} corrupt, {len(self.orphans)} not in the index, "
            f"{len(self.temporary)} temporary files, {len(self.foreign)} files of others"
        ]
        lines += [f"missing: {file_name(key)}" for key in self.missing[:10]]
        lines += [f"corrupt: {why}" for why in islice(self.corrupt.values(), 10)]
        lines += [f"not in the index: {file_name(key)}" for key in self.orphans[:10]]
        lines += [f"temporary: {name}" for name in self.temporary[:10]]
        return "\n".join(lines)


class Rebuilt(NamedTuple):
    """What a new index was made of, and where the old one is."""

    pictures: int
    unreadable: int
    others: int
    """Failures and dropped pictures, out of the old index."""
    scores: int
    moved_to: Path | None


def check_store(store: ImageStore, *, deep: bool = False) -> StoreReport:
    """Compare index and files. Writers may be at work meanwhile.

    Args:
        store: May be open read-only.
        deep: Read every picture and compare its pixels; otherwise only the sizes of files are compared.
    """
    report = StoreReport()
    rows = list(store.everything())  # before the files: a row is written after its file
    sizes = store.files.sizes()
    report.temporary = store.files.temporary(TEMPORARY_AGE)
    with_file = {row.key: row for row in rows if row.uri is not None}
    report.drawn, report.bytes = len(with_file), sum(row.bytes for row in with_file.values())
    report.failed = sum(row.failure is not None for row in rows)
    report.dropped = len(rows) - report.drawn - report.failed
    for key, row in with_file.items():
        size = sizes.get(file_name(key))
        if size is None:
            report.missing.append(key)
        elif size != row.bytes:
            report.corrupt[key] = f"{row.uri} has {size} bytes, and was written with {row.bytes}."
    unknown = []
    for name in sizes:
        if not (match := NAME.fullmatch(name)):
            report.foreign.append(name)
        elif match[2] not in with_file:
            unknown.append(match[2])
    now = store.get_many(unknown, metadata=False)  # some may have got their row since
    report.orphans = [key for key in unknown if key not in now or now[key].uri is None]
    if deep:
        rest = [row for key, row in with_file.items() if key not in report.corrupt and file_name(key) in sizes]
        for row, found in zip(rest, _read_all(store, (row.key for row in rest)), strict=True):
            if isinstance(found, StoreError):
                report.corrupt[row.key] = str(found)
            elif found.pixels != row.pixels:
                report.corrupt[row.key] = f"{row.uri} is intact, but not the picture that the index knows."
    return report


def repair_store(store: ImageStore, report: StoreReport) -> StoreReport:
    """Put right what `check_store` found, and check again.

    Pictures that are gone or broken are forgotten with their scores, so that they are drawn again. Intact ones that
    the index does not know are taken up. Broken files without a row and temporary files are deleted.

    Raises:
        StoreError: Not one picture is there: a disk that is not mounted or a wrong path, more likely than a loss.
    """
    if report.drawn and len(report.missing) == report.drawn:
        raise StoreError(
            "missing_file",
            f"None of the {report.drawn} pictures is at {store.files.uri('images')}: is the disk mounted, the path "
            f"right? If they are really gone, begin anew: delete {store.index}.",
        )
    store.files.delete(report.temporary)
    keys = [*report.missing, *report.corrupt, *report.orphans]
    rows = store.get_many(keys, metadata=False)
    for key, found in zip(keys, _read_all(store, keys), strict=True):
        row = rows.get(key)
        known = row is not None and row.uri is not None
        if isinstance(found, Decoded):
            # Another intact picture: two processes drew it at once, or a file was exchanged. Its scores are unknown.
            if known and (row.bytes, row.pixels) != (found.size, found.pixels):
                store.forget([key], keep_files=True)
            _take_up(store, found)
        elif known:
            store.forget([key])
        else:
            store.files.delete([file_name(key)])
    return check_store(store)


def rebuild_index(path: str | Path, *, index: str | Path | None = None) -> Rebuilt:
    """Make a new index from the pictures; what can still be read in the old one of failures and scores is kept.

    The old index stays beside it under another name. No other process may be using the store.

    Args:
        path: Of the store.
        index: Of the store.

    Raises:
        StoreError: As `ImageStore`.
    """
    where = index_path(str(path), index)
    new = where.with_name(f"{where.name}.new")
    _delete_index(new)
    with ImageStore(path, index=new) as store:
        pictures = unreadable = 0
        keys = [match[2] for name in store.files.sizes() if (match := NAME.fullmatch(name))]
        for found in _read_all(store, keys):
            if isinstance(found, Decoded):
                _take_up(store, found)
                pictures += 1
            else:
                logger.warning("%s", found)
                unreadable += 1
        rows, scores = _salvage(store, where) if where.exists() else (0, 0)
    with translated(where):
        moved_to = _move_aside(where)
        os.replace(new, where)
    return Rebuilt(pictures, unreadable, rows, scores, moved_to)


def _read_all(store: ImageStore, keys: Iterable[str]) -> Iterator[Decoded | StoreError]:
    """Pictures in order, or why they can't be read; a few at a time in memory."""

    def read(key: str) -> Decoded | StoreError:
        try:
            return store.read_picture(key)
        except StoreError as error:
            if error.reason in ("missing_file", "corrupt_file"):
                return error
            raise

    stream = iter(keys)
    with ThreadPoolExecutor(4) as pool:
        while chunk := list(islice(stream, 64)):
            yield from pool.map(read, chunk)


def _take_up(store: ImageStore, found: Decoded) -> None:
    store.put_rows([IndexRow(found.key, None, found.size, found.pixels, found.seconds, found.metadata, {})])


def _salvage(store: ImageStore, old: Path) -> tuple[int, int]:
    """Copy rows without a file and scores from a broken index, as far as they can be read; returns their numbers."""
    rows: dict[str, IndexRow] = {}
    pictures = "SELECT key, reason, message, pixels, seconds, metadata FROM pictures JOIN details USING (id)"
    for values in _readable(old, f"{pictures} WHERE reason IS NOT NULL OR bytes IS NULL ORDER BY id"):
        key, reason, message, pixels, seconds, metadata = values
        failure = None if reason is None else RenderFailure(reason, message or "")
        with suppress(TypeError, ValueError):
            rows[key] = IndexRow(key, failure, None, pixels, float(seconds), json.loads(metadata), {})
    store.put_rows(rows.values())
    known = {row.key for row in store.everything()}
    statement = (
        "SELECT key, name, score FROM scores JOIN pictures ON pictures.id = picture"
        " JOIN scorers ON scorers.id = scorer ORDER BY picture"
    )
    scores = {(key, name): score for key, name, score in _readable(old, statement) if key in known}
    store.put_scores((key, name, score) for (key, name), score in scores.items())
    return len(rows), len(scores)


def _readable(path: Path, statement: str) -> Iterator[tuple[Any, ...]]:
    """Rows before the first page that is broken and, read from the end, those behind the last one."""
    for direction in ("ASC", "DESC"):
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            yield from db.execute(f"{statement} {direction}")


def _move_aside(index: Path) -> Path | None:
    if not index.exists():
        return None
    aside = index.with_name(f"{index.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    # The database itself last: SQLite would read an old WAL file into a new database.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{index}{suffix}", f"{aside}{suffix}")
    return aside


def _delete_index(index: Path) -> None:
    for suffix in ("-wal", "-shm", ""):
        Path(f"{index}{suffix}").unlink(missing_ok=True)
