"""Stage three of the builder: from demonstrations to a catalogue and rows with calls (DESIGN 4, steps 6 and 7)."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

from align.bench.config import CollectionConfig, DABenchConfig
from align.bench.descriptions import Description, ModelCard
from align.bench.filters import first_broken, quality_rules
from align.bench.funnel import Funnel
from align.bench.near_duplicates import assign_splits, near_duplicate_clusters
from align.bench.records import ModelRecord, Stats, VersionRecord
from align.bench.resolve import Dropped, VersionIndex
from rollouts.api import ARCHITECTURES, DEFAULT_CFG, DEFAULT_SAMPLER, DEFAULT_STEPS
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.names import MAX_NAME_LENGTH, clean_name

PARAMETERS = ("size", "sampler", "steps", "cfg_scale")


class Usage:
    """How a version's images were made: for its default parameters, its base checkpoint and its card."""

    def __init__(self) -> None:
        self.parameters: dict[str, Counter[Any]] = {name: Counter() for name in PARAMETERS}
        self.bases: Counter[int] = Counter()
        self.weights: list[float] = []
        self.prompts: list[str] = []
        self.rows = 0

    def add(self, row: dict[str, Any], max_prompts: int) -> None:
        """Count one row of this version."""
        self.rows += 1
        self.parameters["size"][(row["width"], row["height"])] += 1
        for name in PARAMETERS[1:]:
            self.parameters[name][row[name]] += 1
        if row["base_version_id"] is not None:
            self.bases[row["base_version_id"]] += 1
        if row["lora_weight"] is not None:
            self.weights.append(row["lora_weight"])
        if len(self.prompts) < max_prompts:
            self.prompts.append(row["prompt"])


def download_floor(parts: Iterable[dict[str, Any]], quantile: float) -> dict[str, float]:
    """Downloads at the quantile of the available versions, per base model."""
    downloads: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        for draft in part["versions"]:
            downloads[draft["base_model"]].append(draft["stats"]["downloads"] or 0)
    return {name: sorted(values)[int(quantile * (len(values) - 1))] for name, values in downloads.items()}


def outdated_versions(parts: Iterable[dict[str, Any]], newest: int | None) -> frozenset[int]:
    """Available versions that are not among the `newest` ones of their model and architecture; `None`: none."""
    versions: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
    if newest is None:
        return frozenset()
    for part in parts:
        for draft in part["versions"]:
            versions[draft["model_id"], draft["base_model"]].add(draft["version_id"])
    return frozenset(version for ids in versions.values() for version in sorted(ids)[:-newest])


def index_versions(
    parts: Iterable[dict[str, Any]],
    config: CollectionConfig,
    floor: dict[str, float],
    funnel: Funnel,
    outdated: frozenset[int] = frozenset(),
) -> VersionIndex:
    """Index every available version and apply the quality rules to it; those that are outdated break `outdated`."""
    index = VersionIndex()
    rules = quality_rules(config, floor)
    for part in parts:
        for draft in part["versions"]:
            stats = draft["stats"]
            model = ModelRecord.model_construct(stats=Stats(favoriteCount=stats["likes"]))
            version = VersionRecord.model_construct(
                baseModel=draft["base_model"],
                stats=Stats(downloadCount=stats["downloads"], ratingCount=stats["ratings"], rating=stats["rating"]),
            )
            rule = "outdated" if draft["version_id"] in outdated else first_broken(rules, model, version)
            # Looked-up base checkpoints were not part of the source and are counted elsewhere.
            if rule is not None and not draft.get("looked_up"):
                funnel.remove("versions", rule, f"{draft['model_name']!r}, version {draft['version_id']}")
            index.add(draft, good=rule is None)
        for version in part["unavailable"]:
            index.add_unavailable(version["hashes"])
    return index


def demonstrations(
    parts: Iterable[dict[str, Any]], index: VersionIndex, config: CollectionConfig, funnel: Funnel
) -> Iterator[dict[str, Any]]:
    """Rows, one per image that demonstrates a version; repeats of a prompt for the same version are dropped."""
    seen: set[bytes] = set()
    for part in parts:
        for draft in part["versions"]:
            for image in draft["images"]:
                gallery = draft["version_id"]
                found = index.demonstration(image, gallery, config.lora_without_tag)
                if isinstance(found, Dropped):
                    funnel.remove("images", found.rule, f"image {image['image_id']}: {found.value}")
                    continue
                words = " ".join(re.findall(r"\w+", image["prompt"].lower()))
                digest = blake2b(f"{found.version_id}\0{words}".encode(), digest_size=12).digest()
                identity = blake2b(row_id({"version_id": found.version_id, **image}).encode(), digest_size=12).digest()
                if digest in seen or identity in seen:
                    funnel.remove("images", "duplicate", f"image {image['image_id']}: {image['prompt'][:60]!r}")
                    continue
                seen |= {digest, identity}
                yield image | found._asdict() | {"gallery_version_id": gallery}


def write_rows(rows: Iterable[dict[str, Any]], path: Path, config: CollectionConfig) -> dict[int, Usage]:
    """Spool rows to a JSONL file and count their versions' usage."""
    usage: defaultdict[int, Usage] = defaultdict(Usage)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            usage[row["version_id"]].add(row, config.sample_prompts)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return dict(usage)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of `write_rows`."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def catalogue_versions(usage: dict[int, Usage]) -> set[int]:
    """Versions that get a catalogue entry: those with rows, and the base checkpoints of the LoRAs among them."""
    return set(usage) | {base_of(u) for u in usage.values() if u.bases}


