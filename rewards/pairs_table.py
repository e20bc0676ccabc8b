"""Reading what is to be scored: a table of prompts and images, or a folder of images with their prompts."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class TableError(ValueError):
    """A table or folder that can't be read; the message names it, the row and the column."""


@dataclass(frozen=True)
class Pairs:
    """Prompts and images, in order.

    Attributes:
        prompts: As found: a value that is no text becomes an error of its row when it is scored.
        images: Paths (as strings), or file contents where the table holds them.
        names: What to call each image in results.
        kept: Further columns to carry into results.
    """

    prompts: list[Any]
    images: list[Any]
    names: list[str]
    kept: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """Hash of prompts, image names, and the images' sizes and times, to notice that a table has changed."""
        hasher = hashlib.sha256()
        for prompt, image, name in zip(self.prompts, self.images, self.names, strict=True):
            if isinstance(image, bytes):
                state: Any = hashlib.sha256(image).hexdigest()
            else:
                path = Path(str(image))
                state = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
            hasher.update(json.dumps([str(prompt), name, state]).encode())
        return hasher.hexdigest()


def read_pairs(source: str | Path, *, prompt_column: str, image_column: str, keep: Sequence[str] = ()) -> Pairs:
    """Read a .jsonl, .csv, .tsv or .parquet table, or a folder of images.

    A folder follows the `imagefolder` convention (metadata.jsonl, .csv or .parquet with the column `file_name`), or has
    a text file beside each image (`0001.png`, `0001.txt`). Paths are relative to the table. A Parquet image may be a
    path, bytes, or a struct of both as `datasets` writes it.

    Raises:
        TableError: Missing, of an unknown kind, broken, empty, or without the columns.
    """
    path = Path(source)
    if path.is_dir():
        for name in _METADATA:
            if (path / name).is_file():
                return read_pairs(path / name, prompt_column=prompt_column, image_column="file_name", keep=keep)
        return _read_folder(path)
    if not path.is_file():
        raise TableError(f"There is no table or folder {path}.")
    rows = list(_read_rows(path))
    if not rows:
        raise TableError(f"{path} has no rows.")
    columns = {key for row in rows for key in row}
    for column in (prompt_column, image_column, *keep):
        if column not in columns:
            raise TableError(f"{path} has no column `{column}`; it has {', '.join(sorted(columns))}.")
    images, names = [], []
    for number, row in enumerate(rows):
        image, name = _image_of(row.get(image_column), path.parent, number)
        images.append(image)
        names.append(name)
    kept = {column: [row.get(column) for row in rows] for column in keep}
    return Pairs([row.get(prompt_column) for row in rows], images, names, kept)


def _read_folder(folder: Path) -> Pairs:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not images:
        raise TableError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    prompts = []
    for image in images:
        text = image.with_suffix(".txt")
        prompts.append(text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else None)
    if not any(prompts):
        raise TableError(
            f"{folder} has no prompts: add metadata.jsonl with `file_name` and `prompt`, or a .txt beside each image."
        )
    return Pairs(prompts, [str(image) for image in images], [str(image.relative_to(folder)) for image in images], {})


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        else:
            raise TableError(f"{path}: a table must be .jsonl, .csv, .tsv or .parquet.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path} can't be read: {error}.") from error
    except ValueError as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path} is broken: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TableError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise TableError(f"{path}, line {number} must be an object, but is {type(row).__name__}.")
            yield row


def _image_of(value: Any, folder: Path, row: int) -> tuple[Any, str]:
    """An image's path or content and its name; None where the table has none, an error of that row later."""
    if isinstance(value, dict):  # how `datasets` stores an image
        if value.get("bytes") is not None:
            return value["bytes"], str(value.get("path") or f"row {row}")
        value = value.get("path")
    if isinstance(value, bytes):
        return value, f"row {row}"
    if value is None or value == "":
        return None, ""
    return str(folder / str(value)), str(value)
