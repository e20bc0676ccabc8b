"""A small synthetic model community in the schema of Civitai's REST v1 `/models`: input of the demo and of fast tests.

    python -m pocket.community --output community.jsonl.gz --num_models 60 --images_per_version 40 --seed 0

First the whole community is *planned*: who is in it, and which defect each model and each image has, dealt from decks
of fixed shares (`pocket.vocabulary`). Then each model is written as a record. `expected_noise` counts the plan, so a
filter's funnel can be compared with what was put in. A model of a noise role has sound images and is wrong in that one
way only; the images of in-scope models have one value on each of four axes (visibility, provenance, format, prompt).
Ratings follow a model's hidden quality, downloads do not. Nothing depends on the clock or on global random state.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pocket import vocabulary as words

SITE = "https://models.example.org"
T = TypeVar("T")
Record = dict[str, Any]


@dataclass
class _Image:
    """One image of the plan: its id and where it stands on the four axes of defects."""

    id: int
    visibility: str = "visible"
    provenance: str = "clean"
    format: str = "plain"
    prompt: str = "fresh"


@dataclass
class _Version:
    """One version of a model; `stem` is its file name without suffix and how prompts and metas call it."""

    id: int
    name: str
    stem: str
    file_name: str
    images: list[_Image]


@dataclass
class _Model:
    """One model of the plan; `quality` is in [0, 1]."""

    role: words.Role
    name: str
    habits: words.Habits
    id: int = 0
    quality: float = 0.5
    downloads: int = 5000
    odd_name: str | None = None
    versions: list[_Version] = field(default_factory=list)


class _World(NamedTuple):
    """The plan and what a record needs to know of the others; `bodies` collects the prompts written so far."""

    seed: int
    models: list[_Model]
    bodies: dict[int, list[str]]
    seen: set[tuple[str, ...]]


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


# The plan: cast


def _cast(rng: random.Random, num_models: int) -> list[_Model]:
    """Every role once, the rest by share; checkpoints cycle through the styles, LoRAs through subjects and styles."""
    extra = apportion(num_models - len(words.ROLES), [role.share - 1 for role in words.ROLES])
    models: list[_Model] = []
    used: set[str] = set()
    for role, more in zip(words.ROLES, extra, strict=True):
        topics = ["general", *words.STYLES] if role.type == "Checkpoint" else [*words.SUBJECTS, *words.STYLES]
        rng.shuffle(topics)
        for topic in itertools.islice(itertools.cycle(topics), 1 + more):
            name = words.invent_name(rng, topic, used)
            used.add(name)
            models.append(_Model(role, name, words.pick_habits(rng, role.base, topic, name)))
    return models


def _rank_correlation(order: Sequence[int]) -> float:
    """Spearman's correlation of the permutation `order` with 0, 1, 2, ...; 0 if there is one element."""
    n = len(order)
    return 1 - 6 * sum((i - rank) ** 2 for i, rank in enumerate(order)) / (n**3 - n) if n > 1 else 0.0


def _give_stats(rng: random.Random, models: list[_Model]) -> None:
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


def _give_odd_names(rng: random.Random, models: list[_Model], each: int) -> None:
    """Give `each` models the name of another one, HTML as a name, and a path as a name."""
    chosen = rng.sample(models, 3 * each)
    donors = rng.sample([model for model in models if model not in chosen], each)
    names = [donor.name for donor in donors] + list(words.HTML_NAMES[:each] + words.PATH_NAMES[:each])
    kinds = ["duplicate_name"] * each + ["html_name"] * each + ["path_name"] * each
    for model, name, kind in zip(chosen, names, kinds, strict=True):
        model.name, model.odd_name = name, kind


# The plan: versions, images and defects


def _give_versions(rng: random.Random, models: list[_Model], images_per_version: int) -> None:
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
            images = [_Image(next(image_ids)) for _ in range(num_images)]
            version_id = 20_000 + 100 * index + num - age
            model.versions.append(_Version(version_id, name, stem, f"{folder}{stem}.{suffix}", images))


