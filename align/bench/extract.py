"""Stage one of the builder: a stream of raw records becomes parts, small files of what the later stages need.

A part covers `records_per_part` consecutive records and is written atomically, so a build that was killed goes on at
the first missing part. Memory holds one part at a time.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from align.bench.config import CollectionConfig
from align.bench.filters import TYPES, availability_rules, first_broken, image_is_nsfw, model_rules
from align.bench.funnel import Funnel
from align.bench.infotext import Unusable, read_generation
from align.bench.records import FileRecord, ModelRecord, VersionRecord
from align.bench.sources import Item, Opener
from rewards.files import write_atomically

MAX_DESCRIPTION_CHARS = 20_000  # of HTML; a card of 20 MB says no more than its beginning
MAX_WORDS, MAX_WORD_CHARS = 32, 1000  # of tags and trigger words
MAX_URL_CHARS = 2000
MAX_LABEL_CHARS = 60  # of a value counted in a distribution


class Part:
    """What one run of records came to: lines for the next stage, the funnel, and distributions for the data card."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Any]] = []  # available versions with their usable images
        self.unavailable: list[dict[str, Any]] = []  # id, hashes and reason of the others
        self.funnel = Funnel()
        self.distributions: dict[str, Counter[str]] = {}
        self.records = 0

    def count(self, distribution: str, value: Any) -> None:
        """Count one value of a distribution of Fig. 2."""
        self.distributions.setdefault(distribution, Counter())[str(value)[:MAX_LABEL_CHARS]] += 1

    def to_json(self) -> bytes:
        """The part as it is stored."""
        return json.dumps(
            {
                "versions": self.versions,
                "unavailable": self.unavailable,
                "funnel": self.funnel.to_dict(),
                "distributions": self.distributions,
                "records": self.records,
            },
            ensure_ascii=False,
        ).encode(errors="replace")  # JSON can hold half a surrogate pair, UTF-8 can't


def extract(open_items: Opener, config: CollectionConfig, folder: Path) -> list[Path]:
    """Write all parts that are missing; returns the paths of all, in order.

    The file `done` lists them once the source has ended, so a later restart need not read the source again.
    """
    done = folder / "done"
    if done.is_file():
        return [folder / name for name in done.read_text().split()]
    paths: list[Path] = []
    items = open_items()
    with tqdm(desc="reading records", unit=" records", mininterval=1.0) as progress:
        for number in range(10**9):
            path = folder / f"part-{number:06d}.json"
            if path.is_file():
                taken = sum(1 for _ in islice(items, config.records_per_part))
            else:
                batch = list(islice(items, config.records_per_part))
                taken = len(batch)
                if taken:
                    write_atomically(path, extract_part(batch, config).to_json())
            progress.update(taken)
            if not taken:
                break
            paths.append(path)
            if taken < config.records_per_part:
                break
    write_atomically(done, "\n".join(path.name for path in paths).encode())
    return paths


def read_parts(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The stored parts, one at a time."""
    for path in paths:
        yield json.loads(path.read_bytes())


def extract_part(items: list[Item], config: CollectionConfig) -> Part:
    """Apply the rules that need only the record itself."""
    part = Part()
    rules = model_rules(config), availability_rules(config)
    for item in items:
        part.records += 1
        part.funnel.enter("models")
        if item.problem is not None:
            part.funnel.remove("models", "invalid_json", f"{item.location}: {item.problem}")
            continue
        try:
            model = ModelRecord.model_validate(item.record)
        except ValidationError as error:
            part.funnel.remove("models", "malformed_record", f"{item.location}: {first_problem(error)}")
            continue
        part.count("type", model.type)
        part.count("nsfw", "NSFW" if model.nsfw else "safe")
        if rule := first_broken(rules[0], model):
            part.funnel.remove("models", rule, f"{item.location}: {model.name!r} ({model.type})")
            continue
        for raw in model.modelVersions:
            _extract_version(part, model, raw, rules[1], config, item.location)
    return part


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic complains about, in one short line."""
    first = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}, got {str(first['input'])[:60]!r}"


