"""Demonstrations and their split (ChatGen Sec. 3.1.1 and 3.1.3)."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.bench.assemble import read_rows, row_id
from align.bench.chatgen.schema import Demonstration, Reference
from align.bench.near_duplicates import near_duplicate_clusters
from rollouts.catalog import Catalog


def read_demonstrations(path: Path, catalog: Catalog) -> list[Demonstration]:
    """The rows that were collected (`align.bench.collect`), each with its model's name in the catalogue."""
    return [demonstration(row, catalog) for row in read_rows(path)]


def demonstration(row: Mapping[str, Any], catalog: Catalog) -> Demonstration:
    """One row as a demonstration."""
    entry = catalog.by_version(row["version_id"])
    assert entry is not None  # every version with rows is in the catalogue
    return Demonstration(
        id=row_id(dict(row)),
        prompt=row["prompt"],
        negative_prompt=row["negative_prompt"],
        model=entry.name,
        arguments={
            "sampler": row["sampler"],
            "steps": row["steps"],
            "cfg_scale": float(row["cfg_scale"]),
            "width": row["width"],
            "height": row["height"],
            "clip_skip": row["clip_skip"],
        },
        base_model=entry.base_model,
        description=entry.description,
        image=row["url"],
        source={"model_id": entry.model_id, "version_id": entry.version_id, "image_id": row["image_id"]},
    )


def unlike_others(prompts: Sequence[str], threshold: float) -> list[bool]:
    """Whether each prompt has no near duplicate among all the others, of whichever model.

    Only such a prompt may be tested on: what is asked for must not stand among what was trained on.
    """
    clusters = near_duplicate_clusters(prompts, threshold)
    sizes = Counter(clusters)
    return [sizes[cluster] == 1 for cluster in clusters]


class NeighbourReferences:
    """Pictures that chats point to: the demonstration's own, or another one of the same model and split.

    Args:
        demonstrations: All that chats are written for.
        splits: Of each demonstration, by id.
        own: How often the reference is the demonstration's own picture.
    """

    def __init__(self, demonstrations: Iterable[Demonstration], splits: Mapping[str, str], own: float = 0.5) -> None:
        self._own = own
        self._splits = splits
        self._groups: defaultdict[tuple[str, str], list[Demonstration]] = defaultdict(list)
        for item in demonstrations:
            if item.image is not None:
                self._groups[item.model, splits[item.id]].append(item)

    def __call__(self, item: Demonstration, rng: random.Random) -> Reference | None:
        """The picture for one chat of a demonstration, or `None` if there is none."""
        others = [o for o in self._groups[item.model, self._splits[item.id]] if o.prompt != item.prompt]
        chosen = item
        if others and (item.image is None or rng.random() >= self._own):
            chosen = rng.choice(others)
        return None if chosen.image is None else Reference(chosen.image, chosen.prompt)

    def fingerprint(self, items: Iterable[Demonstration]) -> list[list[str]]:
        """What the pictures of these demonstrations' chats are chosen from."""
        groups = dict.fromkeys((item.model, self._splits[item.id]) for item in items)
        return [[other.id for other in self._groups[group]] for group in groups]


def settings_by_model(models: Iterable[str], training: Iterable[Demonstration], few_shot_below: int) -> dict[str, str]:
    """`supervised` or `few_shot` for each model, by its number of demonstrations for training."""
    counts = Counter(item.model for item in training)
    return {name: "few_shot" if counts[name] < few_shot_below else "supervised" for name in models}
