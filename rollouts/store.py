"""What was drawn and how it was scored, by the jobs' keys: pictures as PNG files, everything else in an SQLite index.

    store = ImageStore("runs/pictures")                                        # or s3://bucket/pictures, index="…"
    todo = store.missing(job.key for job in jobs)
    store.put_many([(job, request_to_dict(request), result), ...])
    image = store.load(job.key)

    python -m rollouts.store verify --store runs/pictures --deep true          # is everything there and intact?
    python -m rollouts.store export --store runs/pictures --output pictures/   # as a data set
    python -m rollouts.store prune --store runs/pictures --max_bytes 50000000000

A kill at any moment loses at most the `put_many` in flight; several processes may write at once.
"""

import json
import re
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rollouts.api import APICall
from rollouts.picture_png import Decoded, PictureError, decode_picture
from rollouts.picture_writer import picture_metadata, write_pictures
from rollouts.requests import RenderFailure, RenderJob, RenderRequest, RenderResult
from rollouts.store_errors import StoreError, translated
from rollouts.store_files import LocalFiles, file_name, open_files
from rollouts.store_index import IndexRow, check_index, insert_rows, insert_scores, open_index, transaction

TRANSIENT = ("missing_file", "outside_folder", "wrong_hash", "corrupt", "out_of_memory", "worker_lost", "error")
"""Failures that may go away, because the machine or its folder of weights can change. All others follow from what is in
the key (call, catalogue, weights, renderer): the same job would fail again."""

DAY = 86_400.0  # seconds
_KEY = re.compile(r"[0-9a-f]{64}")
_CHUNK = 50_000  # keys per statement


class Stored(NamedTuple):
    """What the store has for a key.

    Attributes:
        key: Of the job.
        failure: Why there is no picture; None: it was drawn.
        uri: Path or URL of the picture; None: it was not drawn, or was dropped.
        seconds: It took to draw.
        bytes: Of the file; 0 if there is none.
        pixels: SHA-256 of the pixels (`picture_png.pixels_digest`), of a dropped picture, too; empty for a failure.
        created: When it was put, in seconds since 1970.
        used: When it was last asked for (`missing`), give or take a day.
        metadata: `job` and `request`, enough to draw it again; None if it was not asked for.
    """

    key: str
    failure: RenderFailure | None
    uri: str | None
    seconds: float
    bytes: int
    pixels: str
    created: float
    used: float
    metadata: dict[str, Any] | None

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "ok" if self.failure is None else "failed"