def _peers(models: Iterable[_Model], model: _Model, kind: str) -> list[_Model]:
    """Other in-scope models of type `kind` that work with `model`; out-of-scope bases count as SD 1.5."""
    base = model.role.base if model.role.base == "SDXL 1.0" else "SD 1.5"
    return [m for m in models if m is not model and m.role.in_scope and m.role[1:3] == (kind, base)]


def _give_prompt_origins(rng: random.Random, slots: Sequence[tuple[_Model, _Version, _Image]]) -> None:
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


def _give_defects(rng: random.Random, models: list[_Model]) -> None:
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
            peers = _peers(models, model, kind)
            possible = {
                "other_version": len(model.versions) > 1,
                "other_checkpoint": bool(peers),
                "two_loras": bool(peers),
                "unavailable_base": model.role.base == "SD 1.5",
            }
            image.provenance = label if possible.get(label, True) else "clean"


def _plan(num_models: int, images_per_version: int, seed: int) -> list[_Model]:
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
    for model in _plan(num_models, images_per_version, seed):
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


# Prompts


def _body(rng: random.Random, world: _World, model: _Model, version: _Version, image: _Image) -> str:
    """The prompt without tags that the plan asks for. Only planned repeats say the same words again."""
    earlier = world.bodies.setdefault(version.id, [])
    if image.prompt == "repeat":
        return rng.choice(earlier)
    if image.prompt == "cross_version_repeat":
        return rng.choice(world.bodies[model.versions[0].id])
    while True:
        if image.prompt == "near_duplicate":
            body = words.recolour(rng, rng.choice(earlier))
        else:
            body = words.write_prompt(rng, model.habits, with_trigger=model.role.type == "LORA")
        key = tuple(re.findall(r"\w+", body.lower()))
        if key not in world.seen:
            world.seen.add(key)
            if image.visibility == "visible":
                earlier.append(body)
            return body


# Records


def _digest(world: _World, *parts: object) -> str:
    return hashlib.sha256("/".join(map(str, (world.seed, *parts))).encode()).hexdigest()


def _hashes(world: _World, version: _Version, file_name: str) -> dict[str, str]:
    """Hashes of a file that doesn't exist: consistent with each other and unique, `BLAKE3` in shape only."""
    sha256 = _digest(world, version.id, file_name)
    hashes = {
        "AutoV1": _digest(world, version.id, file_name, "AutoV1")[:8],
        "AutoV2": sha256[:10],
        "SHA256": sha256,
        "CRC32": f"{zlib.crc32(sha256.encode()):08x}",
        "BLAKE3": hashlib.blake2s(sha256.encode()).hexdigest(),
    }
    return {name: value.upper() for name, value in hashes.items()}


def _number(value: float) -> float:
    """Two decimals, and 5 rather than 5.0, as the site's JSON has it."""
    value = round(value, 2)
    return int(value) if value == int(value) else value


def _pick_base(rng: random.Random, world: _World, model: _Model, version: _Version, image: _Image) -> _Version | None:
    """The checkpoint version an image was made with, or None if it is not in the dump."""
    if image.provenance in ("unknown_base", "unknown_checkpoint"):
        return None
    if image.provenance == "unavailable_base":
        broken = [m for m in world.models if m.role.name in ("pickle_only", "failed_scan")]
        return rng.choice(broken).versions[0]
    if image.provenance == "other_version":
        return rng.choice([v for v in model.versions if v is not version])
    if model.role.type == "Checkpoint" and image.provenance == "clean":
        return version
    checkpoints = _peers(world.models, model, "Checkpoint")
    # A LoRA has a favourite base, the rest is spread.
    favourite = checkpoints[model.id % len(checkpoints)]
    chosen = favourite if model.role.type == "LORA" and rng.random() < 0.5 else rng.choice(checkpoints)
    return rng.choice(chosen.versions)