def base_of(usage: Usage) -> int:
    """The base checkpoint a LoRA is used with most; of equally frequent ones the oldest version."""
    return min(usage.bases, key=lambda version: (-usage.bases[version], version))


def catalogue_drafts(parts: Iterable[dict[str, Any]], versions: set[int]) -> Iterator[dict[str, Any]]:
    """Stage-one drafts of these versions, each once, without their images."""
    left = set(versions)
    for part in parts:
        for draft in part["versions"]:
            if draft["version_id"] in left:
                left.remove(draft["version_id"])
                yield {key: value for key, value in draft.items() if key != "images"}


def unique_names(drafts: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Catalogue names: "<model> - <version>"; where two are alike, the newer ones carry their version id."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for draft in sorted(drafts, key=lambda d: d["version_id"]):
        model, version = draft["model_name"], draft["version_name"]
        name = clean_name(f"{model} - {version}" if version else model)
        suffix = f" ({draft['version_id']})"
        while name.lower() in taken:  # more than once if somebody called a model "<name> (<id>)"
            name = name[: MAX_NAME_LENGTH - len(suffix)].strip() + suffix
        taken.add(name.lower())
        names[draft["version_id"]] = name
    return names


def model_card(draft: dict[str, Any], name: str, usage: Usage | None) -> ModelCard:
    """What a describer is told about a version."""
    return ModelCard(
        key=str(draft["version_id"]),
        name=name,
        type=draft["type"],
        base_model=draft["base_model"],
        description_html=draft["description"],
        version_description_html=draft["version_description"],
        tags=tuple(draft["tags"]),
        trigger_words=tuple(draft["trigger_words"]),
        sample_prompts=tuple(usage.prompts) if usage else (),
    )


def catalogue_entry(
    draft: dict[str, Any], names: dict[int, str], usage: Usage | None, description: Description
) -> CatalogEntry:
    """The catalogue entry of a version."""
    is_lora = draft["type"] == "LoRA"
    stats = {key: value for key, value in draft["stats"].items() if value is not None}
    return CatalogEntry(
        name=names[draft["version_id"]],
        version_id=draft["version_id"],
        model_id=draft["model_id"],
        type=draft["type"],
        base_model=draft["base_model"],
        base_checkpoint=names[base_of(usage)] if is_lora and usage else None,
        files=[draft["file"]],
        trigger_words=[clean_name(word) for word in draft["trigger_words"]],
        lora_weight=(round(median(usage.weights), 2) if usage and usage.weights else 1.0) if is_lora else None,
        description=description.text,
        description_source=description.source,
        default_parameters=default_parameters(draft["base_model"], usage),
        stats=stats,
        license=draft["license"],
    )


def default_parameters(base_model: str, usage: Usage | None) -> dict[str, Any]:
    """The most frequent value of each parameter among a version's images; without images the architecture's own."""
    side = ARCHITECTURES[base_model].default_side
    best: dict[str, Any] = {"size": (side, side), "sampler": DEFAULT_SAMPLER, "steps": DEFAULT_STEPS}
    best["cfg_scale"] = DEFAULT_CFG
    if usage is not None and usage.rows:
        # Ties go to the smaller value, so that the order of the images does not matter.
        best = {n: min(c, key=lambda value, c=c: (-c[value], value)) for n, c in usage.parameters.items()}
    return {
        "width": best["size"][0],
        "height": best["size"][1],
        "sampling method": best["sampler"],
        "sampling steps": best["steps"],
        "cfg scale": best["cfg_scale"],
    }


def dabench_row(row: dict[str, Any], entry: CatalogEntry, split: str) -> dict[str, Any]:
    """A DABench row: instruction, call, provenance (DiffAgent Sec. 3.1, "Dataset composition")."""
    return {
        "id": row_id(row),
        "instruction": {"prompt": row["prompt"], "negative prompt": row["negative_prompt"]},
        "api": {
            "model": entry.name,
            "type": entry.type,
            "base Model": entry.base_model,
            "width": row["width"],
            "height": row["height"],
            "sampling method": row["sampler"],
            "sampling steps": row["steps"],
            "cfg scale": float(row["cfg_scale"]),
            "model description": entry.description,
        },
        "base_model": entry.base_model,
        "split": split,
        "source": {
            "model_id": entry.model_id,
            "version_id": entry.version_id,
            "image_id": row["image_id"],
            "gallery_version_id": row["gallery_version_id"],
            "base_version_id": row["base_version_id"],
            "lora_weight": row["lora_weight"],
            "description": entry.description_source,
        },
    }


def row_id(row: dict[str, Any]) -> str:
    """Id of a row: the version it demonstrates and the image it comes from."""
    return f"{row['version_id']}-{row['image_id']}"


def split_rows(path: Path, catalog: Catalog, config: DABenchConfig) -> dict[str, str]:
    """Split of every row id; each architecture is split on its own, since each trains its own agent."""
    by_architecture: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for row in read_rows(path):
        entry = catalog.by_version(row["version_id"])
        assert entry is not None  # every version with rows is in the catalogue
        ids, prompts = by_architecture[entry.base_model]
        ids.append(row_id(row))
        prompts.append(row["prompt"])
    splits: dict[str, str] = {}
    for ids, prompts in by_architecture.values():
        clusters = near_duplicate_clusters(prompts, config.near_duplicate)
        assigned = assign_splits(
            ids, clusters, sft_share=config.sft_share, rrhf_share=config.rrhf_share, seed=config.seed
        )
        splits.update(zip(ids, assigned, strict=True))
    return splits