class ImageStore:
    """Pictures and scores by key. Safe to use from several threads and, each with its own, from several processes.

    Pictures are `<path>/images/ab/<key>.png`, the index is `<path>/index.sqlite`. See `picture_png` for what a picture
    says of itself.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        index: str | Path | None = None,
        create: bool = True,
        read_only: bool = False,
        num_workers: int = 4,
        busy_seconds: float = 30.0,
    ):
        """Open a store, or begin one.

        Args:
            path: A local folder or an fsspec URL (s3://, gs://, memory://, ...; the file system's package has to be
                installed).
            index: The SQLite file, which has to be local; needed if `path` is not.
            create: Begin one if there is none.
            read_only: Write nothing; works in a folder that can't be written to.
            num_workers: Threads that encode and write pictures.
            busy_seconds: How long to wait for another process that is writing to the index.

        Raises:
            StoreError: There is none, it can't be read or written, or it is of a newer version.
        """
        self.files = open_files(str(path))
        self.index = index_path(str(path), index)
        self.read_only, self._num_workers = read_only, num_workers
        self._lock = threading.RLock()
        self._db = open_index(self.index, create=create, read_only=read_only, busy_seconds=busy_seconds)

    def close(self) -> None:
        """Close the index. What was put stays put without it, too."""
        self._db.close()

    def __enter__(self) -> "ImageStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Keys, drawn or failed."""
        return self._read("SELECT count(*) FROM pictures")[0][0]

    def get(self, key: str) -> Stored | None:
        """What there is for a key, or None."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str], *, metadata: bool = True) -> dict[str, Stored]:
        """What there is for these keys; keys without anything are left out. `metadata` costs time."""
        rows = self._read_keys(f"{_select(metadata)} JOIN json_each(?) AS wanted ON pictures.key = wanted.value", keys)
        return {row.key: row for row in map(self._stored, rows)}

    def everything(self, *, metadata: bool = False) -> Iterator[Stored]:
        """All there is, in the order it was first put."""
        last = 0
        while rows := self._read(f"{_select(metadata)} WHERE pictures.id > ? ORDER BY pictures.id LIMIT 10000", last):
            yield from map(self._stored, rows)
            last = rows[-1][-1]

    def missing(self, keys: Iterable[str], *, retry_failed: bool = False, need_images: bool = False) -> list[str]:
        """Those of the keys that are still to be drawn, each once, in order. Marks the others as used.

        Args:
            keys: Any number of them.
            retry_failed: Failures that may go away (`TRANSIENT`) count as missing. Without it, no failure does; to try
                the others again, `prune --failed true` forgets them.
            need_images: Pictures that were dropped count as missing.
        """
        wanted = list(dict.fromkeys(keys))
        reasons = ", ".join(f"'{reason}'" for reason in TRANSIENT)
        failed = f"reason NOT IN ({reasons})" if retry_failed else "reason IS NOT NULL"
        drawn = "reason IS NULL AND bytes IS NOT NULL" if need_images else "reason IS NULL"
        known = f"FROM pictures JOIN json_each(?) AS wanted ON pictures.key = wanted.value WHERE ({drawn} OR {failed})"
        have = {row[0]: row[1] for row in self._read_keys(f"SELECT pictures.key, used {known}", wanted)}
        if not self.read_only:
            yesterday = time.time() - DAY
            self._mark_as_used([key for key, used in have.items() if used < yesterday])
        return [key for key in wanted if key not in have]

    def load(self, key: str) -> Image.Image:
        """The picture of a key (RGB), checked to the last pixel.

        Raises:
            StoreError: There is none (`not_stored`), its file is gone (`missing_file`) or broken (`corrupt_file`).
        """
        row = self.get_many([key], metadata=False).get(key)
        if row is None:
            raise StoreError("not_stored", f"The store has nothing under {key}; draw it first.")
        if row.failure is not None:
            raise StoreError("not_stored", f"{key} was not drawn: {row.failure.reason}: {row.failure.message}")
        if row.uri is None:
            raise StoreError(
                "not_stored", f"The picture {key} was dropped; draw it again (`missing(need_images=True)`)."
            )
        return self.read_picture(key).image

    def read_picture(self, key: str) -> Decoded:
        """A picture's file, whatever the index says, checked to the last pixel.

        Raises:
            StoreError: `missing_file` or `corrupt_file`.
        """
        advice = "`python -m rollouts.store verify --deep true --repair true` forgets it, so that it is drawn again."
        try:
            found = decode_picture(self.files.read(file_name(key)))
        except StoreError as error:
            raise StoreError(
                error.reason, f"{error} {advice}" if error.reason == "missing_file" else str(error)
            ) from error
        except PictureError as error:
            raise StoreError("corrupt_file", f"{self.files.uri(file_name(key))}: {error}. {advice}") from error
        if found.key != key:
            raise StoreError("corrupt_file", f"{self.files.uri(file_name(key))} is the picture {found.key}. {advice}")
        return found

    def scores(self, keys: Iterable[str], scorer_id: str) -> dict[str, float | None]:
        """Scores of one scorer; keys without one are left out. None: the scorer gave no number.

        Args:
            keys: Any number of them.
            scorer_id: A name that changes whenever the scores would: with the weights and options, say.
        """
        rows = self._read_keys(
            "SELECT pictures.key, score FROM json_each(?) AS wanted JOIN pictures ON pictures.key = wanted.value"
            " JOIN scores ON picture = pictures.id JOIN scorers ON scorers.id = scorer WHERE scorers.name = ?",
            keys,
            scorer_id,
        )
        return dict(rows)

    def scorer_ids(self) -> list[str]:
        """Scorers that have ever scored something here, sorted."""
        return sorted(row[0] for row in self._read("SELECT name FROM scorers"))

    def index_problem(self) -> str | None:
        """What is wrong with the structure of the index, or None. Reads all of it."""
        with self._lock:
            return check_index(self._db)

    def put_many(
        self, rows: Iterable[tuple[RenderJob, Mapping[str, Any], RenderResult]], *, keep_images: bool = True
    ) -> None:
        """Store what became of some jobs: first all files, then all rows in one transaction.

        What was drawn stays: a second picture of the same key is ignored, and so is a failure; a picture replaces a
        failure, and brings back one that was dropped. The results' scores are stored under the scorers' names.

        Args:
            rows: Job, request (`request_to_dict`) and result.
            keep_images: Without it, only rows and scores are stored, as if the pictures had been dropped at once.

        Raises:
            StoreError: Nothing of it was stored. (Files may have been written; the next `put_many` of the same jobs,
                or `verify --repair true`, takes them up.)
            ValueError: A key that is none, or a result that is another job's or has neither picture nor failure.
        """
        rows = list(rows)
        for job, _, result in rows:
            _check_result(job, result)
        self._check_writable()
        have = self.get_many((job.key for job, _, _ in rows), metadata=False)
        with_file = {key for key, row in have.items() if row.uri is not None}
        drawn = {row[0].key: row for row in rows if row[2].image is not None and row[0].key not in with_file}
        written = write_pictures(self.files, drawn.values(), keep_images=keep_images, num_workers=self._num_workers)
        self.put_rows(
            IndexRow(
                job.key,
                result.failure,
                *written.get(job.key, (None, None)),
                result.seconds,
                picture_metadata(job, request),
                result.scores,
            )
            for job, request, result in rows
        )

    def put_rows(self, rows: Iterable[IndexRow]) -> None:
        """Store rows of the index, by the rules of `put_many`; their files are the caller's matter."""
        with self._write():
            insert_rows(self._db, rows)

    def put_scores(self, rows: Iterable[tuple[str, str, float | None]]) -> None:
        """Store scores in one transaction; a later one replaces an earlier one.

        Args:
            rows: Key, scorer id (see `scores`) and score; None or a number that is not finite: it gave no number.

        Raises:
            StoreError: `not_stored`: a key is not in the store. Nothing was stored.
        """
        with self._write():
            insert_scores(self._db, rows)

    def drop_images(self, keys: Iterable[str]) -> int:
        """Delete pictures but keep rows and scores. Returns the bytes that were freed; unknown keys are ignored."""
        return self._remove(keys, "UPDATE pictures SET bytes = NULL WHERE key IN (SELECT value FROM json_each(?))")

    def forget(self, keys: Iterable[str], *, keep_files: bool = False) -> int:
        """Delete rows, scores and pictures. Returns the bytes that were freed; unknown keys are ignored."""
        statement = "DELETE FROM pictures WHERE key IN (SELECT value FROM json_each(?))"
        return self._remove(keys, statement, keep_files=keep_files)

    def _remove(self, keys: Iterable[str], statement: str, *, keep_files: bool = False) -> int:
        """Rows first: a kill in between leaves files without a row, not rows without a file."""
        have = self.get_many(keys, metadata=False)
        with self._write():
            for chunk in _chunks(have):
                self._db.execute(statement, (json.dumps(chunk),))
        if keep_files:
            return 0
        self.files.delete(file_name(row.key) for row in have.values() if row.uri is not None)
        return sum(row.bytes for row in have.values())

    def _mark_as_used(self, keys: list[str]) -> None:
        if keys:
            with self._write():
                for chunk in _chunks(keys):
                    self._db.execute(
                        "UPDATE pictures SET used = ? WHERE key IN (SELECT value FROM json_each(?))",
                        (time.time(), json.dumps(chunk)),
                    )

    def _stored(self, row: tuple[Any, ...]) -> Stored:
        key, reason, size, pixels, seconds, created, used, message, metadata, _ = row
        return Stored(
            key,
            None if reason is None else RenderFailure(reason, message or ""),
            None if size is None else self.files.uri(file_name(key)),
            seconds,
            size or 0,
            pixels or "",
            created,
            used,
            None if metadata is None else json.loads(metadata),
        )

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreError("read_only", f"{self.index} was opened with `read_only`; open it without.")

    @contextmanager
    def _write(self) -> Generator[None]:
        self._check_writable()
        with self._lock, translated(self.index), transaction(self._db):
            yield

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, translated(self.index):
            return self._db.execute(statement, values).fetchall()

    def _read_keys(self, statement: str, keys: Iterable[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        """Rows of a statement whose first parameter is a JSON list of keys."""
        for chunk in _chunks(keys):
            yield from self._read(statement, json.dumps(chunk), *values)


def index_path(path: str, index: str | Path | None) -> Path:
    """Where the index of a store is.

    Raises:
        StoreError: `path` is remote and `index` is not given, or is remote itself.
    """
    files = open_files(path)
    if index is None and not isinstance(files, LocalFiles):
        raise StoreError("io", f"`index` is needed: SQLite can't work at {path}; name a file on a local disk.")
    if index is not None and "://" in str(index):
        raise StoreError("io", f"`index` must be a file on a local disk, but is {index}.")
    return Path(files.uri("index.sqlite")) if index is None else Path(index)


def request_from_dict(value: Mapping[str, Any]) -> RenderRequest:
    """What `request_to_dict` has written: `Stored.metadata["request"]`."""
    values: dict[str, Any] = dict(value)
    return RenderRequest(APICall.from_dict(values.pop("call")), **values)


def _check_result(job: RenderJob, result: RenderResult) -> None:
    if not _KEY.fullmatch(job.key):
        raise ValueError(f"A key must be 64 hexadecimal digits in lower case, but is {job.key!r:.80}.")
    if result.key != job.key:
        raise ValueError(f"The result of {result.key} can't be stored for the job {job.key}.")
    if (result.image is None) == (result.failure is None):
        raise ValueError(f"The result of {job.key} must have a picture or a failure, and not both.")


def _select(metadata: bool) -> str:
    """The columns `_stored` takes, and the id."""
    columns = "pictures.key, reason, bytes, pixels, seconds, created, used, message, "
    return (
        f"SELECT {columns} {'metadata' if metadata else 'NULL'}, pictures.id"
        " FROM pictures LEFT JOIN details ON details.id = pictures.id"
    )


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    keys = list(keys)
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]


if __name__ == "__main__":
    from rollouts.store_commands import run

    run()