def _tags(
    rng: random.Random, world: _World, model: _Model, version: _Version, image: _Image
) -> tuple[str, list[Record]]:
    """The `<lora:...>` part of a prompt and its `resources`."""
    if model.role.type != "LORA":
        return "", []
    if image.provenance == "no_tag":
        # As an extension leaves it that applies the LoRA outside the prompt.
        short = _hashes(world, version, version.file_name)["SHA256"][:12].lower()
        return "", [{"hash": short, "name": version.stem, "type": "lora", "weight": None}]
    weight = rng.choice((0.5, 0.6, 0.7, 0.8, 0.8, 1))
    if image.provenance == "lyco":
        return f"<lyco:{version.stem}:{weight}>", []
    uses = [(version.stem, weight)]
    if image.provenance == "two_loras":
        second = rng.choice(_peers(world.models, model, "LORA"))
        uses.append((second.versions[0].stem, rng.choice((0.3, 0.4, 0.5))))
    rng.shuffle(uses)
    tags = " ".join(f"<lora:{stem}:{weight}>" for stem, weight in uses)
    return tags, [{"name": stem, "type": "lora", "weight": weight} for stem, weight in uses]


def _parameters(rng: random.Random, model: _Model) -> Record:
    """Sampler, steps, cfg, seed and size: the model's habits, with noise."""
    habits = model.habits

    def usual(favourite: Sequence[T], all_of_them: Sequence[T]) -> T:
        return rng.choices((*favourite, rng.choice(all_of_them)), (6, 2, 2) if len(favourite) == 2 else (7, 3))[0]

    return {
        "sampler": usual(habits.samplers, words.SAMPLERS),
        "steps": usual([habits.steps], words.STEPS),
        "cfgScale": usual([habits.cfg_scale], words.CFG_SCALES),
        "seed": rng.randrange(1, 2**32),
        "Size": usual(habits.sizes, words.SIZES[model.role.base]),
    }


def _misformat(rng: random.Random, meta: Record, kind: str) -> None:
    """Apply a defect of the format axis to `meta`, in place."""
    if kind == "split_sampler":
        name, karras, _ = meta["sampler"].partition(" Karras")
        schedule = "Karras" if karras else rng.choice(("Automatic", "Automatic", "Exponential"))
        meta |= {"sampler": name, "Schedule type": schedule, "Version": rng.choice(words.SPLIT_WEBUI)}
    elif kind == "string_numbers":
        meta |= {name: str(meta[name]) for name in ("steps", "cfgScale", "seed")}
    elif kind == "missing_size":
        del meta["Size"]
    elif kind == "extension_sampler":
        meta["sampler"] = rng.choice(words.EXTENSION_SAMPLERS)
    elif kind == "absurd":
        name, value = rng.choice(words.ABSURD)
        meta[name] = value


def _meta(rng: random.Random, world: _World, model: _Model, version: _Version, image: _Image) -> Record:
    """What the webui wrote into the picture, keys in the order the site has them."""
    body = _body(rng, world, model, version, image)
    tags, resources = _tags(rng, world, model, version, image)
    prompt = rng.choice((f"{body}, {tags}", f"{body} {tags}", f"{tags} {body}")) if tags else body
    mine = rng.sample(model.habits.negatives, rng.randint(3, 6)) + rng.sample(words.NEGATIVES, rng.randint(0, 3))
    meta: Record = {"prompt": prompt, "negativePrompt": ", ".join(dict.fromkeys(mine))}
    if image.visibility == "prompt_only":
        return meta
    meta |= _parameters(rng, model)
    base = _pick_base(rng, world, model, version, image)
    if base is None:
        stem, model_hash = rng.choice(words.UNKNOWN_STEMS), _digest(world, "unknown", rng.random())[:10]
    else:
        hashes = _hashes(world, base, base.file_name)
        stem, model_hash = base.stem, hashes["AutoV1" if rng.random() < 0.06 else "AutoV2"].lower()
    if rng.random() < 0.8:
        meta["Model"] = stem
    meta["Model hash"] = model_hash
    if rng.random() < 0.55:
        meta["hashes"] = {"model": model_hash}
    meta["resources"] = [*resources, {"hash": model_hash, "name": stem, "type": "model"}]
    if rng.random() < 0.55:
        meta["Clip skip"] = rng.choice(("2", "2", "2", "1"))
    if rng.random() < 0.4:
        meta["Denoising strength"] = rng.choice(("0.3", "0.4", "0.5", "0.55", "0.7"))
        meta["Hires upscale"] = rng.choice(("1.5", "2", "2"))
        meta["Hires upscaler"] = rng.choice(words.UPSCALERS)
        if rng.random() < 0.5:
            meta["Hires steps"] = rng.choice(("10", "15", "20"))
    if rng.random() < 0.3:
        meta["ENSD"] = "31337"
    if rng.random() < 0.15:
        meta["Version"] = rng.choice(words.OLD_WEBUI)
    _misformat(rng, meta, image.format)
    return meta