def _extract_version(
    part: Part, model: ModelRecord, raw: Any, rules: list[Any], config: CollectionConfig, location: str
) -> None:
    part.funnel.enter("versions")
    try:
        version = VersionRecord.model_validate(raw)
    except ValidationError as error:
        part.funnel.remove("versions", "malformed_version", f"{location}: {first_problem(error)}")
        return
    part.count("base model", version.baseModel)
    rule = first_broken(rules, model, version)
    part.count("availability", rule or "available")
    hashes = sorted({h for file in version.files if file.is_weights for h in _hashes(file)})
    if rule is not None:
        part.funnel.remove("versions", rule, f"{location}: {model.name!r}, version {version.id}")
        part.unavailable.append({"version_id": version.id, "model_id": model.id, "hashes": hashes, "rule": rule})
        return
    for name, value in (
        ("downloads", version.stats.downloadCount),
        ("likes", model.stats.likes),
        ("ratings", version.stats.ratingCount),
    ):
        part.count(name, magnitude(value))
    images = [image for raw_image in version.images if (image := _extract_image(part, raw_image, config, location))]
    part.versions.append(_draft(model, version, hashes) | {"images": images})


def _hashes(file: FileRecord) -> list[str]:
    return [h for kind in ("AutoV1", "AutoV2", "SHA256") if (h := file.hash_of(kind))]


def magnitude(value: float | None) -> str:
    """Bin of a counter for a histogram with constant memory: "hidden", "0", or the power of ten below it, "1e3"."""
    if value is None or not math.isfinite(value):
        return "hidden"
    return "0" if value < 1 else f"1e{int(math.log10(value))}"


def _draft(model: ModelRecord, version: VersionRecord, hashes: list[str]) -> dict[str, Any]:
    """What a catalogue entry and a model card will need."""
    file = version.best_file()
    assert file is not None and file.hashes is not None  # the availability rules saw to it
    weights = [f for f in version.files if f.is_weights]
    return {
        "version_id": version.id,
        "model_id": model.id,
        "model_name": model.title,
        "version_name": version.title,
        "type": TYPES[model.type],
        "base_model": version.baseModel,
        "hashes": hashes,
        "sha256": sorted({sha for f in weights if (sha := f.hash_of("SHA256"))}),
        "stems": sorted({f.name.rsplit(".", 1)[0].lower() for f in weights if f.name}),
        "file": {
            "uri": file.downloadUrl,
            "format": file.format,
            "sha256": file.hash_of("SHA256"),
            "size": file.size,
        },
        "trigger_words": [word[:MAX_WORD_CHARS] for word in version.trainedWords[:MAX_WORDS]],
        "tags": [tag[:MAX_WORD_CHARS] for tag in model.tag_names[:MAX_WORDS]],
        "description": (model.description or "")[:MAX_DESCRIPTION_CHARS],
        "version_description": (version.description or "")[:MAX_DESCRIPTION_CHARS],
        "stats": {
            "downloads": version.stats.downloadCount,
            "ratings": version.stats.ratingCount,
            "rating": version.stats.rating,
            "likes": model.stats.likes,
        },
        "license": {
            "allow_commercial_use": json.dumps(model.allowCommercialUse)[:MAX_WORD_CHARS],
            "allow_derivatives": json.dumps(model.allowDerivatives),
        },
    }


def _extract_image(part: Part, raw: Any, config: CollectionConfig, location: str) -> dict[str, Any] | None:
    """A usable image's generation data, or `None` with the rule counted."""
    part.funnel.enter("images")
    if not isinstance(raw, dict):
        part.funnel.remove("images", "malformed_image", f"{location}: {raw!r}")
        return None
    if image_is_nsfw(raw):
        part.funnel.remove("images", "image_nsfw", f"image {raw.get('id')}: {raw.get('nsfw')}")
        return None
    if raw.get("type") not in (None, "image"):
        part.funnel.remove("images", "not_a_picture", f"image {raw.get('id')}: {raw['type']}")
        return None
    generation = read_generation(
        raw.get("meta"),
        keep_attention=config.keep_attention,
        allow_image_to_image=config.allow_image_to_image,
    )
    if isinstance(generation, Unusable):
        part.funnel.remove("images", generation.rule, f"image {raw.get('id')}: {str(generation.value)[:80]!r}")
        return None
    if len(generation.prompt) > config.max_prompt_chars:
        part.funnel.remove("images", "prompt_too_long", f"image {raw.get('id')}: {len(generation.prompt)} characters")
        return None
    url = raw.get("url")
    url = url if isinstance(url, str) and url.startswith("https://") and len(url) <= MAX_URL_CHARS else None
    return {"image_id": _image_id(raw), "url": url, **vars(generation)}


def _image_id(raw: dict[str, Any]) -> str:
    """Civitai's id, else the file name in the URL (galleries lacked ids for some years), else a hash of the record."""
    if re.fullmatch(r"[0-9]{1,20}", number := str(raw.get("id"))):
        return number
    stem = str(raw.get("url")).rsplit("/", 1)[-1].rsplit(".", 1)[0]
    if re.fullmatch(r"[\w-]{1,40}", stem) and stem != "None":
        return stem
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:16]
