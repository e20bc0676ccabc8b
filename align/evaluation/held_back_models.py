"""How well models are chosen that were added later, from a few examples each (ChatGen-Evo, stage 2).

    python -m align.evaluation.held_back_models --tokens runs/chatgen-tokens --dataset data/chatgenbench \
        --output_dir runs/held_back

Takes the hidden states that `align/model_tokens.py` left in `tokens`, holds back some models, trains the rows of all
others, then adds the held-back ones with 1, 2, 5 examples (`ModelTokens.add_models`, the old rows stay as they are) and
asks for the chats of the test split. Nearest neighbours of TF-IDF vectors are shown the same examples.
"""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from align.bench.chatgen.schema import chat_text
from align.chats import load_chats
from align.evaluation.metrics import Estimate, bootstrap
from align.model_tokens import ModelTokenArguments, chosen_rows
from align.pairs import DataError
from align.trainers.model_token_cache import HiddenBatch, HiddenCache
from align.trainers.model_token_config import ModelTokenConfig, ModelTokenError
from align.trainers.model_token_fit import HiddenSource, adamw_epoch, epoch_batches, score_rows
from align.trainers.model_token_initial import class_mean_rows
from align.trainers.model_token_loss import LogitTransform, rank_examples
from align.trainers.model_token_rows import ModelTokens
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically

logger = logging.getLogger(__name__)


@dataclass
class HeldBackConfig:
    """Options of `python -m align.evaluation.held_back_models`."""

    tokens: str = field(metadata={"help": "Output folder of align/model_tokens.py, with its caches."})
    dataset: str = field(metadata={"help": "ChatGenBench folder it was trained on."})
    output_dir: str = field(metadata={"help": "Folder of held_back.json and .md."})
    num_models: int = field(default=50, metadata={"help": "Models that are held back."})
    shots: list[int] = field(
        default_factory=lambda: [1, 2, 5], metadata={"help": "Demonstrations that they are added with."}
    )
    replay: int = field(default=1, metadata={"help": "Examples of each old model that adding sees as well."})
    l2: float = field(default=1e-4, metadata={"help": "What holds a new row near the mean of the old ones."})
    seed: int = field(default=0, metadata={"help": "Of the choice of models and examples."})

    def __post_init__(self) -> None:
        if self.num_models < 1 or not self.shots or min(self.shots) < 1:
            raise ValueError(f"`num_models` and `shots` must be 1 or more: {self.num_models}, {self.shots}.")
        if self.replay < 0:
            raise ValueError(f"`replay` must be 0 or more, but is {self.replay}.")


@dataclass(frozen=True)
class Examples:
    """The hidden states of a split, with the rows they are of.

    Attributes:
        source: Of hidden states; labels are indices into the names of all models.
        models: Label of each example. Shape (n,).
        demonstrations: What each example is a chat of.
        texts: Chat and prompt, for those who can't read hidden states.
    """

    source: HiddenSource
    models: Tensor
    demonstrations: Sequence[str]
    texts: Sequence[str]


