"""Data sets that people already have as a ChatGenBench folder: any table of chats, prompts, models and arguments.

    python -m align.bench.chatgen.tables --source chatgenbench/ --columns configs/chatgen/columns_chatgenbench.yaml \\
        --catalog catalog.jsonl --output data/chatgenbench

`--columns` says where everything stands (`align.bench.chatgen.table_mapping`). Writes `chats/` (a
`datasets.DatasetDict`: train, test), `catalog.jsonl` (the one that was given, or one made of the table), `report.json`
and a README that says what could not be mapped and why.
"""

import contextlib
import itertools
import json
import logging
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align.bench.assemble import default_parameters
from align.bench.chatgen.rows import SPLITS, read_jsonl, save_rows
from align.bench.chatgen.schema import ARGUMENTS, INPUT_TYPES
from align.bench.chatgen.table_columns import Columns, Field, Model, RowProblem
from align.bench.chatgen.table_mapping import EXPLANATIONS, TableMapping
from align.bench.chatgen.table_reading import read_table
from align.bench.config import MAX_DESCRIPTION_CHARS
from align.bench.funnel import Funnel, Stage
from align.bench.plain_text import truncate
from align.bench.sources import SourceError
from rewards.commandline import ConfigError, check_config_file, check_nested, run_command, save_config
from rewards.files import write_atomically
from rollouts.api import ARCHITECTURES
from rollouts.catalog import Catalog, CatalogEntry, CatalogError

logger = logging.getLogger(__name__)

_PARAMETERS = ("sampling method", "sampling steps", "cfg scale", "width", "height")  # of the catalogue, as `ARGUMENTS`
_MOST_LISTED = 100
_TRIED = 1_000  # rows after which something that a row can't do without must have been seen


@dataclass
class TablesConfig:
    """Options of `python -m align.bench.chatgen.tables`."""

    source: str = field(
        metadata={
            "help": "The table: .json, .jsonl, .csv, .tsv (all also .gz), .parquet, a folder that `datasets` saved, or "
            "a folder of such files whose names say the split."
        }
    )
    columns: str = field(metadata={"help": "YAML file that says where everything stands; see configs/chatgen."})
    output: str = field(metadata={"help": "Folder to write to."})
    catalog: str | None = field(
        default=None, metadata={"help": "The models that there are; none: a catalogue is made of the table, if it can."}
    )


@dataclass
class _Use:
    """How a model is used."""

    model: Model
    rows: int = 0
    arguments: Counter[tuple[Any, ...]] = field(default_factory=Counter)


@dataclass
class _Tally:
    """What was seen while the rows went by."""

    funnel: Funnel = field(default_factory=Funnel)
    columns: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    null: Funnel = field(default_factory=Funnel)
    unknown_models: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    models: dict[str, _Use] = field(default_factory=dict)
    trained: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    ids: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any], model: Model, notes: list[RowProblem]) -> None:
        """Count a row that was mapped."""
        self.ids.add(row["id"])
        if row["split"] == "train":
            self.trained[row["model"]].add(row["source"]["demonstration"])
        for note in notes:
            self.null.remove("values", note.reason, f"{row['id']}: {note.detail}")
        use = self.models.setdefault(row["model"], _Use(model))
        if use.model.type is None or not use.model.base_model:
            use.model = model
        use.rows += 1
        arguments = row["arguments"]
        self.present.update(name for name in ARGUMENTS if arguments[name] is not None)
        complete = all(arguments[name] is not None for name in ARGUMENTS[:5])
        if complete and row["base_model"] and row["base_model"] == use.model.base_model:  # else the size may not fit
            use.arguments[tuple(arguments[name] for name in ARGUMENTS[:5])] += 1


