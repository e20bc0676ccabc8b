"""The pocket world's community in the schema of Civitai's REST v1 `/models`, with pictures that its models drew.

    python -m pocket.world --output world
    python -m pocket.dump --world world --output dump --images_per_model 40 --seed 0
    python -m align.bench.dabench --source dump/models.jsonl.gz --output dabench

Writes models.jsonl.gz at once, then images/<image id>.png, drawn by the models of the world from exactly what each
image's `meta` says; a run that was killed goes on where it was. `--pictures false` leaves them out; models.jsonl.gz is
the same. Same arguments, same bytes.

What differs from Civitai's records: a file's `downloadUrl` is its path in the world's folder, which the DABench builder
hands on as the `uri` that `rollouts.weights.WeightFolder` resolves; its `SHA256` is that of `WeightFolder`, since a
checkpoint is a folder here; an image's `url` is its path beside the dump; `width` and `height` are those of the call,
drawn an eighth (SD 1.5) or a sixteenth (SDXL) as large. `pocket.dump_posts` says what was posted: nothing of what
`pocket.drawing` holds out. With so few words prompts look alike: for 400 images per model the builder's largest cluster
of near-duplicates has 198 of 6,272 prompts, with `--near_duplicate 0.9` it has 5.
"""

import gzip
import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pocket import vocabulary as words
from pocket.catalogue import BY_SLUG, LOST_FILE, MODELS, PocketModel, version_id
from pocket.dump_posts import MAX_PICTURES, Picture, pictures_of
from rewards.commandline import ConfigError, run_command
from rewards.files import write_atomically
from rollouts.samplers import SCHEDULES
from rollouts.weights import weights_parts, weights_sha256

logger = logging.getLogger(__name__)

DUMP_FILE = "models.jsonl.gz"
SHORT_HASHES = 0.05
"""Share of images that name their checkpoint by A1111's old hash of eight digits."""
Record = dict[str, Any]


class Weights(NamedTuple):
    """What the community knows of a file: upper-case hex hashes, and bytes."""

    sha256: str
    auto_v1: str
    size: int


@dataclass
class DumpConfig:
    """Options of `python -m pocket.dump`."""

    world: str = field(metadata={"help": "Folder that `python -m pocket.world` wrote."})
    output: str = field(metadata={"help": "Folder for models.jsonl.gz and images/."})
    images_per_model: int = field(default=40, metadata={"help": "Images in each model's gallery."})
    seed: int = field(default=0, metadata={"help": "Same seed, same bytes."})
    pictures: bool = field(default=True, metadata={"help": "Draw the images; without them their urls lead nowhere."})
    batch_size: int = field(
        default=2, metadata={"help": "Pictures drawn at once; few have the same settings. Decides their last bits."}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.images_per_model <= MAX_PICTURES:
            raise ValueError(
                f"`images_per_model` must be between 1 and {MAX_PICTURES}, but got {self.images_per_model}."
            )
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {self.batch_size}.")


def generate_models(world: str | Path, images_per_model: int = 40, seed: int = 0) -> Iterator[Record]:
    """Yield the record of every model of `pocket.catalogue`, the same ones for the same arguments and weights.

    Args:
        world: Folder of the pocket world, for hashes and sizes.
        images_per_model: Images in each gallery, 1 to 9,999; the withheld model has none.
        seed: Any integer.

    Raises:
        ConfigError: A file that a record needs is not in the world.
        ValueError: If `images_per_model` is out of range.
    """
    weights = {model.slug: read_weights(world, model) for model in MODELS if model.defect != "nsfw"}
    for model in MODELS:
        pictures = pictures_of(model, images_per_model, seed)
        yield _model_record(model, weights, pictures, random.Random(f"{seed}/records/{model.slug}"))


def read_weights(world: str | Path, model: PocketModel) -> Weights:
    """Hashes and size of a model's file or folder; invented, as in `pocket.world`, for the one whose file is missing.

    Raises:
        ConfigError: If it is not in the world, though it should be.
    """
    if model.defect == "missing_file":
        sha256, size = LOST_FILE
        return Weights(sha256, sha256[-8:], size)
    path = Path(world) / model.uri
    parts = [part for part in weights_parts(path) if part.is_file()]
    if not parts:
        raise ConfigError(
            f"`world` {world} has no weights of {model.name} at {model.uri}; `python -m pocket.world` builds a world."
        )
    content = b"".join(part.read_bytes() for part in parts)
    # A1111's `model_hash`: 64 kB from the first megabyte on; of smaller files that of nothing, E3B0C442
    auto_v1 = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8].upper()
    return Weights(weights_sha256(path), auto_v1, len(content))