def main(config: HeldBackConfig) -> dict[str, Any]:
    """Hold back, train, add, test; returns what held_back.json holds."""
    names, training, train, learned, test, transform = read_run(config)
    held = hold_back(train, learned, test, config)
    logger.info("%d of %d models are held back", len(held), len(names))
    old = [label for label in range(len(names)) if label not in set(held)]
    tokens = train_old(names, old, train, learned, training, transform)
    report: dict[str, Any] = {"models": len(names), "held back": len(held), "shots": {}}
    report["before"] = {"old": _accuracy(_ranks(tokens, names, test, set(old)))}
    for shots in config.shots:
        shown, replayed = few(train, learned, held, old, shots, config)
        added = add(tokens, names, held, train, shown, replayed, config)
        found = {
            "new": _accuracy(_ranks(added, names, test, set(held))),
            "old": _accuracy(_ranks(added, names, test, set(old))),
        }
        # The neighbours can look at everything: the old models' examples, and the new ones'.
        seen = [*shown, *(i for i in learned.tolist() if int(train.models[i]) in set(old))]
        found |= {f"TF-IDF {group}": value for group, value in neighbours(train, seen, test, held, old).items()}
        report["shots"][shots] = found
    output = Path(config.output_dir)
    save_config(output / "config.yaml", config)
    write_atomically(output / "held_back.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "held_back.md", to_markdown(report).encode())
    logger.info("\n%s", to_markdown(report))
    return report


def read_run(
    config: HeldBackConfig,
) -> tuple[list[str], ModelTokenConfig, Examples, Tensor, Examples, LogitTransform]:
    """Names, options, training examples, which of them were learned from, test examples, and the logits' transform.

    Raises:
        ConfigError: The folder has no run of align/model_tokens.py, or one on other data.
        ModelTokenError: Its caches can't be read.
    """
    folder = Path(config.tokens)
    arguments, training = training_options(folder, config.dataset)
    names = sorted(ModelTokens.load(folder).names)
    train, validation, test = chosen_rows(load_chats(config.dataset), arguments)
    known = set(names)
    test = [row for row in test if row["model"] in known]
    rows = [*train, *validation]
    caches = (
        HiddenCache(training.cache_dir or folder / "cache"),
        HiddenCache(folder / "cache-test"),
    )
    for cache, of, what in ((caches[0], rows, "training"), (caches[1], test, "test")):
        expected = [names.index(row["model"]) for row in of]
        if cache.manifest.labels != expected:
            raise ConfigError(f"{cache.folder} does not hold the {what} chats of `dataset` {config.dataset}.")
    found = [_examples(cache, of) for cache, of in zip(caches, (rows, test), strict=True)]
    return names, training, found[0], torch.arange(len(train)), found[1], caches[0].transform


def training_options(folder: str | Path, dataset: str) -> tuple[ModelTokenArguments, ModelTokenConfig]:
    """How a run of align/model_tokens.py was made, from what it saved, with the data set where it is now.

    Raises:
        ConfigError: The folder has no such run.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"`tokens` {folder} has no config.yaml; give an output folder of align/model_tokens.py.")
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    return _options(ModelTokenArguments, options | {"dataset": dataset}), _options(ModelTokenConfig, options)


def hold_back(train: Examples, learned: Tensor, test: Examples, config: HeldBackConfig) -> list[int]:
    """Models with enough demonstrations to be added with, and with test chats, by chance.

    Raises:
        ConfigError: There are not so many.
    """
    known: defaultdict[int, set[str]] = defaultdict(set)
    for index in learned.tolist():
        known[int(train.models[index])].add(train.demonstrations[index])
    tested = set(test.models.tolist())
    possible = sorted(m for m, found in known.items() if len(found) >= max(config.shots) and m in tested)
    if len(possible) < config.num_models:
        raise ConfigError(
            f"`num_models` is {config.num_models}, but only {len(possible)} models have test chats and "
            f"{max(config.shots)} demonstrations to learn from."
        )
    return sorted(random.Random(config.seed).sample(possible, config.num_models))


def train_old(
    names: Sequence[str],
    old: Sequence[int],
    train: Examples,
    learned: Tensor,
    config: ModelTokenConfig,
    transform: LogitTransform,
) -> ModelTokens:
    """Rows of the old models only, as `ModelTokenTrainer` trains them: AdamW from the class means, until validation
    gets no better."""
    place = torch.full((len(names),), -1)
    place[list(old)] = torch.arange(len(old))

    def source(index: Tensor) -> HiddenBatch:
        batch = train.source(index)
        return batch._replace(labels=place[batch.labels])

    is_old = place[train.models] >= 0
    index = learned[is_old[learned]]
    validation = torch.arange(len(learned), len(train.models))
    validation = validation[is_old[validation]]
    options: dict[str, Any] = {"transform": transform, "block_rows": config.block_rows}
    rows = class_mean_rows(source, index, len(old), **options)
    optimizer = torch.optim.AdamW([rows], lr=config.learning_rate, weight_decay=config.weight_decay)
    best, best_loss, waited = rows.clone(), float("inf"), 0
    for epoch in tqdm(range(config.num_epochs), desc="rows of the old models", unit="epoch", disable=None):
        batches = epoch_batches(index, config.batch_size, seed=config.seed, epoch=epoch)
        adamw_epoch(rows, optimizer, source, batches, **options)
        loss = score_rows(rows, source, validation, **options).loss
        best, best_loss, waited = (rows.clone(), loss, 0) if loss < best_loss else (best, best_loss, waited + 1)
        if waited > (config.patience or config.num_epochs):
            break
    return ModelTokens(tuple(names[label] for label in old), best, transform)


def few(
    train: Examples, learned: Tensor, held: Sequence[int], old: Sequence[int], shots: int, config: HeldBackConfig
) -> tuple[list[int], list[int]]:
    """A chat of each of `shots` demonstrations of every held-back model, and `replay` of every old one."""
    chats: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for index in learned.tolist():
        chats[int(train.models[index])].setdefault(train.demonstrations[index], index)
    rng = random.Random(config.seed + 1)
    # Shuffled once: who is added with five examples has seen the two and the one.
    order = {label: rng.sample(sorted(chats[label].values()), len(chats[label])) for label in sorted(chats)}
    shown = [index for label in held for index in order[label][:shots]]
    return shown, [index for label in old for index in order.get(label, [])[: config.replay]]


def add(
    tokens: ModelTokens,
    names: Sequence[str],
    held: Sequence[int],
    train: Examples,
    shown: Sequence[int],
    replayed: Sequence[int],
    config: HeldBackConfig,
) -> ModelTokens:
    """The held-back models' rows, fitted on what is shown."""
    batch = train.source(torch.tensor([*shown, *replayed]))
    number = {label: i for i, label in enumerate(held)}
    labels = torch.tensor([number[int(train.models[i])] for i in shown] + [-1] * len(replayed))
    new = [names[label] for label in held]
    return tokens.add_models(new, batch.hidden, labels, batch.word_lse, l2=config.l2)


def neighbours(
    train: Examples, seen: Sequence[int], test: Examples, held: Sequence[int], old: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Accuracy of the models of the nearest training texts (TF-IDF, cosine), of new and old models' test chats."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    matrix = vectorizer.fit_transform([train.texts[i] for i in seen])
    of_seen = train.models[list(seen)].numpy()
    order = np.argsort(of_seen, kind="stable")
    labels, starts = np.unique(of_seen[order], return_index=True)
    column = {int(label): i for i, label in enumerate(labels)}
    ranks = np.full(len(test.models), len(labels))
    for start in range(0, len(test.models), 256):
        similarity = (vectorizer.transform(test.texts[start : start + 256]) @ matrix.T).toarray()
        best = np.maximum.reduceat(similarity[:, order], starts, axis=1)
        for row, values in enumerate(best):
            own = column.get(int(test.models[start + row]))
            if own is not None:
                ranks[start + row] = int((values > values[own]).sum())
    groups = {"new": set(held), "old": set(old)}
    return {name: _accuracy([int(r) for r, m in zip(ranks, test.models.tolist(), strict=True) if m in group])
            for name, group in groups.items()}  # fmt: skip


def to_markdown(report: Mapping[str, Any]) -> str:
    """A line for each number of examples; per cent with 95% intervals."""
    before = report["before"]["old"]
    lines = [
        f"{report['held back']} of {report['models']:,} models held back; old ones before: "
        f"{_cell(before['top1'])} (n = {before['n']:,}).",
        "",
        "| examples | new, top 1 | new, top 5 | old, top 1 | TF-IDF: new, top 1 | new, top 5 | old, top 1 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shots, found in report["shots"].items():
        groups = (found["new"], found["old"], found["TF-IDF new"], found["TF-IDF old"])
        new, old, near, near_old = groups
        cells = (new["top1"], new["top5"], old["top1"], near["top1"], near["top5"], near_old["top1"])
        lines.append(f"| {shots} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _options(kind: Any, given: Mapping[str, Any]) -> Any:
    """Those of a saved configuration that are of one of the classes it was made of."""
    return kind(**{key: value for key, value in given.items() if key in kind.__dataclass_fields__})


def _examples(cache: HiddenCache, rows: Sequence[Mapping[str, Any]]) -> Examples:
    everything = cache.gather(torch.arange(len(cache)))
    texts = [f"{chat_text(row['messages'])}\n{row['prompt']}" for row in rows]
    demonstrations = [row["source"]["demonstration"] for row in rows]
    return Examples(everything.select, everything.labels, demonstrations, texts)


def _ranks(tokens: ModelTokens, names: Sequence[str], test: Examples, group: set[int]) -> list[int]:
    """How many models are ahead of each test chat's own, for the models of a group."""
    number = {name: i for i, name in enumerate(tokens.names)}
    index = torch.tensor([i for i, label in enumerate(test.models.tolist()) if label in group])
    ranks: list[int] = []
    for piece in index.split(1024):
        batch = test.source(piece)
        labels = torch.tensor([number[names[label]] for label in batch.labels.tolist()])
        found = rank_examples(tokens.rows, batch.hidden, labels, batch.word_lse, transform=tokens.transform)
        ranks += found.rank.tolist()
    return ranks


def _accuracy(ranks: Sequence[int]) -> dict[str, Any]:
    top1, top5 = (bootstrap([float(rank < k) for rank in ranks]) for k in (1, 5))
    return {"n": len(ranks), "top1": top1._asdict(), "top5": top5._asdict()}


def _cell(estimate: Mapping[str, Any]) -> str:
    e = Estimate(**estimate)
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


if __name__ == "__main__":
    run_command(main, HeldBackConfig, errors=(DataError, ModelTokenError))
