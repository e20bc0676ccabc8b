"""What to do with an image store.

    python -m rollouts.store verify --store runs/pictures [--deep true] [--repair true]
    python -m rollouts.store export --store runs/pictures --output pictures/ [--model TEXT] [--prompt TEXT]
    python -m rollouts.store prune --store runs/pictures [--max_bytes N] [--unused_days N] [--dry_run true]

`python -m rollouts.store WORD --help` lists all options. A store at a URL (s3://, gs://, ...) needs `--index`, too.
"""

import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewards.commandline import run_command
from rewards.files import write_atomically
from rollouts.store import DAY, ImageStore, Stored, index_path
from rollouts.store_check import StoreReport, check_store, rebuild_index, repair_store
from rollouts.store_errors import StoreError, translated
from rollouts.store_files import file_name, open_files

logger = logging.getLogger(__name__)


@dataclass
class VerifyConfig:
    """Options of `python -m rollouts.store verify`."""

    store: str = field(metadata={"help": "Folder or URL of the store."})
    index: str | None = field(default=None, metadata={"help": "Its SQLite file; none: index.sqlite in the folder."})
    deep: bool = field(default=False, metadata={"help": "Read every picture; otherwise only sizes are compared."})
    repair: bool = field(
        default=False,
        metadata={"help": "Forget what is gone or broken (it will be drawn again), take up pictures without a row."},
    )


@dataclass
class ExportConfig:
    """Options of `python -m rollouts.store export`."""

    store: str = field(metadata={"help": "Folder or URL of the store."})
    output: str = field(metadata={"help": "Folder to write: images/ and a table, together what load_dataset reads."})
    index: str | None = field(default=None, metadata={"help": "Its SQLite file; none: index.sqlite in the folder."})
    format: Literal["parquet", "jsonl"] = field(default="parquet", metadata={"help": "Of the table."})
    model: str | None = field(default=None, metadata={"help": "Only of models (or LoRAs) whose name has this in it."})
    prompt: str | None = field(default=None, metadata={"help": "Only of prompts that have this in them."})
    status: Literal["ok", "dropped", "failed", "all"] = field(
        default="ok", metadata={"help": "ok: what has a picture. A row without one has null for its file_name."}
    )


@dataclass
class PruneConfig:
    """Options of `python -m rollouts.store prune`."""

    store: str = field(metadata={"help": "Folder or URL of the store."})
    index: str | None = field(default=None, metadata={"help": "Its SQLite file; none: index.sqlite in the folder."})
    keep_referenced_by: str | None = field(
        default=None,
        metadata={"help": "Parquet table (scored candidates, say): what it names stays; alone: all else is dropped."},
    )
    failed: bool = field(default=False, metadata={"help": "Forget failures, so that they are tried again."})
    max_bytes: int | None = field(
        default=None, metadata={"help": "Drop pictures, least recently used first, until no more than this is left."}
    )
    unused_days: float | None = field(default=None, metadata={"help": "Drop pictures not used for so many days."})
    dry_run: bool = field(default=False, metadata={"help": "Only say what would be done."})

    def __post_init__(self) -> None:
        if not (self.failed or self.keep_referenced_by) and self.max_bytes is None and self.unused_days is None:
            raise ValueError("Say what to prune: `keep_referenced_by`, `failed`, `max_bytes` or `unused_days`.")
        for name in ("max_bytes", "unused_days"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must be at least 0, but is {value}.")


def verify(config: VerifyConfig) -> StoreReport:
    """Check a store and, if asked, repair it; exit code 1 if something is wrong and stays so."""
    try:
        store = ImageStore(config.store, index=config.index, create=False, read_only=not config.repair)
        if problem := store.index_problem():
            store.close()
            raise StoreError("corrupt", f"{store.index}: {problem}; `--repair true` makes a new one from the pictures.")
    except StoreError as error:
        if error.reason != "corrupt" and not (config.repair and _only_index_is_gone(config)):
            raise
        if not config.repair:
            logger.error("%s", error)
            sys.exit(1)
        logger.info("%s", error)
        rebuilt = rebuild_index(config.store, index=config.index)
        logger.info(
            "A new index: %d pictures, %d unreadable files. Of the old (now %s): %d rows without picture, %d scores.",
            *rebuilt[:2], rebuilt.moved_to, rebuilt.others, rebuilt.scores,
        )  # fmt: skip
        store = ImageStore(config.store, index=config.index, create=False)
    with store:
        report = check_store(store, deep=config.deep)
        logger.info("%s", report.text())
        if config.repair and not report.ok:
            report = repair_store(store, report)
            logger.info("After the repair: %s", report.text())
    if not report.ok:
        sys.exit(1)
    return report


def export(config: ExportConfig) -> int:
    """Copy pictures out of a store and write a table of them; returns its number of rows.

    `datasets.load_dataset(output)` gives the pictures with the other columns, one per scorer among them. Files keep
    their keys as names: words of prompts would be taken for names of splits ("test") or get out of the folder.
    """
    output = Path(config.output)
    with ImageStore(config.store, index=config.index, create=False, read_only=True) as store:
        rows = [row for row in store.everything(metadata=True) if _chosen(row, config)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda row: _copy(store, row, output), rows))
        scores = {name: store.scores((row.key for row in rows), name) for name in store.scorer_ids()}
    records = [_record(row) | {f"score_{name}": scores[name].get(row.key) for name in scores} for row in rows]
    _write_table(output / f"metadata.{config.format}", records)
    logger.info("%s: %d rows, %d pictures", output, len(rows), sum(row.uri is not None for row in rows))
    return len(rows)