def _image_record(rng: random.Random, world: _World, model: _Model, version: _Version, image: _Image) -> Record:
    if image.visibility.startswith("flagged"):
        width, height = map(int, model.habits.sizes[0].split("x"))
        flag = image.visibility.removeprefix("flagged_").capitalize()
        stub = {"id": image.id, "nsfw": flag, "width": width, "height": height}
        return stub | {"hash": None, "url": None, "meta": None}
    meta = None if image.visibility == "meta_null" else _meta(rng, world, model, version, image)
    width, height = map(int, (meta or {}).get("Size", model.habits.sizes[0]).split("x"))
    scale = float((meta or {}).get("Hires upscale", 1))
    name = _digest(world, "image", image.id)
    return {
        "id": image.id,
        "url": f"{SITE}/images/{name[:32]}/width=450/{image.id}.jpeg",
        "nsfw": "None",
        "width": int(width * scale),
        "height": int(height * scale),
        "hash": "U" + "".join(rng.choices("0123456789ABCDEFGHIJKLMNOPabcdefghijklmnop#$%*+-.:;=?@[]^_{|}~", k=35)),
        "meta": meta,
    }


def _file_records(rng: random.Random, world: _World, model: _Model, version: _Version) -> list[Record]:
    """The primary file and, beside a third of the sound checkpoints, the same weights as a pickle."""
    role = model.role
    names = [version.file_name]
    if role.type == "Checkpoint" and role.in_scope and rng.random() < 0.35:
        names.append(version.file_name.replace(".safetensors", ".ckpt"))
    is_xl = (role.type, role.base) == ("Checkpoint", "SDXL 1.0")
    size = words.SDXL_CHECKPOINT_SIZE if is_xl else words.FILE_SIZES[role.type]
    records = []
    for index, name in enumerate(names):
        form = "PickleTensor" if name.endswith(".ckpt") else "SafeTensor"
        url = f"{SITE}/api/download/models/{version.id}"
        record = {
            "id": 10 * version.id + index,
            "name": name,
            "sizeKB": size + rng.randrange(1024) / 1024,
            "type": "Model",
            "metadata": {"fp": "fp16", "size": "pruned" if index else "full", "format": form},
            "pickleScanResult": "Danger" if role.name == "failed_scan" else "Success",
            "virusScanResult": "Success",
            "hashes": {} if role.name == "missing_hashes" else _hashes(world, version, name),
            "downloadUrl": f"{url}?type=Model&format={form}&size=pruned&fp=fp16" if index else url,
        }
        records.append(record if index else record | {"primary": True})
    return records


def _stats(downloads: int, quality: float, rng: random.Random) -> Record:
    return {
        "downloadCount": downloads,
        "ratingCount": max(2, round(downloads / rng.uniform(90, 260))),
        "rating": _number(min(5, 3.5 + 1.45 * quality + rng.uniform(-0.03, 0.03))),
    }


