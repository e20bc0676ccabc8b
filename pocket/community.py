"""A small synthetic model community in the schema of Civitai's REST v1 `/models`: input of the demo and of fast tests.

    python -m pocket.community --output community.jsonl.gz --num_models 60 --images_per_version 40 --seed 0

First the whole community is planned (`pocket.community_plan`), then each model is written as a record.
`expected_noise` counts the plan, so a filter's funnel can be compared with what was put in. Nothing depends on the
clock or on global random state.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pocket import vocabulary as words
from pocket.community_plan import Image, Model, Version, expected_noise, peers, plan
from rewards.files import write_atomically

__all__ = ["expected_noise", "generate_models", "write_dump"]

SITE = "https://models.example.org"
T = TypeVar("T")
Record = dict[str, Any]


class _World(NamedTuple):
    """The plan and what a record needs to know of the others; `bodies` collects the prompts written so far."""

    seed: int
    models: list[Model]
    bodies: dict[int, list[str]]
    seen: set[tuple[str, ...]]


def _body(rng: random.Random, world: _World, model: Model, version: Version, image: Image) -> str:
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


def _digest(world: _World, *parts: object) -> str:
    return hashlib.sha256("/".join(map(str, (world.seed, *parts))).encode()).hexdigest()


def _hashes(world: _World, version: Version, file_name: str) -> dict[str, str]:
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


def _pick_base(rng: random.Random, world: _World, model: Model, version: Version, image: Image) -> Version | None:
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
    checkpoints = peers(world.models, model, "Checkpoint")
    # A LoRA has a favourite base, the rest is spread.
    favourite = checkpoints[model.id % len(checkpoints)]
    chosen = favourite if model.role.type == "LORA" and rng.random() < 0.5 else rng.choice(checkpoints)
    return rng.choice(chosen.versions)


def _tags(rng: random.Random, world: _World, model: Model, version: Version, image: Image) -> tuple[str, list[Record]]:
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
        second = rng.choice(peers(world.models, model, "LORA"))
        uses.append((second.versions[0].stem, rng.choice((0.3, 0.4, 0.5))))
    rng.shuffle(uses)
    tags = " ".join(f"<lora:{stem}:{weight}>" for stem, weight in uses)
    return tags, [{"name": stem, "type": "lora", "weight": weight} for stem, weight in uses]


def _parameters(rng: random.Random, model: Model) -> Record:
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


def _meta(rng: random.Random, world: _World, model: Model, version: Version, image: Image) -> Record:
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


def _image_record(rng: random.Random, world: _World, model: Model, version: Version, image: Image) -> Record:
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


def _file_records(rng: random.Random, world: _World, model: Model, version: Version) -> list[Record]:
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


def _version_records(rng: random.Random, world: _World, model: Model) -> Iterator[Record]:
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


def _model_record(world: _World, model: Model) -> Record:
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
    models = plan(num_models, images_per_version, seed)
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
    write_atomically(path, data)
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