def load_columns(path: Path) -> Columns:
    """The file of columns.

    Raises:
        ConfigError: Naming the file, the key and what is near.
    """
    given = check_config_file(path, Columns)
    try:
        check_nested("columns", given, Columns)
        return Columns(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def convert(config: TablesConfig) -> dict[str, Any]:
    """Map the table and write the folder; returns what is in `report.json`.

    Raises:
        ConfigError, CatalogError, SourceError: Naming the file, the field, the value and the way out.
    """
    source, output, path = Path(config.source), Path(config.output), Path(config.columns)
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"`source` {source} is in `output` {output}, which is written anew; choose another `output`.")
    columns, catalog = load_columns(path), None if config.catalog is None else Catalog.load(config.catalog)
    try:
        mapping = TableMapping(columns, source if source.is_dir() else source.parent, output, catalog)
    except (ValueError, re.error) as error:
        raise ConfigError(f"{path}: {error}") from error
    scratch = output / ".work" / "tables"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    tally = _map_rows(source, path, mapping, scratch)
    counts = _with_settings(scratch, tally, columns.few_shot_below)
    save_rows({split: scratch / f"{split}.jsonl" for split in SPLITS}, output / "chats", scratch)
    made = make_catalog(tally.models) if catalog is None else catalog
    if made is not None:
        made.save(output / "catalog.jsonl")
    else:
        (output / "catalog.jsonl").unlink(missing_ok=True)
    report = _report(config, mapping, tally, counts, made)
    write_atomically(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode(errors="replace"))
    write_atomically(output / "README.md", _readme(report, tally).encode(errors="replace"))
    save_config(output / "config.yaml", config)
    shutil.rmtree(scratch)
    with contextlib.suppress(OSError):  # the answers of language models that a build has paid for
        scratch.parent.rmdir()
    return report


def _map_rows(source: Path, path: Path, mapping: TableMapping, scratch: Path) -> _Tally:
    """Spool the rows of each split; everything else about them is in the tally."""
    tally = _Tally()
    with contextlib.ExitStack() as stack:
        spools = {
            split: stack.enter_context((scratch / f"{split}.spool").open("w", encoding="utf-8", errors="replace"))
            for split in SPLITS
        }
        for place in tqdm(read_table(source), desc="rows", unit=" rows", disable=None):
            tally.numbers[place.name] += 1
            where = f"{place.name}/{tally.numbers[place.name]}"
            tally.funnel.enter("rows")
            try:
                if place.problem:
                    raise RowProblem("malformed_row", place.problem)
                tally.columns.update(_columns(place.row))
                row, model, notes = mapping(place.row, where, _split_of(source, path, place.name, mapping))
                if row["id"] in tally.ids:
                    raise RowProblem("duplicate_id", row["id"])
            except RowProblem as problem:
                tally.funnel.remove("rows", problem.reason, f"{where}: {problem.detail}")
                if problem.reason == "unknown_model":
                    tally.unknown_models[problem.detail] += 1
            else:
                tally.add(row, model, notes)
                spools[row["split"]].write(json.dumps(row, ensure_ascii=False) + "\n")
            if tally.numbers.total() == _TRIED:
                _check_found(source, path, mapping, tally, mapping.needed())
    _check_found(source, path, mapping, tally, mapping.needed())
    if not tally.ids:
        left_out = {name: texts[0] for name, texts in tally.funnel.stages["rows"].examples.items()}
        raise ConfigError(f"{source}: no row could be mapped with {path}. For example, by reason: {left_out}.")
    required = {entry.name: [entry] for entry in mapping.all_fields() if entry.required}
    _check_found(source, path, mapping, tally, required)
    return tally


def _check_found(
    source: Path, path: Path, mapping: TableMapping, tally: _Tally, groups: Mapping[str, list[Field]]
) -> None:
    """Refuse columns with a field that no row has: most likely a typing error."""
    for name, group in groups.items():
        if any(entry.found or entry.constant is not None for entry in group):
            continue
        paths = " or ".join(text for entry in group for text in entry.paths) or "not given"
        unread = "".join(f" {step} read nothing: {why}." for step, why in mapping.step_problems.items())
        raise ConfigError(
            f"{path}: `{name}` is {paths}, which none of {tally.numbers.total():,} rows of {source} has. "
            f"There are the columns {', '.join(tally.columns) or '(none)'}.{unread}"
        )


