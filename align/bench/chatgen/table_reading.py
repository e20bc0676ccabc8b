"""Rows of tables in whatever form people have them, one after the other."""

import contextlib
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align.bench.sources import SourceError, open_source

_ENDINGS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_LONGEST = 1 << 24  # characters of one JSON value or cell


class Place(NamedTuple):
    """A row of theirs, and where it stands.

    Attributes:
        name: Of the file or split, and of the list in it.
        row: What is there.
        problem: Why there is no row.
    """

    name: str
    row: Any
    problem: str | None = None


def read_table(source: Path) -> Iterator[Place]:
    """The rows of a table, one after the other.

    Raises:
        SourceError: There is none, or one breaks off; naming the file and the way out.
    """
    if source.is_dir() and ((source / "dataset_dict.json").is_file() or (source / "state.json").is_file()):
        yield from _read_saved(source)
        return
    files = sorted(file for file in source.iterdir() if file.name.endswith(_ENDINGS)) if source.is_dir() else [source]
    if not files or not all(file.is_file() and file.name.endswith(_ENDINGS) for file in files):
        known = ", ".join(_ENDINGS)
        raise SourceError(f"`source` {source} must be a file, or a folder of files, of {known}, or saved by datasets.")
    for file in files:
        readers = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
        ending = next(kind for kind in _ENDINGS if file.name.endswith(kind))
        try:
            yield from readers.get(ending.removesuffix(".gz"), _read_lines)(file)
        except (EOFError, OSError, zlib.error, csv.Error) as error:
            raise SourceError(f"{file} can't be read on ({error}): get it again, or mend it.") from error


def _text(file: Path) -> Any:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8-sig", errors="replace", newline="")


def _read_lines(file: Path) -> Iterator[Place]:
    for item in open_source(str(file))():
        yield Place(file.name, item.record, item.problem)


def _read_csv(file: Path) -> Iterator[Place]:
    with _text(file) as lines:
        rows = csv.DictReader(lines, delimiter="\t" if ".tsv" in file.suffixes else ",")
        with _long_cells():
            names = rows.fieldnames or ()
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise SourceError(f"{file}: the column {twice[0]!r} stands more than once; rename one.")
        while True:
            with _long_cells():
                row = next(rows, None)
            if row is None:
                return
            yield Place(file.name, row, "more cells than columns" if None in row else None)


@contextlib.contextmanager
def _long_cells() -> Generator[None]:
    """The limit is the whole process's, so it is raised only while a row is read."""
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path) -> Iterator[Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in (table := pq.ParquetFile(file)).iter_batches(batch_size=200):
            yield from (Place(file.name, row) for row in batch.to_pylist())
        table.close()
    except pa.ArrowException as error:
        raise SourceError(f"{file} is no Parquet file that can be read: {error}") from error


def _read_saved(folder: Path) -> Iterator[Place]:
    import datasets

    try:
        data: Any = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise SourceError(f"`source` {folder} can't be loaded by datasets.load_from_disk: {error}") from error
    for name, rows in data.items() if isinstance(data, dict) else [(folder.name, data)]:
        # As Arrow, so that pictures stay the bytes they are.
        for batch in rows.with_format("arrow").iter(200):
            yield from (Place(str(name), row) for row in batch.to_pylist())


def _read_json(file: Path) -> Iterator[Place]:
    """The objects of a list, or of the lists of an object, without ever holding the whole file."""
    with _text(file) as handle:
        text = _JsonText(file, handle)
        if text.next_is("["):
            yield from text.items(file.name)
        elif text.next_is("{"):
            while not text.next_is("}"):
                name = text.value()
                text.expect(":")
                if text.next_is("["):
                    yield from text.items(f"{file.name} {name}")
                else:
                    text.value()
                text.next_is(",")
        else:
            raise SourceError(f"{file} must be a JSON list, or an object with a list in it.")


class _JsonText:
    """A JSON text that is read piece by piece."""

    def __init__(self, file: Path, handle: Any) -> None:
        self._file, self._handle, self._text, self._at, self._done = file, handle, "", 0, 0

    def _more(self) -> bool:
        piece = self._handle.read(max(1 << 16, len(self._text) - self._at))
        if piece:
            self._done += self._at
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _skip_blanks(self) -> str:
        """The next character that is none, which is not taken."""
        while True:
            rest = re.compile(r"[ \t\r\n]*").match(self._text, self._at)
            self._at = rest.end() if rest else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def next_is(self, character: str) -> bool:
        """Take this character if it comes next."""
        found = self._skip_blanks() == character
        self._at += found
        return found

    def expect(self, character: str) -> None:
        """Take this character."""
        if not self.next_is(character):
            raise SourceError(
                f"{self._file} is no JSON: `{character}` is missing at character {self._done + self._at}."
            )

    def value(self) -> Any:
        """Take the value that comes next."""
        self._skip_blanks()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at < _LONGEST and self._more():
                    continue
                raise SourceError(f"{self._file} is no JSON near character {self._done + self._at}: {error}") from error
            # A number may go on in the next piece: after `0.`, say.
            ended = isinstance(value, dict | list | str) or self._text[end : end + 1] in tuple(" \t\r\n,:]}")
            if ended or not self._more():
                self._at = end
                return value

    def items(self, name: str) -> Iterator[Place]:
        """Take the list whose bracket was taken."""
        while not self.next_is("]"):
            yield Place(name, self.value())
            if self._skip_blanks() != "]":
                self.expect(",")