def file_stem(model: PocketModel) -> str:
    """How prompts and image data call a model: the name of its file on Civitai, without suffix."""
    return words.file_stem(model.name, model.version)


def write_dump(path: str | Path, world: str | Path, images_per_model: int = 40, seed: int = 0) -> dict[str, int]:
    """Write `generate_models(...)` as gzipped JSON lines. Returns the number of `models` and `images`.

    Raises:
        ConfigError, ValueError: See `generate_models`; nothing is written then.
    """
    records = list(generate_models(world, images_per_model, seed))
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    write_atomically(path, gzip.compress(data, mtime=0))
    return {"models": len(records), "images": sum(len(record["modelVersions"][0]["images"]) for record in records)}


def _number(value: float) -> float:
    """5 rather than 5.0, as the site's JSON has it."""
    return int(value) if value == int(value) else value


def _model_record(
    model: PocketModel, weights: dict[str, Weights], pictures: list[Picture], rng: random.Random
) -> Record:
    stats = {
        "downloadCount": model.downloads,
        "thumbsUpCount": model.thumbs_up,
        "commentCount": model.downloads // 400,
        "ratingCount": max(2, model.thumbs_up // 6),
        "rating": model.rating,
    }
    number = version_id(model)
    version: Record = {"id": number, "modelId": number - 1000, "name": model.version}
    version_stats = {name: stats[name] for name in ("downloadCount", "thumbsUpCount", "ratingCount", "rating")}
    head: Record = {"id": number - 1000, "name": model.name, "type": "LORA" if model.base else "Checkpoint"}
    if model.defect == "nsfw":
        version |= {"baseModel": model.base_model, "stats": version_stats, "files": [], "images": []}
        withheld = {"nsfw": True, "poi": False, "tags": [], "description": None}
        return head | withheld | {"stats": stats, "modelVersions": [version]}
    day = datetime(2023, 9, 1) + timedelta(days=11 * (number % 100), seconds=rng.randrange(86_400))
    version |= {
        "createdAt": f"{day.isoformat()}.{rng.randrange(1000):03d}Z",
        "updatedAt": f"{(day + timedelta(days=2)).isoformat()}.000Z",
        "trainedWords": list(model.trigger_words),
        "baseModel": model.base_model,
        "description": None,
        "stats": version_stats,
        "files": [_file_record(model, weights[model.slug])],
        "images": [_image_record(model, weights, picture, rng) for picture in pictures],
        "downloadUrl": model.uri,
    }
    return head | {
        "poi": False,
        "nsfw": False,
        "allowCommercialUse": rng.choice(("None", "Image", "Rent", "Sell", "Sell")),
        "allowDerivatives": rng.random() < 0.9,
        "stats": stats,
        "tags": [model.style or "general", *rng.sample(words.TAGS, 2)],
        "description": model.card,
        "creator": {"username": rng.choice(words.CREATORS)},
        "modelVersions": [version],
    }


def _file_record(model: PocketModel, weights: Weights) -> Record:
    return {
        "id": 10 * version_id(model),
        "name": f"{file_stem(model)}.safetensors",
        "sizeKB": weights.size / 1024,
        "type": "Model",
        "metadata": {"fp": "fp16", "size": "full", "format": "SafeTensor"},
        "pickleScanResult": "Success",
        "virusScanResult": "Success",
        "hashes": {"AutoV1": weights.auto_v1, "AutoV2": weights.sha256[:10], "SHA256": weights.sha256},
        "downloadUrl": model.uri,
        "primary": True,
    }


def _image_record(model: PocketModel, weights: dict[str, Weights], picture: Picture, rng: random.Random) -> Record:
    width, height = picture.settings.size
    likes = _likes(model, picture, rng)
    return {
        "id": picture.id,
        "url": f"images/{picture.id}.png",
        "nsfw": "None",
        "width": width,
        "height": height,
        # in the shape of a BlurHash
        "hash": "U" + "".join(rng.choices("0123456789ABCDEFGHIJKLMNOPabcdefghijklmnop#$%*+-.:;=?@[]^_{|}~", k=35)),
        "postId": picture.post_id,
        "stats": {"likeCount": likes, "heartCount": rng.randint(0, likes // 2), "commentCount": likes // 20},
        "meta": _meta(model, weights, picture, rng),
    }


def _likes(model: PocketModel, picture: Picture, rng: random.Random) -> int:
    """Likes of an image: the model's downloads, luck, and a third less where the settings are bound to show."""
    settings = picture.settings
    careless = settings.steps < 8 or settings.cfg >= 15
    return round(0.1 * math.sqrt(model.downloads) * math.exp(rng.gauss(0, 0.7)) * (2 / 3 if careless else 1))


def _meta(model: PocketModel, weights: dict[str, Weights], picture: Picture, rng: random.Random) -> Record:
    """What the webui wrote into the picture, keys in the order the site has them."""
    settings, base = picture.settings, BY_SLUG[picture.settings.base]
    prompt, resources = picture.prompt, []
    if settings.weight is not None:
        stem, weight = file_stem(model), _number(settings.weight)
        tag = f"<lora:{stem}:{weight}>"
        prompt = rng.choice((f"{prompt}, {tag}", f"{prompt} {tag}", f"{tag} {prompt}"))
        resources.append({"name": stem, "type": "lora", "weight": weight})
    known = weights[base.slug]
    short = rng.random() < SHORT_HASHES
    model_hash = (known.auto_v1 if short else known.sha256[:10]).lower()
    sampler, schedule = settings.sampler, None
    if settings.webui == "v1.9.4":
        schedule = next((name for name in SCHEDULES if sampler.endswith(f" {name}")), None)
        sampler, schedule = (sampler.removesuffix(f" {schedule}"), schedule) if schedule else (sampler, "Uniform")
    meta: Record = {
        "prompt": prompt,
        "negativePrompt": settings.negative_prompt,
        "sampler": sampler,
        "steps": settings.steps,
        "cfgScale": _number(settings.cfg),
        "seed": picture.seed,
        "Size": "{}x{}".format(*settings.size),
        "Model": file_stem(base),
        "Model hash": model_hash,
    }
    if rng.random() < 0.55:
        meta["hashes"] = {"model": model_hash}
    meta["resources"] = [*resources, {"hash": model_hash, "name": file_stem(base), "type": "model"}]
    if settings.webui:
        meta["Version"] = settings.webui
    return meta | ({"Schedule type": schedule} if schedule else {})


def main(config: DumpConfig) -> dict[str, Any]:
    """Write the dump, draw its pictures, and say what came of it."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`output` {output} is a file; name a folder, which may not exist yet.")
    summary: dict[str, Any] = write_dump(output / DUMP_FILE, config.world, config.images_per_model, config.seed)
    logger.info("%d models, %d images in %s", summary["models"], summary["images"], output / DUMP_FILE)
    if config.pictures:
        from pocket.dump_pictures import draw_images

        summary |= draw_images(
            config.world, output, images_per_model=config.images_per_model, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        logger.info("%d pictures in %s", summary["drawn"], output / "images")
    return summary


if __name__ == "__main__":
    run_command(main, DumpConfig)
