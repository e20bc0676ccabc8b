"""The plan of the synthetic community: who is in it, and which defect each model and each image has.

Defects are dealt from decks of fixed shares (`pocket.vocabulary`). A model of a noise role has sound images and is
wrong in that one way only; the images of in-scope models have one value on each of four axes (visibility, provenance,
format, prompt). Ratings will follow a model's hidden quality, downloads do not. `pocket.community` writes the records.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pocket import vocabulary as words


@dataclass
class Image:
    """One image of the plan: its id and where it stands on the four axes of defects."""

    id: int
    visibility: str = "visible"
    provenance: str = "clean"
    format: str = "plain"
    prompt: str = "fresh"


@dataclass
class Version:
    """One version of a model; `stem` is its file name without suffix and how prompts and metas call it."""

    id: int
    name: str
    stem: str
    file_name: str
    images: list[Image]


@dataclass
class Model:
    """One model of the plan; `quality` is in [0, 1]."""

    role: words.Role
    name: str
    habits: words.Habits
    id: int = 0
    quality: float = 0.5
    downloads: int = 5000
    odd_name: str | None = None
    versions: list[Version] = field(default_factory=list)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` in proportion to `shares`, by the largest-remainder method."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _deal(rng: random.Random, count: int, shares: Mapping[str, float]) -> list[str]:
    """A shuffled deck of `count` labels with exactly the given shares."""
    deck = [label for label, n in zip(shares, apportion(count, list(shares.values())), strict=True) for _ in range(n)]
    rng.shuffle(deck)
    return deck


def _cast(rng: random.Random, num_models: int) -> list[Model]:
    """Every role once, the rest by share; checkpoints cycle through the styles, LoRAs through subjects and styles."""
    extra = apportion(num_models - len(words.ROLES), [role.share - 1 for role in words.ROLES])
    models: list[Model] = []
    used: set[str] = set()
    for role, more in zip(words.ROLES, extra, strict=True):
        topics = ["general", *words.STYLES] if role.type == "Checkpoint" else [*words.SUBJECTS, *words.STYLES]
        rng.shuffle(topics)
        for topic in itertools.islice(itertools.cycle(topics), 1 + more):
            name = words.invent_name(rng, topic, used)
            used.add(name)
            models.append(Model(role, name, words.pick_habits(rng, role.base, topic, name)))
    return models


def _rank_correlation(order: Sequence[int]) -> float:
    """Spearman's correlation of the permutation `order` with 0, 1, 2, ...; 0 if there is one element."""
    n = len(order)
    return 1 - 6 * sum((i - rank) ** 2 for i, rank in enumerate(order)) / (n**3 - n) if n > 1 else 0.0


def _give_stats(rng: random.Random, models: list[Model]) -> None:
    """Spread quality evenly and downloads evenly in log, such that the better are not the more popular."""
    n = len(models)
    rng.shuffle(models)
    popularity = list(range(n))
    while True:
        rng.shuffle(popularity)
        if _rank_correlation(popularity) <= 0.1:
            break
    for i, model in enumerate(models):
        model.quality = (i + 0.5) / n
        model.downloads = round(300 * 500 ** ((popularity[i] + 0.5) / n) * rng.uniform(0.95, 1.05))


def _give_odd_names(rng: random.Random, models: list[Model], each: int) -> None:
    """Give `each` models the name of another one, HTML as a name, and a path as a name."""
    chosen = rng.sample(models, 3 * each)
    donors = rng.sample([model for model in models if model not in chosen], each)
    names = [donor.name for donor in donors] + list(words.HTML_NAMES[:each] + words.PATH_NAMES[:each])
    kinds = ["duplicate_name"] * each + ["html_name"] * each + ["path_name"] * each
    for model, name, kind in zip(chosen, names, kinds, strict=True):
        model.name, model.odd_name = name, kind