def _split_of(source: Path, path: Path, name: str, mapping: TableMapping) -> str | None:
    """The split that a name says, in words: `chats_test-00001.parquet`; a table on its own is for training."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    found = {split for key, split in mapping.columns.splits.items() if key.lower() in words}
    if len(found) == 1:
        return found.pop()
    if not source.is_dir() or name == source.name:
        return "train"
    if mapping.columns.split is None:
        raise ConfigError(
            f"{source}: the name {name!r} says no split, or two. Rename it, or give {path} a `split` (a path or "
            "{constant: train}), or the name under `splits`."
        )
    return None


def _columns(value: Any, prefix: str = "", levels: int = 3) -> Iterator[str]:
    """Names of the columns, those in objects with dots."""
    for key, item in value.items() if isinstance(value, dict) else ():
        name = f"{prefix}{str(key)[:60]}"
        if isinstance(item, dict) and item and levels > 1:
            yield from _columns(item, f"{name}.", levels - 1)
        else:
            yield name


def _with_settings(scratch: Path, tally: _Tally, few_shot_below: int) -> dict[str, Counter[str]]:
    """Give rows without a setting one, by their model's demonstrations for training; count the input types."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*SPLITS, "supervised", "few_shot")}
    for split in SPLITS:
        with (scratch / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for row in read_jsonl(scratch / f"{split}.spool"):
                few = len(tally.trained[row["model"]]) < few_shot_below
                row["setting"] = row["setting"] or ("few_shot" if few else "supervised")
                for name in {split, row["setting"]} if split == "test" else {split}:
                    counts[name][row["input_type"]] += 1
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def make_catalog(uses: Mapping[str, _Use]) -> Catalog | None:
    """A catalogue of the models that the table says type and architecture of, or `None` if there are none.

    Version ids that are missing are numbers above the others, a LoRA without a known base is used with the checkpoint
    of its architecture that has most rows, and default parameters are the most frequent ones.
    """
    known = [use for use in uses.values() if use.model.type and use.model.base_model]
    bases: dict[str, dict[str, int]] = {name: {} for name in ARCHITECTURES}
    for use in known:
        if use.model.type == "Checkpoint":
            bases[use.model.base_model][use.model.name] = use.rows
    ids = Counter(use.model.version_id for use in known)
    free = itertools.count(max((version or 0 for version in ids), default=0) + 1)
    entries = []
    for use in known:
        model, alike = use.model, bases[use.model.base_model]
        most_used = max(alike, key=alike.__getitem__, default=None)
        base = model.base_checkpoint if model.base_checkpoint in alike else most_used
        if model.type == "LoRA" and base is None:
            continue
        version = model.version_id if model.version_id and ids[model.version_id] == 1 else next(free)
        parameters = default_parameters(model.base_model, None)
        if use.arguments:
            parameters = dict(zip(_PARAMETERS, use.arguments.most_common(1)[0][0], strict=True))
        entry = {
            "name": model.name, "version_id": version, "model_id": model.model_id or version, "type": model.type,
            "base_model": model.base_model, "base_checkpoint": base if model.type == "LoRA" else None,
            "lora_weight": 1.0 if model.type == "LoRA" else None, "default_parameters": parameters,
            "description": truncate(model.description, MAX_DESCRIPTION_CHARS), "description_source": "table",
        }  # fmt: skip
        entries.append(CatalogEntry.model_validate(entry))
    return Catalog(entries) if entries else None


def _report(
    config: TablesConfig, mapping: TableMapping, tally: _Tally, counts: Mapping[str, Counter[str]], made: Catalog | None
) -> dict[str, Any]:
    stage, null = tally.funnel.stages["rows"], tally.null.stages.get("values", Stage())
    ends = {tokens[-1] for entry in mapping.all_fields() for tokens in entry.paths.values()}
    used = [
        ".".join(map(str, itertools.takewhile(lambda token: isinstance(token, str), tokens)))
        for entry in mapping.all_fields()
        for tokens in entry.paths.values()
    ]
    unused = {
        name: count
        for name, count in tally.columns.most_common()
        if not any(name == path or f"{name}.".startswith(f"{path}.") or path.startswith(f"{name}.") for path in used)
    }
    return {
        "source": config.source,
        "rows": {"in": stage.entered, "left_out": stage.removed, "out": stage.left, "examples": stage.examples},
        "counts": counts,
        "null": {"counts": null.removed, "examples": null.examples},
        "arguments_present": {name: tally.present[name] for name in ARGUMENTS},
        "models": len(tally.models),
        "unknown_models": dict(tally.unknown_models.most_common(_MOST_LISTED)),
        "catalog": {
            "models": 0 if made is None else len(made),
            "from": "the table" if config.catalog is None else config.catalog,
            "not_in_it": sum(name not in (made or {}) for name in tally.models),
        },
        "unused_columns": dict(itertools.islice(unused.items(), _MOST_LISTED)),
        "unread_arguments": {
            name: count for name, count in mapping.unread.most_common(_MOST_LISTED) if name not in ends
        },
        "unreadable_texts": mapping.step_problems,
    }


def _readme(report: Mapping[str, Any], tally: _Tally) -> str:
    lines = ["| | total | " + " | ".join(INPUT_TYPES) + " |", "|---|---:|---:|---:|---:|"]
    for name, counts in report["counts"].items():
        cells = " | ".join(f"{counts[kind]:,}" for kind in INPUT_TYPES)
        lines.append(f"| {name} | {counts.total():,} | {cells} |")
    catalog, total = report["catalog"], report["rows"]["out"]
    present = ", ".join(f"{name} {count / total:.0%}" for name, count in report["arguments_present"].items())
    text = f"""---
pretty_name: ChatGenBench
task_categories: [text-generation, image-text-to-text]
tags: [text-to-image, chat]
---
# Chats, each with the prompt, model and arguments that they ask for

Made of {_cell(report["source"])} by `python -m align.bench.chatgen.tables`, in the form of ChatGenBench (ChatGen,
CVPR 2025, Sec. 3.1). All counts are in `report.json`.

{chr(10).join(lines)}

{report["models"]:,} models; the catalogue, from {_cell(catalog["from"])}, has {catalog["models"]:,} and lacks \
{catalog["not_in_it"]:,} of them. Rows that have the argument: {present}.

```python
from datasets import load_from_disk
rows = load_from_disk("chats")["train"]   # train | test
```

## What was left out, and why

{tally.funnel.to_markdown(EXPLANATIONS)}"""
    lists = (
        ("Values that became null: out of bounds, or not what they should be", report["null"]["counts"]),
        ("Models that the catalogue does not have (rows)", report["unknown_models"]),
        ("Columns that no field uses (rows)", report["unused_columns"]),
        ("Arguments with other names, not read (rows)", report["unread_arguments"]),
    )
    for title, counts in lists:
        if counts:
            text += f"\n## {title}\n\n" + "".join(f"- {_cell(name)}: {count:,}\n" for name, count in counts.items())
    return text


def _cell(text: str) -> str:
    """Somebody's text as a word of Markdown."""
    return "`" + " ".join(str(text)[:120].replace("`", "'").replace("|", " ").split()) + "`"


def main(config: TablesConfig) -> None:
    """Map the table and say what came out."""
    try:
        report = convert(config)
    except OSError as error:
        raise ConfigError(f"`output` {config.output} can't be written: {error}") from error
    rows = report["rows"]
    logger.info("%s of %s rows; left out: %s", f"{rows['out']:,}", f"{rows['in']:,}", rows["left_out"] or "none")
    if report["unused_columns"]:
        logger.info("columns that no field uses: %s", ", ".join(report["unused_columns"]))
    logger.info("see %s", Path(config.output) / "README.md")


if __name__ == "__main__":
    run_command(main, TablesConfig, errors=(SourceError, CatalogError))
