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
from typing import Any, NamedTuple

# Records nest about ten levels. What nests deeper than this can't be stored again: Python's JSON writer is recursive.
MAX_DEPTH = 100
# Packed bytes are unpacked in pieces of this size: even a file of zeros (packed 10,000 to 1) then needs little memory.
_ZSTD_CHUNK_BYTES = 1 << 12

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
        return lambda: (_checked(f"{source} model {i}", record) for i, record in enumerate(api(source), start=1))
    path = Path(source)
    if path.is_dir():
        if not _json_files(path):
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
    files = _json_files(path) if path.is_dir() else [path] if path.is_file() else []
    return {
        "source": source,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


class _ZstdReader(io.RawIOBase):
    """The content of a .zst file. zstandard's own reader takes a truncated frame for the end of the file."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise SourceError(f'Reading {path} needs zstandard: pip install "t2i-align[bench]".') from error
        # Large dumps are packed with long windows (`zstd --long=31`).
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._unpacked = memoryview(b"")
        self._packed = b""
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            data = self._packed or self._file.read(_ZSTD_CHUNK_BYTES)
            if not data:
                if self._in_frame:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            if not self._in_frame:
                self._frame = self._decompressor.decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
            self._in_frame = not self._frame.eof
            self._packed = self._frame.unused_data
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdReader(path)) if path.suffix == ".zst" else path.open("rb")


def _read_lines(path: Path) -> Iterator[Item]:
    number = 0
    try:
        # utf-8-sig: some editors put a byte order mark in front.
        with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(f"{path.name}:{number}", line)
    except (EOFError, OSError, zlib.error) as error:  # truncated, unreadable, damaged
        raise SourceError(
            f"{path} breaks off after line {number} ({error}): the file is truncated or damaged. "
            "Get it again, or unpack what is there to a .jsonl and use that."
        ) from error


def _json_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*.json") if file.is_file())


def _read_folder(path: Path) -> Iterator[Item]:
    for file in _json_files(path):
        try:
            text = file.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise SourceError(f"Can't read {file}: {error.strerror}.") from error
        item = _parse(file.name, text)
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
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Item(location, None, f"not JSON: {error}")
    return _checked(location, record)


def _checked(location: str, record: Any) -> Item:
    if _is_deeper(record, MAX_DEPTH):
        return Item(location, None, f"nested more than {MAX_DEPTH} levels deep")
    return Item(location, record)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value nests lists and objects deeper than this. Not recursive."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