def _version_records(rng: random.Random, world: _World, model: _Model) -> Iterator[Record]:
    parts = [model.downloads // 2**age for age in range(1, len(model.versions))]
    # The newest version takes the rest, so that the versions sum to the model.
    parts.insert(0, model.downloads - sum(parts))
    first_day = datetime(2023, 8, 1) if model.role.base == "SDXL 1.0" else datetime(2023, 1, 5)
    for age, version in enumerate(model.versions):
        days = model.id % 60 + 21 * (len(model.versions) - age)
        day = first_day + timedelta(days=days, seconds=rng.randrange(86_400))
        head: Record = {"id": version.id, "modelId": model.id, "name": version.name}
        stats = _stats(parts[age], model.quality, rng)
        if model.role.name == "nsfw_stub":
            yield head | {"baseModel": model.role.base, "stats": stats, "files": [], "images": []}
            continue
        has_trigger = model.role.type in ("LORA", "TextualInversion") and rng.random() < 0.85
        note = f"<p>{rng.choice(('First release', 'Retrained', 'Less noise', 'Better colours'))} &ndash; have fun!</p>"
        yield head | {
            "createdAt": f"{day.isoformat()}.{rng.randrange(1000):03d}Z",
            "updatedAt": f"{(day + timedelta(days=2)).isoformat()}.000Z",
            "trainedWords": [model.habits.trigger, *model.habits.signature[:1]] if has_trigger else [],
            "baseModel": model.role.base,
            "description": note if rng.random() < 0.4 else None,
            "stats": stats,
            "files": _file_records(rng, world, model, version),
            "images": [_image_record(rng, world, model, version, image) for image in version.images],
            "downloadUrl": f"{SITE}/api/download/models/{version.id}",
        }


def _model_record(world: _World, model: _Model) -> Record:
    rng = random.Random(f"{world.seed}/model/{model.id}")
    stats = _stats(model.downloads, model.quality, rng)
    social = {"favoriteCount": model.downloads // 9, "commentCount": model.downloads // 400}
    stats = {"downloadCount": stats["downloadCount"], **social, **stats}
    head: Record = {"id": model.id, "name": model.name, "type": model.role.type}
    versions = list(_version_records(rng, world, model))
    if model.role.name == "nsfw_stub":
        withheld = {"nsfw": True, "poi": False, "tags": [], "description": None}
        return head | withheld | {"stats": stats, "modelVersions": versions}
    return head | {
        "poi": False,
        "nsfw": False,
        "allowCommercialUse": rng.choice(("None", "Image", "Rent", "Sell", "Sell")),
        "allowDerivatives": rng.random() < 0.9,
        "stats": stats,
        "tags": [model.habits.topic, *rng.sample(words.TAGS, rng.randint(0, 3))],
        "description": words.write_description(rng, model.name, model.role.type, model.habits, model.quality),
        "creator": {"username": rng.choice(words.CREATORS)},
        "modelVersions": versions,
    }


def generate_models(num_models: int = 60, images_per_version: int = 40, seed: int = 0) -> Iterator[Record]:
    """Yield the records of a synthetic community, the same ones for the same arguments.

    Args:
        num_models: Models in all, at least 12 (one per role, see `pocket.vocabulary.ROLES`).
        images_per_version: Images of the newest version of an in-scope model; older versions and noise models have a
            quarter of that (at least 1).
        seed: Any integer.

    Raises:
        ValueError: If a number is too small (when the first record is asked for).
    """
    models = _plan(num_models, images_per_version, seed)
    world = _World(seed, models, bodies={}, seen=set())
    for model in models:
        yield _model_record(world, model)


def write_dump(path: str | Path, num_models: int = 60, images_per_version: int = 40, seed: int = 0) -> dict[str, int]:
    """Write `generate_models(...)` as JSON lines to `path`, gzipped if it ends in `.gz`; same arguments, same bytes.

    The file appears complete or not at all. Returns the number of `models`, `versions` and `images` written.

    Raises:
        ValueError: If `path` ends in neither `.jsonl` nor `.jsonl.gz`, or a number is too small.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"`path` must end in .jsonl or .jsonl.gz, but got {str(path)!r}.")
    records = list(generate_models(num_models, images_per_version, seed))
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    versions = [version for record in records for version in record["modelVersions"]]
    num_images = sum(len(version["images"]) for version in versions)
    return {"models": len(records), "versions": len(versions), "images": num_images}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write a dump and say in one line what is in it."""
    parser = argparse.ArgumentParser(description="Write a small synthetic model community as Civitai REST v1 records.")
    parser.add_argument("--output", required=True, help="File to write, .jsonl or .jsonl.gz.")
    parser.add_argument("--num_models", type=int, default=60, help="Models in all, noise included (at least 12).")
    parser.add_argument("--images_per_version", type=int, default=40, help="Images of each model's newest version.")
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same bytes.")
    args = parser.parse_args(argv)
    try:
        counts = write_dump(args.output, args.num_models, args.images_per_version, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"Wrote {', '.join(f'{n:,} {what}' for what, n in counts.items())} to {args.output}")


if __name__ == "__main__":
    main()
