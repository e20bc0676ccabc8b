"""Rows of a JSON Lines or Parquet file with their numbers, for messages that say where something is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: Path, error: type[Exception]) -> Iterator[tuple[int, Any]]:
    """Rows from 1 on: of a `.parquet` file, or of any other as JSON Lines.

    Args:
        path: The file; it has to exist.
        error: What is raised if it can't be read; its message names the file and the row.
    """
    return _read_parquet(path, error) if path.suffix == ".parquet" else _read_jsonl(path, error)


def _read_jsonl(path: Path, error: type[Exception]) -> Iterator[tuple[int, Any]]:
    # Read as bytes, so that a row that is not UTF-8 is found out where its number is known.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, json.loads(line.decode())
            except (ValueError, RecursionError) as problem:
                raise error(f"{path}, row {number}: not JSON ({problem})") from problem


def _read_parquet(path: Path, error: type[Exception]) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as problem:
        raise error(f"{path}: not a Parquet file ({problem})") from problem
    yield from enumerate(rows, start=1)
