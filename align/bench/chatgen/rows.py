"""Rows of ChatGenBench, and the files that hold them."""

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.bench.chatgen.roles import REPLIES
from align.bench.chatgen.schema import Chat, image_part, message, row_features, text_part
from rewards.files import write_atomically

SPLITS = ("train", "test")


def chat_row(chat: Chat, split: str, image_root: Path | None = None) -> dict[str, Any]:
    """A chat as a row; its `setting` is not known yet.

    Args:
        chat: A good one.
        split: Of its demonstration.
        image_root: Folder from which paths of pictures count.
    """
    task, demonstration = chat.task, chat.task.demonstration
    rng = random.Random(f"replies/{task.id}")
    reference = None
    if task.reference is not None:
        reference = {"image": _relative(task.reference.image, image_root), "prompt": task.reference.prompt}
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(chat.texts):
        if number:
            messages.append(message("assistant", text_part(rng.choice(REPLIES))))
        shown = [image_part(reference["image"])] if reference is not None and not number else []
        messages.append(message("user", *shown, text_part(text)))
    return {
        "id": task.id,
        "messages": messages,
        "input_type": task.input_type,
        "prompt": demonstration.prompt,
        "negative_prompt": demonstration.negative_prompt,
        "model": demonstration.model,
        "arguments": dict(demonstration.arguments),
        "base_model": demonstration.base_model,
        "setting": "",
        "split": split,
        "role": task.role.name,
        "generator": chat.generator,
        "source": dict(demonstration.source)
        | {"demonstration": demonstration.id, "reference": reference, "turns": list(task.targets)},
    }


def _relative(image: str, root: Path | None) -> str:
    if root is None or image.startswith(("http://", "https://")):
        return image
    path = Path(image).resolve()
    return str(path.relative_to(root.resolve())) if path.is_relative_to(root.resolve()) else str(path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines, written atomically."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines).encode(errors="replace"))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def save_rows(files: Mapping[str, Path], folder: Path, scratch: Path) -> None:
    """A `datasets.DatasetDict` of JSON lines, one file for each split, put in place by a rename."""
    import datasets

    cache = scratch / "datasets-cache"
    shutil.rmtree(cache, ignore_errors=True)  # of a build that was killed
    data = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_generator(
                read_jsonl,
                features=row_features(),
                gen_kwargs={"path": path},
                cache_dir=str(cache),
                split=datasets.NamedSplit(split),
            )
            if path.stat().st_size  # a generator that yields nothing is refused
            else datasets.Dataset.from_dict({name: [] for name in row_features()}, features=row_features())
            for split, path in files.items()
        }
    )
    temporary = scratch / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    # Left to itself, `datasets` saves an empty split in no shard, and can't load that.
    shards: Any = {split: None if len(rows) else 1 for split, rows in data.items()}
    data.save_to_disk(str(temporary), num_shards=shards)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
