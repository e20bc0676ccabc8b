"""Stage 2 of ChatGen-Evo: a token for every text-to-image model, on a frozen policy (ChatGen Sec. 3.2.2, Eq. 3-4).

    accelerate launch align/model_tokens.py --config configs/chatgen/evo_tokens.yaml \\
        --model_name_or_path runs/chatgen-evo --dataset data/chatgenbench --output_dir runs/chatgen-tokens

The policy (of stage 1) reads each chat, with its pictures if it sees, and its prompt once; its hidden states are kept,
and only the new rows are trained on them. Leaves model_tokens.safetensors and .json, and how well models are chosen on
the test split. One process: an epoch over hidden states takes seconds. Started again after a kill, it goes on where it
was.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from align.chat_dialogue import ChatDialogue
from align.chats import (
    Unreadable,
    check_pictures,
    demonstrations_per_model,
    load_chats,
    pictures_folder,
    shot_group,
    split_validation,
)
from align.pairs import DataError
from align.picture_dialogue import PictureDialogue, load_dialogue
from align.run_directory import write_model_card
from align.trainers.model_token_cache import ModelTokenExamples, build_cache
from align.trainers.model_token_config import ModelTokenConfig, ModelTokenError
from align.trainers.model_token_loss import rank_examples
from align.trainers.model_token_pictures import PrefixPictures, picture_digest
from align.trainers.model_token_rows import ModelTokens
from align.trainers.model_token_trainer import ModelTokenTrainer
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import DialogueError
from rollouts.policy import load_policy

logger = logging.getLogger(__name__)

_AT_ONCE = 1024  # examples that are ranked together


@dataclass
class ModelTokenArguments:
    """Options of `align/model_tokens.py` beside `ModelTokenConfig` (training)."""

    model_name_or_path: str = field(metadata={"help": "The policy of stage 1; it is not changed."})
    dataset: str = field(metadata={"help": "ChatGenBench folder (output of align.bench.chatgen)."})
    catalog: str | None = field(
        default=None, metadata={"help": "Catalogue with descriptions, for `init`; none: `dataset`/catalog.jsonl."}
    )
    model_dtype: str = field(default="auto", metadata={"help": "Of the policy: auto, float32, bfloat16."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of chat and prompt; old messages are dropped."})
    chats_per_demonstration: int | None = field(
        default=None, metadata={"help": "Learn from so many chats of each demonstration only; none: all."}
    )
    unreadable_pictures: Unreadable = field(
        default="error",
        metadata={"help": "A picture that can't be opened, of a policy that sees: error, or write [picture] (text)."},
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Learn from so many rows only; none: all."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Test on so many rows only; none: all."})

    def __post_init__(self) -> None:
        for name in ("max_length", "chats_per_demonstration", "max_train_rows", "max_test_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")


def main(args: ModelTokenArguments, config: ModelTokenConfig) -> dict[str, Any]:
    """Train, save and test; returns the accuracies on the test split."""
    train, validation, test = chosen_rows(load_chats(args.dataset), args)
    policy = load_policy(args.model_name_or_path, dtype=args.model_dtype)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    dialogue = load_dialogue(args.model_name_or_path, folder=pictures_folder(args.dataset))

    names = sorted(set(train["model"]))
    trainer = ModelTokenTrainer(
        policy,
        config,
        names,
        examples_of(train, names, dialogue, args.max_length, "train", args.unreadable_pictures),
        examples_of(validation, names, dialogue, args.max_length, "validation", args.unreadable_pictures)
        if len(validation)
        else None,
        name_ids=_ids(dialogue, names) if config.init == "names" else None,
        description_ids=_ids(dialogue, _descriptions(args, names)) if config.init == "descriptions" else None,
    )
    output = Path(config.output_dir)
    save_config(output / "config.yaml", args, config)
    tokens = trainer.train()

    shots = Counter({row["model"]: 0 for row in test}) | demonstrations_per_model(train)
    metrics = selection_accuracy(trainer, tokens, test, dialogue, args.max_length, shots, args.unreadable_pictures)
    write_atomically(output / "selection.json", json.dumps(metrics, indent=1).encode())
    facts = {"policy": args.model_name_or_path, "models": f"{len(names):,}", "chats": f"{len(train):,}"}
    flat = {f"{group}/{name}": value for group, found in metrics.items() for name, value in found.items()}
    title = "ChatGen-Evo, stage 2 (ModelTokens)"
    write_model_card(output, title=title, command=_command(), facts=facts, metrics=flat)
    logger.info("%s", json.dumps(metrics["all"]))
    return metrics


def chosen_rows(data: Any, args: ModelTokenArguments) -> tuple[Any, Any, Any]:
    """The rows of a `DatasetDict` to learn from, to validate on (of models that are learned only), and to test on."""
    train, validation = split_validation(data["train"])
    train = _first(_some_chats(train, args.chats_per_demonstration), args.max_train_rows)
    validation = _some_chats(validation, args.chats_per_demonstration)
    known = set(train["model"])
    validation = validation.select([i for i, name in enumerate(validation["model"]) if name in known])
    return train, validation, _first(data["test"], args.max_test_rows)


def examples_of(
    rows: Any,
    names: Sequence[str],
    dialogue: ChatDialogue,
    max_length: int,
    what: str,
    unreadable: Unreadable = "error",
) -> ModelTokenExamples:
    """Chats with their prompts as prefixes, and their models as indices into `names`.

    Raises:
        DataError: Naming the row that can't be encoded, or whose picture can't be opened (see `check_pictures`).
    """
    number = {name: index for index, name in enumerate(names)}
    sees = isinstance(dialogue, PictureDialogue)
    prefixes, labels, sources, digests = [], [], [], []
    for row in rows:
        where = f"{what} row {row['id']!r}"
        try:
            encoded = dialogue.encode_selection(row["messages"], row["prompt"], max_length)
        except DialogueError as error:
            raise DataError(f"{where}: {error}") from error
        check_pictures(encoded, where, unreadable)
        prefixes.append(encoded.input_ids)
        labels.append(number[row["model"]])
        if sees:
            sources.append([picture.source for picture in encoded.pictures])
            digests.append(picture_digest(dialogue, encoded))
    return ModelTokenExamples(prefixes, labels, PrefixPictures(dialogue, sources, digests) if sees else None)


def selection_accuracy(
    trainer: ModelTokenTrainer,
    tokens: ModelTokens,
    rows: Any,
    dialogue: ChatDialogue,
    max_length: int,
    shots: Counter[str],
    unreadable: Unreadable = "error",
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 accuracy of choosing the row's model after its chat and prompt.

    Rows of models without a token count as wrong. The ranks are kept as `selection.jsonl`.

    Args:
        trainer: With the backbone and its options.
        tokens: What it trained.
        rows: Of the test split.
        dialogue: As in training.
        max_length: As in training.
        shots: Demonstrations that each model was trained on.
        unreadable: As in training.

    Returns:
        For all rows, and by setting, input type and number of demonstrations: `n`, `top1`, `top5`.
    """
    known = set(tokens.names)
    possible = rows.select([i for i, name in enumerate(rows["model"]) if name in known])
    ranks: dict[str, int] = {}
    if len(possible):
        examples = examples_of(possible, tokens.names, dialogue, max_length, "test", unreadable)
        cache = build_cache(
            Path(trainer.config.output_dir) / "cache-test",
            trainer.backbone,
            examples,
            dtype=trainer.config.cache_dtype,
            tokens_per_batch=trainer.config.tokens_per_batch,
            part_rows=trainer.config.part_rows,
            replace_stale=True,
        )
        found = []
        for index in torch.arange(len(possible)).split(_AT_ONCE):
            batch = cache.gather(index, dtype=tokens.rows.dtype, device=tokens.rows.device)
            ranked = rank_examples(
                tokens.rows, batch.hidden, batch.labels, batch.word_lse, transform=tokens.transform,
                block_rows=trainer.config.block_rows,
            )  # fmt: skip
            found += ranked.rank.tolist()
        ranks = dict(zip(possible["id"], found, strict=True))
    lines: list[dict[str, Any]] = [
        {"id": row["id"], "model": row["model"], "rank": ranks.get(row["id"]), "shots": shots[row["model"]]}
        | {"setting": row["setting"], "input_type": row["input_type"]}
        for row in rows
    ]
    path = Path(trainer.config.output_dir) / "selection.jsonl"
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    groups: dict[str, list[int | None]] = {"all": [line["rank"] for line in lines]}
    for key in ("setting", "input_type", "shots"):
        for line in lines:
            value = shot_group(line["shots"]) if key == "shots" else line[key]
            groups.setdefault(f"{key}={value}", []).append(line["rank"])
    return {name: _accuracies(found) for name, found in groups.items()}