def prune(config: PruneConfig) -> dict[str, int]:
    """Drop pictures (rows and scores stay) and forget failures; returns how many, and their bytes."""
    with ImageStore(config.store, index=config.index, create=False, read_only=config.dry_run) as store:
        rows = list(store.everything())
        kept = _referenced(config.keep_referenced_by, rows)
        pictures = _to_drop([row for row in rows if row.uri is not None], kept, config)
        failures = [row.key for row in rows if row.failure is not None] if config.failed else []
        done = {"pictures": len(pictures), "bytes": sum(row.bytes for row in pictures), "failures": len(failures)}
        left = sum(row.bytes for row in rows) - done["bytes"]
        if not config.dry_run:
            store.drop_images([row.key for row in pictures])
            store.forget(failures)
    logger.info(
        "%s %d pictures (%d bytes; %d are left) and %d failures.",
        "Would remove" if config.dry_run else "Removed", done["pictures"], done["bytes"], left, done["failures"],
    )  # fmt: skip
    if config.max_bytes is not None and left > config.max_bytes:
        logger.warning("More than `max_bytes` is left, because `keep_referenced_by` keeps it.")
    return done


COMMANDS: dict[str, tuple[Callable[[Any], Any], type[Any]]] = {
    "verify": (verify, VerifyConfig),
    "export": (export, ExportConfig),
    "prune": (prune, PruneConfig),
}


def run() -> None:
    """Entry point: the first word of the command line chooses the command."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("-h", "--help"):
        print(__doc__)
        return
    if word not in COMMANDS:
        print(f"error: the first word must be one of {', '.join(COMMANDS)}, but is {word!r:.80}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {word}", *sys.argv[2:]]
    main, config = COMMANDS[word]
    run_command(main, config, errors=(StoreError,))


def _only_index_is_gone(config: VerifyConfig) -> bool:
    """Whether there are pictures: a mistyped path must not become an empty store."""
    return not index_path(config.store, config.index).exists() and bool(open_files(config.store).sizes())


def _chosen(row: Stored, config: ExportConfig) -> bool:
    if config.status not in ("all", _state(row)):
        return False
    assert row.metadata is not None
    job = row.metadata["job"]
    names = (job["batch_key"]["checkpoint"], job["batch_key"]["lora"])
    return (config.model is None or any(config.model.lower() in name.lower() for name in names)) and (
        config.prompt is None or config.prompt.lower() in job["prompt"].lower()
    )


def _state(row: Stored) -> str:
    return "dropped" if row.failure is None and row.uri is None else row.status


def _copy(store: ImageStore, row: Stored, output: Path) -> None:
    if row.uri is None:
        return
    path = output / file_name(row.key)
    if path.is_file() and path.stat().st_size == row.bytes:
        return  # by an earlier export; a key's picture does not change
    data = store.files.read(file_name(row.key))
    with translated(path):
        write_atomically(path, data)


def _record(row: Stored) -> dict[str, Any]:
    assert row.metadata is not None
    job = row.metadata["job"]
    record = {
        "file_name": None if row.uri is None else file_name(row.key),
        "key": row.key,
        "status": _state(row),
        "reason": row.failure.reason if row.failure else None,
        "message": row.failure.message if row.failure else None,
        "prompt": job["prompt"],
        "negative_prompt": job["negative_prompt"],
        "seed": job["seed"],
        **job["batch_key"],
        "seconds": row.seconds,
        "bytes": row.bytes,
        "request": json.dumps(row.metadata["request"]),
    }
    # Parquet takes no lone surrogates.
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in record.items()}


def _write_table(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        table = pa.Table.from_pylist(records)
        # A column of nulls only would have no type.
        types = [(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in table.schema]
        pq.write_table(table.cast(pa.schema(types)), buffer)
        data = buffer.getvalue()
    with translated(path):
        write_atomically(path, data)


def _to_drop(pictures: list[Stored], kept: set[str], config: PruneConfig) -> list[Stored]:
    """Which pictures go, least recently used first."""
    free = sorted((row for row in pictures if row.key not in kept), key=lambda row: (row.used, row.created))
    if config.max_bytes is None and config.unused_days is None:
        return free if config.keep_referenced_by else []
    before = -1.0 if config.unused_days is None else time.time() - config.unused_days * DAY
    surplus = 0 if config.max_bytes is None else sum(row.bytes for row in pictures) - config.max_bytes
    dropped = []
    for row in free:
        if row.used < before or surplus > 0:
            dropped.append(row)
            surplus -= row.bytes
    return dropped


def _referenced(table: str | None, rows: list[Stored]) -> set[str]:
    """Keys that stand anywhere in a Parquet table, in the paths of pictures for instance.

    Raises:
        StoreError: The table can't be read, or names nothing of this store (so that everything would go).
    """
    if table is None:
        return set()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(table).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError("io", f"`keep_referenced_by`: can't read {table} as Parquet: {error}") from error
    kept = {key for text in _texts(values) for key in re.findall(r"[0-9a-f]{64}", text)}
    kept &= {row.key for row in rows}
    if not kept:
        raise StoreError(
            "not_stored", f"`keep_referenced_by`: {table} names no picture of this store; is it the right one?"
        )
    return kept


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in inner:
            yield from _texts(item)
