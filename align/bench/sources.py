"""Where the records of a model community come from: a dump, a folder of JSON files, or the live REST API.

Every source is a stream of `Item`s: one Civitai `/models` object each, or the reason why a piece of it is none. A
stream can be read again from the start, which the builder does: once to index, once to make rows.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

Opener = Callable[[], Iterator["Item"]]


class Item(NamedTuple):
    """One record, or what stood in its place.

    Attributes:
        location: File and line, for messages.
        record: The parsed JSON value, or `None` if it could not be parsed.
        problem: Why not.
    """

    location: str
    record: Any
    problem: str | None = None


class SourceError(ValueError):
    """A source that can't be read on: the message names the file, the place and the way out."""


def open_source(source: str, api: Callable[[str], Iterator[dict[str, Any]]] | None = None) -> Opener:
    """A function that streams `source` from its start each time it is called.

    Args:
        source: Path of a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` dump, of a folder of `.json` files (each one object, a
            list, or an API page with `items`), or the base URL of the API.
        api: Streams the models of an API base URL; required for URLs.

    Raises:
        SourceError: If there is nothing readable at `source`.
    """
    if source.startswith(("http://", "https://")):
        if api is None:
            raise SourceError(f"`source` {source} is a URL, but no API client was given.")
        return lambda: (Item(f"{source} model {i}", record) for i, record in enumerate(api(source), start=1))
    path = Path(source)
    if path.is_dir():
        if not any(path.glob("*.json")):
            raise SourceError(f"`source` {path} is a folder without a single .json file.")
        return lambda: _read_folder(path)
    if not path.is_file():
        raise SourceError(f"`source` {path} is neither a file, nor a folder, nor a URL.")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise SourceError(f"`source` {path} must end in .jsonl, .jsonl.gz or .jsonl.zst (or be a folder or a URL).")
    return lambda: _read_lines(path)


def source_fingerprint(source: str) -> dict[str, Any]:
    """What tells this input from another one: names, sizes and times of files, the URL of an API."""
    path = Path(source)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
    return {
        "source": source,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise SourceError(f'Reading {path} needs zstandard: pip install "t2i-align[bench]".') from error
        return io.TextIOWrapper(
            zstandard.open(path, "rb", dctx=zstandard.ZstdDecompressor()), encoding="utf-8", errors="replace"
        )
    return path.open(encoding="utf-8", errors="replace")


def _read_lines(path: Path) -> Iterator[Item]:
    number = 0
    with _open_text(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(f"{path.name}:{number}", line)
        # EOFError: a truncated gzip; the others: corrupt data (zstandard's error is no subclass of a built-in one).
        except Exception as error:
            if not isinstance(error, EOFError | OSError | zlib.error) and type(error).__name__ != "ZstdError":
                raise
            raise SourceError(
                f"{path} breaks off after line {number} ({error}): the file is truncated or damaged. "
                "Get it again, or unpack what is there to a .jsonl and use that."
            ) from error


def _read_folder(path: Path) -> Iterator[Item]:
    for file in sorted(path.glob("*.json")):
        item = _parse(file.name, file.read_text(encoding="utf-8", errors="replace"))
        records = item.record
        if isinstance(records, dict) and isinstance(records.get("items"), list):
            records = records["items"]
        if not isinstance(records, list):
            yield item
            continue
        for number, record in enumerate(records, start=1):
            yield Item(f"{file.name}[{number}]", record)


def _parse(location: str, text: str) -> Item:
    try:
        return Item(location, json.loads(text))
    except (ValueError, RecursionError) as error:
        return Item(location, None, f"not JSON: {error}")
