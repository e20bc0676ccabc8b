"""Scores of pictures for prompts they were not drawn with, kept as they are made.

A method of ChatGen draws with its own prompt and is scored for the human-validated one (ChatGen Sec. 4.1), so that
scores can't stand in the store of pictures, which knows a picture's own prompt only.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align.evaluation.plan_pictures import make_pool
from rewards.batching import prefetch
from rewards.files import write_atomically
from rollouts.run import RunConfig
from rollouts.store import ImageStore
from rollouts.store_errors import StoreError
from rollouts.workers import Pool

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
"""Key of a picture in the store, and the prompt that it is scored for."""

_AT_ONCE = 32
_THREADS = 4


def score_pairs(pairs: Iterable[Pair], config: RunConfig, path: Path) -> dict[Pair, dict[str, float | None]]:
    """Scores of every pair by every scorer of `config`.

    Args:
        pairs: Equal ones are scored once.
        config: With `scorers`; the store and the workers are its own.
        path: A JSON line for each pair that was scored; what other weights or options have scored is scored again.

    Returns:
        By pair and scorer; None: the scorer gave no number.

    Raises:
        StoreError: A picture is gone or broken; the store has forgotten it, so that the next run draws it again.
        ConfigError: Scorers that can't be loaded.
    """
    wanted = list(dict.fromkeys(pairs))
    if not wanted:
        return {}
    with make_pool(config) as pool:
        scorers = {name: f"{name}:{_digest(about)}" for name, about in pool.describe_scorers().items()}
        kept = _read_scores(path)
        names = {pair: (pair[0], _digest(pair[1])) for pair in wanted}
        missing = [pair for pair in wanted if set(scorers.values()) - set(kept.get(names[pair], {}))]
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ImageStore(config.store_path(), index=config.store_index) as store, path.open("a") as file:
                for pair, found in _scored(missing, pool, store):
                    line = {"picture": pair[0], "prompt": names[pair][1]}
                    scores = {scorer: found.get(name) for name, scorer in scorers.items()}
                    kept.setdefault(names[pair], {}).update(scores)
                    file.write(json.dumps(line | {"scores": scores}) + "\n")
                    file.flush()
    return {pair: {name: kept[names[pair]][scorer] for name, scorer in scorers.items()} for pair in wanted}


def _scored(pairs: list[Pair], pool: Pool, store: ImageStore) -> Iterator[tuple[Pair, dict[str, float]]]:
    """Chunk by chunk, pictures being read ahead."""
    pairs = sorted(pairs)  # pairs of one picture beside each other: it is encoded once
    waiting: list[list[Pair]] = []

    def chunks() -> Iterator[tuple[list[Any], list[str]]]:
        left = iter(pairs)
        pictures = prefetch(_reader(store), [key for key, _ in pairs], num_workers=_THREADS, ahead=2 * _AT_ONCE)
        while chunk := list(islice(left, _AT_ONCE)):
            images = dict(zip((key for key, _ in chunk), islice(pictures, len(chunk)), strict=True))
            waiting.append(chunk)
            yield [images[key] for key, _ in chunk], [prompt for _, prompt in chunk]

    with tqdm(total=len(pairs), desc="score", unit="image", disable=None) as bar:
        for scores in pool.score(chunks()):
            chunk = waiting.pop(0)
            yield from zip(chunk, scores, strict=True)
            bar.update(len(chunk))


def _reader(store: ImageStore) -> Any:
    def read(key: str) -> Any:
        try:
            return store.load(key)
        except StoreError as error:
            if error.reason in ("missing_file", "corrupt_file"):
                store.forget([key])
                raise StoreError(error.reason, f"{error} Run the same command again to draw it anew.") from error
            raise

    return read


def _read_scores(path: Path) -> dict[tuple[str, str], dict[str, float | None]]:
    """By picture and digest of the prompt, then by scorer; a line that a kill cut short is dropped."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        write_atomically(path, b"".join(line + b"\n" for line in lines[:-1]))
    kept: dict[tuple[str, str], dict[str, float | None]] = {}
    for line in filter(None, lines[:-1]):
        entry = json.loads(line)
        kept.setdefault((entry["picture"], entry["prompt"]), {}).update(entry["scores"])
    return kept


def _digest(value: Mapping[str, Any] | str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
