"""Chats with the prompt, model and arguments that they ask for, as training data (ChatGen Eq. 1 and 2)."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from align.chat_dialogue import PICTURE, ChatDialogue, EncodedChat
from align.pairs import DataError, read_splits
from align.picture_dialogue import UNREADABLE, PictureDialogue
from rollouts.dialogue import DialogueError

logger = logging.getLogger(__name__)

Target = Literal["prompt", "plan"]
Unreadable = Literal["error", "text"]
SHOT_GROUPS = {"0": 0, "1": 1, "2": 2, "3-5": 5, "6+": 10**9}
"""Models by how many demonstrations there are to learn from: name -> at most so many."""
REQUIRED_SPLITS = ("train", "test")
REQUIRED_COLUMNS = ("id", "messages", "prompt", "negative_prompt", "model", "arguments", "source")


def load_chats(folder: str | Path) -> Any:
    """The `DatasetDict` of a ChatGenBench folder (splits train and test).

    Args:
        folder: Output of `align.bench.chatgen` or `align.bench.chatgen.tables`, or the DatasetDict `chats` in it.

    Raises:
        DataError: If there is none, or it lacks splits or columns.
    """
    folder = Path(folder)
    path = folder if (folder / "dataset_dict.json").is_file() else folder / "chats"
    if not (path / "dataset_dict.json").is_file():
        raise DataError(f"`dataset` {folder} has no chats. Build them with python -m align.bench.chatgen.")
    return read_splits(path, REQUIRED_SPLITS, REQUIRED_COLUMNS, "align.bench.chatgen")


def pictures_folder(folder: str | Path) -> Path:
    """Where paths of pictures in a data set begin, of what `load_chats` takes."""
    folder = Path(folder)
    return folder.parent if (folder / "dataset_dict.json").is_file() else folder


def split_validation(rows: Any, share: float = 0.05) -> tuple[Any, Any]:
    """Training rows, and those of about `share` of the demonstrations to validate on, by a hash of their ids.

    The test split stays unseen. A demonstration is on one side with all of its chats.
    """

    def held_out(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < share

    sides = [held_out(source["demonstration"]) for source in rows["source"]]
    chosen = [[i for i, side in enumerate(sides) if side is wanted] for wanted in (False, True)]
    train, validation = (rows.select(indices, keep_in_memory=True) for indices in chosen)
    return train, validation


def demonstrations_per_model(rows: Any) -> Counter[str]:
    """Demonstrations of each model, however many chats each has."""
    pairs = {(model, source["demonstration"]) for model, source in zip(rows["model"], rows["source"], strict=True)}
    return Counter(model for model, _ in pairs)


def shot_group(shots: int) -> str:
    """Which of `SHOT_GROUPS` a number of demonstrations is in."""
    return next(name for name, most in SHOT_GROUPS.items() if shots <= most)


def plan_text(row: Mapping[str, Any]) -> str:
    """What Base is trained to write: prompt, negative prompt, model and arguments as one JSON object, in this order.

    Arguments that nobody knows are left out.
    """
    arguments = {name: value for name, value in row["arguments"].items() if value is not None}
    plan = {"prompt": row["prompt"], "negative_prompt": row["negative_prompt"], "model": row["model"]}
    return json.dumps(plan | {"arguments": arguments}, ensure_ascii=False)


def encode_chats(
    rows: Any,
    dialogue: ChatDialogue,
    target: Target,
    max_length: int,
    *,
    what: str,
    unreadable: Unreadable = "error",
) -> Any:
    """Tokenize rows to `input_ids` and completion-only `labels`, with `pictures` for a policy that sees.

    Pictures are opened once, to find those that can't be and because their sizes decide how many tokens they take; what
    is kept of them is where they are.

    Args:
        rows: A `datasets.Dataset` of ChatGenBench rows.
        dialogue: Format and tokenizer.
        target: `prompt`: what stage 1 of Evo writes (Eq. 2). `plan`: what Base writes (Eq. 1).
        max_length: Tokens of a dialogue; old messages are dropped and the last one is cut to fit, the response never.
        what: Name of the split, for messages.
        unreadable: See `check_pictures`.

    Raises:
        DataError: Naming the row that can't be encoded, or if there is none at all.
    """
    from datasets import Features, List, Value

    if not len(rows):
        raise DataError(f"{what} has no rows.")
    form = dialogue.chat_form
    task = form.writing_task if target == "prompt" else form.planning_task

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        response = row["prompt"] if target == "prompt" else plan_text(row)
        try:
            encoded = dialogue.encode_chat(row["messages"], task, response, max_length)
        except DialogueError as error:
            raise DataError(f"{what} row {row['id']!r}: {error}") from error
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "pictures": [picture.source for picture in encoded.pictures],
            "shortened": encoded.shortened or encoded.dropped > 0,
            "unreadable": check_pictures(encoded, f"{what} row {row['id']!r}", unreadable),
        }

    tokens, number = List(Value("int64")), Value("int64")
    features = {"input_ids": tokens, "labels": tokens, "pictures": List(Value("string")), "unreadable": number}
    # In memory: `map` would write its cache into the folder the data set was loaded from.
    encoded = rows.map(
        encode, remove_columns=rows.column_names, keep_in_memory=True, desc=f"tokenizing {what}",
        features=Features(features | {"shortened": Value("bool")}),
    )  # fmt: skip
    if shortened := sum(encoded["shortened"]):
        logger.info("%s: %d of %d chats were cut to fit %d tokens", what, shortened, len(rows), max_length)
    if missing := sum(encoded["unreadable"]):
        logger.warning("%s: %d pictures can't be opened and are written as %s", what, missing, PICTURE)
    unused = [] if isinstance(dialogue, PictureDialogue) else ["pictures"]
    return encoded.remove_columns(["shortened", "unreadable", *unused])


def check_pictures(encoded: EncodedChat, where: str, unreadable: Unreadable) -> int:
    """How many pictures of a chat can't be opened.

    Args:
        encoded: The chat.
        where: Names the row, for the message.
        unreadable: `error`: none may be. `text`: they stand as `[picture]`.

    Raises:
        DataError: Naming row and picture.
    """
    found = [note.removeprefix(UNREADABLE) for note in encoded.notes if note.startswith(UNREADABLE)]
    if found and unreadable == "error":
        raise DataError(f"{where}: {found[0]} Or set `unreadable_pictures: text`, which writes {PICTURE} instead.")
    return len(found)