def _give_versions(rng: random.Random, models: list[Model], images_per_version: int) -> None:
    """Ids and versions, newest first. Older versions and noise models have a quarter of the images."""
    image_ids = itertools.count(500_001)
    for index, model in enumerate(models):
        model.id = 1001 + 37 * index
        if model.role.name == "nsfw_stub":
            model.name = f"withheld-{model.id}"
        odds = (4, 3, 2, 1) if model.role.type == "Checkpoint" else (7, 3)
        num = rng.choices(range(1, len(odds) + 1), odds)[0] if model.role.in_scope else 1
        for age in range(num):
            version = rng.choice(("v{}", "v{}.0", "{}.0"))
            name = "withheld" if model.role.name == "nsfw_stub" else version.format(num - age)
            stem = words.file_stem(model.name, name)
            folder = "../../etc/" if model.odd_name == "path_name" else ""
            suffix = "ckpt" if model.role.name == "pickle_only" else "safetensors"
            full = model.role.in_scope and age == 0
            num_images = images_per_version if full else max(1, images_per_version // 4)
            if model.role.name == "nsfw_stub":
                num_images = 0
            images = [Image(next(image_ids)) for _ in range(num_images)]
            version_id = 20_000 + 100 * index + num - age
            model.versions.append(Version(version_id, name, stem, f"{folder}{stem}.{suffix}", images))


def peers(models: Iterable[Model], model: Model, kind: str) -> list[Model]:
    """Other in-scope models of type `kind` that work with `model`; out-of-scope bases count as SD 1.5."""
    base = model.role.base if model.role.base == "SDXL 1.0" else "SD 1.5"
    return [m for m in models if m is not model and m.role.in_scope and m.role[1:3] == (kind, base)]


def _give_prompt_origins(rng: random.Random, slots: Sequence[tuple[Model, Version, Image]]) -> None:
    """Say which of the images repeat an earlier prompt; the first of a version has none to repeat."""
    is_older = [version is not model.versions[0] for model, version, _ in slots]
    decks = {
        False: iter(_deal(rng, is_older.count(False), words.PROMPT_ORIGIN)),
        True: iter(_deal(rng, is_older.count(True), words.OLDER_VERSION_PROMPT_ORIGIN)),
    }
    with_prompts: set[int] = set()
    for (model, version, image), older in zip(slots, is_older, strict=True):
        image.prompt = next(decks[older])
        source = model.versions[0] if image.prompt == "cross_version_repeat" else version
        if source.id not in with_prompts:
            image.prompt = "fresh"
        # A prompt taken over from another version is not this version's to repeat.
        if image.prompt == "fresh":
            with_prompts.add(version.id)


def _give_defects(rng: random.Random, models: list[Model]) -> None:
    """Deal the four decks; a card its image can't play (no other version, no earlier prompt) is dropped."""
    slots = [(m, v, i) for m in models if m.role.in_scope for v in m.versions for i in v.images]
    for (_, _, image), label in zip(slots, _deal(rng, len(slots), words.VISIBILITY), strict=True):
        image.visibility = label
    slots = [slot for slot in slots if slot[2].visibility == "visible"]
    for (_, _, image), label in zip(slots, _deal(rng, len(slots), words.FORMAT), strict=True):
        image.format = label
    _give_prompt_origins(rng, slots)
    for kind, shares in (("LORA", words.LORA_PROVENANCE), ("Checkpoint", words.CHECKPOINT_PROVENANCE)):
        mine = [slot for slot in slots if slot[0].role.type == kind]
        for (model, _, image), label in zip(mine, _deal(rng, len(mine), shares), strict=True):
            has_peers = bool(peers(models, model, kind))
            possible = {
                "other_version": len(model.versions) > 1,
                "other_checkpoint": has_peers,
                "two_loras": has_peers,
                "unavailable_base": model.role.base == "SD 1.5",
            }
            image.provenance = label if possible.get(label, True) else "clean"


def plan(num_models: int, images_per_version: int, seed: int) -> list[Model]:
    """The whole community, the same one for the same arguments.

    Raises:
        ValueError: If `num_models` is less than the number of roles, or `images_per_version` less than 1.
    """
    if num_models < len(words.ROLES):
        raise ValueError(f"`num_models` must be at least {len(words.ROLES)}, one per role, but got {num_models}.")
    if images_per_version < 1:
        raise ValueError(f"`images_per_version` must be at least 1, but got {images_per_version}.")
    rng = random.Random(f"{seed}/plan")
    models = _cast(rng, num_models)
    in_scope = [model for model in models if model.role.in_scope]
    for kind in ("Checkpoint", "LORA"):
        _give_stats(rng, [model for model in in_scope if model.role.type == kind])
    _give_odd_names(rng, in_scope, each=2 if num_models >= 40 else 1)
    rng.shuffle(models)
    _give_versions(rng, models, images_per_version)
    _give_defects(rng, models)
    return models


def expected_noise(num_models: int = 60, images_per_version: int = 40, seed: int = 0) -> dict[str, int]:
    """How often each thing occurs in what `generate_models` yields for the same arguments.

    Totals: `models`, `versions`, `images`, and the visible images of in-scope models, `lora_images` and
    `checkpoint_images`. Models by noise role: `models/nsfw_stub`, `/textual_inversion`, `/controlnet`, `/base_sd21`,
    `/base_other`, `/pickle_only`, `/missing_hashes`, `/failed_scan`; in-scope ones with `/duplicate_name`,
    `/html_name`, `/path_name`. Images of in-scope models by axis (see `pocket.vocabulary`): `images/flagged_soft`,
    `/flagged_mature`, `/flagged_x`, `/meta_null`, `/prompt_only`; of the visible ones `images/split_sampler`,
    `/string_numbers`, `/missing_size`, `/extension_sampler`, `/absurd`, and `images/repeat`, `/near_duplicate`,
    `/cross_version_repeat`; `lora_images/clean`, `/unknown_base`, `/two_loras`, `/no_tag`, `/unavailable_base`
    (the base is in the dump but pickle-only or failed its scan), `/lyco`; `checkpoint_images/clean`,
    `/other_checkpoint`, `/unknown_checkpoint`, `/other_version`. Things that don't occur are missing; absent means 0.
    """
    counts: Counter[str] = Counter()
    for model in plan(num_models, images_per_version, seed):
        images = [image for version in model.versions for image in version.images]
        counts.update(models=1, versions=len(model.versions), images=len(images))
        if not model.role.in_scope:
            counts[f"models/{model.role.name}"] += 1
            continue
        if model.odd_name:
            counts[f"models/{model.odd_name}"] += 1
        for image in images:
            if image.visibility != "visible":
                counts[f"images/{image.visibility}"] += 1
                continue
            made_by = "lora_images" if model.role.type == "LORA" else "checkpoint_images"
            counts.update([made_by, f"{made_by}/{image.provenance}"])
            counts.update(f"images/{x}" for x in (image.format, image.prompt) if x not in ("plain", "fresh"))
    return dict(counts)
