"""Base checkpoints that the source lacks, looked up by hash in the live API.

A dump holds part of a community, and half of its LoRA images were made with a checkpoint of the other part. Their data
name its hash; the API knows which version that is. What is found joins the source as one more part, without images: it
serves as base checkpoint only.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align.bench.civitai_api import CivitaiClient
from align.bench.config import CollectionConfig
from align.bench.extract import extract_part, read_parts
from align.bench.funnel import Funnel
from align.bench.sources import Item
from rewards.files import write_atomically

# A1111's old eight digits are a hash of 64 kB of the file; they collide, and the API would answer with the oldest.
MIN_DIGITS = 10
STAGE = "looked-up bases"


def missing_hashes(parts: Iterable[dict[str, Any]]) -> list[str]:
    """Checkpoint hashes that images name and no version of the source has: one per file, the longest form."""
    known: set[str] = set()
    named: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for version in (*part["versions"], *part["unavailable"]):
            known.update(version["hashes"])
        for version in part["versions"]:
            for image in version["images"]:
                hashes = tuple(value for value in image["checkpoint_hashes"] if len(value) >= MIN_DIGITS)
                if hashes:
                    named.setdefault(hashes[0], hashes)
    return sorted(value for value, hashes in named.items() if not known.intersection(hashes))


def look_up_bases(paths: list[Path], client: CivitaiClient, config: CollectionConfig, path: Path) -> Path:
    """Write the part of the base checkpoints that these parts lack, unless it is there; returns its path.

    Raises:
        RequestError: If the API fails for good. What it answered is kept; a restart goes on there.
    """
    if path.is_file():
        return path
    funnel = Funnel()
    have = {v["model_id"] for part in read_parts(paths) for v in (*part["versions"], *part["unavailable"])}
    model_ids: set[int] = set()
    for value, model_id in _models_of(missing_hashes(read_parts(paths)), client):
        funnel.enter(STAGE)
        if model_id is None:
            funnel.remove(STAGE, "hash_unknown", value)
        elif model_id not in have:
            model_ids.add(model_id)
    items = [
        Item(f"model {model_id}", record)
        for model_id in tqdm(sorted(model_ids), desc="fetching base checkpoints", unit=" models")
        if (record := client.model(model_id)) is not None
    ]
    part = extract_part(items, config)
    part.funnel = funnel
    part.distributions.clear()
    for version in part.versions:
        version |= {"images": [], "looked_up": True}
    write_atomically(path, part.to_json())
    return path


def _models_of(hashes: list[str], client: CivitaiClient) -> Iterator[tuple[str, int | None]]:
    """The model that each hash belongs to: SHA256 thousands at a time, others one by one."""
    long = [value for value in hashes if len(value) == 64]
    found = client.resolve_hashes(long) if long else {}
    for value in tqdm(hashes, desc="looking up base checkpoints", unit=" hashes"):
        if len(value) == 64:
            yield value, found[value][0] if value in found else None
        else:
            version = client.version_by_hash(value)
            model_id = (version or {}).get("modelId")
            yield value, model_id if isinstance(model_id, int) else None