def _accuracies(ranks: Sequence[int | None]) -> dict[str, float]:
    count = max(1, len(ranks))
    hits = [sum(rank is not None and rank < k for rank in ranks) / count for k in (1, 5)]
    return {"n": len(ranks), "top1": hits[0], "top5": hits[1]}


def _some_chats(rows: Any, count: int | None) -> Any:
    """The first `count` chats of each demonstration."""
    if count is None:
        return rows
    seen: Counter[str] = Counter()
    chosen = []
    for index, source in enumerate(rows["source"]):
        seen[source["demonstration"]] += 1
        if seen[source["demonstration"]] <= count:
            chosen.append(index)
    return rows.select(chosen, keep_in_memory=True)


def _first(rows: Any, count: int | None) -> Any:
    """A seeded choice of rows: the first ones would all be of the same few models."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=0, keep_in_memory=True).select(range(count), keep_in_memory=True)


def _descriptions(args: ModelTokenArguments, names: Sequence[str]) -> list[str]:
    path = Path(args.catalog) if args.catalog else Path(args.dataset) / "catalog.jsonl"
    catalog = Catalog.load(path)
    if missing := [name for name in names if name not in catalog]:
        raise ConfigError(f"`init: descriptions` needs every model in {path}, but {missing[0]!r} is not in it.")
    return [catalog[name].description or name for name in names]


def _ids(dialogue: ChatDialogue, texts: Sequence[str]) -> list[list[int]]:
    encoded = dialogue.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in encoded]


def _command() -> str:
    return " ".join(["accelerate launch align/model_tokens.py", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(
        main, ModelTokenArguments, ModelTokenConfig, errors=(DataError, ModelTokenError, CatalogError, DialogueError)
    )
