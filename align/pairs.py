"""Instruction-call pairs as training data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollouts.api import ARCHITECTURES, APICall, APICallError
from rollouts.dialogue import Dialogue, DialogueError

logger = logging.getLogger(__name__)

REQUIRED_SPLITS = ("sft", "eval")
REQUIRED_COLUMNS = ("id", "instruction", "api")


class DataError(ValueError):
    """A data set that can't be trained on; the message names the folder, the split and the column or row."""


def load_pairs(folder: str | Path, architecture: str) -> Any:
    """The `DatasetDict` of one architecture.

    Args:
        folder: Output of `align.bench.dabench`, or one of the DatasetDicts in it.
        architecture: E.g. `SD 1.5`; ignored if `folder` is itself a DatasetDict.

    Raises:
        DataError: If there is none, or it lacks the splits or columns of DABench.
    """
    if architecture not in ARCHITECTURES:
        raise DataError(f"`architecture` must be one of {', '.join(ARCHITECTURES)}, but is {architecture!r}.")
    folder = Path(folder)
    path = folder if (folder / "dataset_dict.json").is_file() else folder / ARCHITECTURES[architecture].slug
    if not (path / "dataset_dict.json").is_file():
        built = [a.name for a in ARCHITECTURES.values() if (folder / a.slug).is_dir()]
        raise DataError(
            f"`dataset` {folder} has no DABench for {architecture} (it has: {', '.join(built) or 'none'}). "
            "Build it with python -m align.bench.dabench."
        )
    return read_splits(path, REQUIRED_SPLITS, REQUIRED_COLUMNS, "align.bench.dabench")


def read_splits(path: Path, splits: Sequence[str], columns: Sequence[str], builder: str) -> Any:
    """A `DatasetDict` that has these splits, each with these columns.

    Args:
        path: Where it was saved.
        splits, columns: What it needs.
        builder: The module that makes such a data set, for messages.

    Raises:
        DataError: If it can't be read, or lacks something.
    """
    import datasets

    try:
        data: Any = datasets.load_from_disk(str(path))
    except IndexError as error:  # datasets writes no file for an empty split, and then misses it
        raise DataError(f"{path} has a split without rows. Build it from more data.") from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can't be read: {error}. Build it again with python -m {builder}.") from error
    if absent := [split for split in splits if split not in data]:
        raise DataError(f"{path}: the splits {absent} are missing.")
    for split, rows in data.items():
        if missing := [column for column in columns if column not in rows.column_names]:
            raise DataError(f"{path}, split {split}: the columns {missing} are missing.")
    return data


def response_text(api: dict[str, Any]) -> str:
    """The text a policy is trained to write for a row's `api`."""
    return APICall.from_dict(api).to_json()


def encode_pairs(rows: Any, dialogue: Dialogue, max_length: int, *, what: str) -> Any:
    """Tokenize rows to `input_ids` and completion-only `labels` (what TRL calls a processed data set).

    Args:
        rows: A `datasets.Dataset` of DABench rows.
        dialogue: Format and tokenizer.
        max_length: Tokens of a dialogue; the user's text is cut to fit, the call never.
        what: Name of the split, for messages.

    Raises:
        DataError: Naming the row that can't be encoded, or if there is none at all.
    """
    if not len(rows):
        raise DataError(f"{what} has no rows.")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        try:
            encoded = dialogue.encode(row["instruction"], response_text(row["api"]), max_length)
        except (APICallError, DialogueError) as error:
            raise DataError(f"{what} row {row['id']!r}: {error}") from error
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "shortened": encoded.shortened}

    # In memory: `map` would write its cache into the folder the data set was loaded from.
    encoded = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True, desc=f"tokenizing {what}")
    shortened = sum(encoded["shortened"])
    if shortened:
        logger.info(
            "%s: the user's text was cut in %d of %d rows to fit %d tokens", what, shortened, len(rows), max_length
        )
    return encoded.remove_columns("shortened")
