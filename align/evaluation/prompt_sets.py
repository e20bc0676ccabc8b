"""Prompts to evaluate on: DABench's own evaluation split, PartiPrompts, COCO captions (DiffAgent Sec. 4.1)."""

import csv
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

# Names of the column that holds the prompt, in the published files of PartiPrompts and COCO captions.
_PROMPT_COLUMNS = ("prompt", "caption", "text")


class PromptSet(NamedTuple):
    """Instructions, and the calls they were answered with by people, if that is known.

    Attributes:
        name: For tables and file names.
        instructions: Prompts, or DABench instruction objects.
        references: DABench rows' `api`, or `None` for plain prompts.
    """

    name: str
    instructions: list[Any]
    references: list[dict[str, Any]] | None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.lower().replace(" ", "-")


class PromptFileError(ValueError):
    """A prompt file that can't be read; the message names the file and the column."""


def evaluation_prompts(
    rows: Any,
    *,
    parti_prompts: str | Path | None,
    coco_captions: str | Path | None,
    num_prompts: int | None,
    num_dabench: int | None,
    seed: int,
) -> list[PromptSet]:
    """DiffAgent's prompt sets: DABench, and PartiPrompts and COCO captions if there is a file of them.

    Args:
        rows: The evaluation split of DABench.
        parti_prompts, coco_captions: See `read_prompts`; None: left out.
        num_prompts: Random prompts of each file; None: all.
        num_dabench: Random rows of DABench; None: all.
        seed: Of the choice.

    Raises:
        PromptFileError: A file that can't be read.
    """
    sets = [dabench_prompts(rows, num_dabench, seed)]
    for name, path in (("PartiPrompts", parti_prompts), ("COCO captions", coco_captions)):
        if path is not None:
            sets.append(read_prompts(name, path, num_prompts, seed))
    return sets


def dabench_prompts(rows: Any, count: int | None, seed: int) -> PromptSet:
    """The evaluation split of DABench, or a seeded choice of `count` of its rows."""
    chosen = list(rows)
    if count is not None and count < len(chosen):
        chosen = random.Random(seed).sample(chosen, count)
    return PromptSet("DABench", [row["instruction"] for row in chosen], [row["api"] for row in chosen])


def read_prompts(name: str, path: str | Path, count: int | None, seed: int) -> PromptSet:
    """A `.tsv`, `.csv` or `.jsonl` with a column "Prompt", "caption" or "text", or a `.txt` with one prompt a line.

    Args:
        name: Of the set.
        path: The file.
        count: A seeded random choice of so many, as the paper's 1,000; `None` for all.
        seed: Of the choice.

    Raises:
        PromptFileError: If the file is missing or no text, has no such column, or no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptFileError(f"There is no prompt file at {path}.")
    try:
        prompts = [prompt.strip() for prompt in _read_column(path) if prompt and prompt.strip()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PromptFileError(f"{path} can't be read as UTF-8 text: {error}.") from error
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{path} can't be read as JSON Lines: {error}.") from error
    if not prompts:
        raise PromptFileError(f"{path} holds no prompt.")
    if count is not None and count < len(prompts):
        prompts = random.Random(seed).sample(prompts, count)
    return PromptSet(name, prompts, None)


def _read_column(path: Path) -> list[str | None]:
    ending = path.suffix.lower()
    # "-sig": spreadsheets write a byte order mark, which would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if ending == ".jsonl":
            return [_prompt_of(json.loads(line), path) for line in file if line.strip()]
        if ending not in (".tsv", ".csv"):
            return list(file)
        # Quotes inside prompts are just characters in these files' TSV.
        tsv: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        reader = csv.DictReader(file, **(tsv if ending == ".tsv" else {}))
        column = next((c for c in reader.fieldnames or [] if c.strip().lower() in _PROMPT_COLUMNS), None)
        if column is None:
            raise PromptFileError(f"{path} has no column Prompt, caption or text, but {reader.fieldnames}.")
        return [row[column] for row in reader]


def _prompt_of(row: Any, path: Path) -> str | None:
    """The prompt of a line of a `.jsonl`."""
    columns = [key for key in row if key.strip().lower() in _PROMPT_COLUMNS] if isinstance(row, dict) else []
    if not columns or not isinstance(row[columns[0]], str | None):
        raise PromptFileError(f"{path} has a line without a text Prompt, caption or text: {str(row)[:80]}.")
    return row[columns[0]]
