"""Draws the pictures of the pocket community's dump with a rollout (`rollouts.rollout`), each from its own settings."""

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocket.catalogue import BY_SLUG, MODELS, PocketModel, catalog_entry
from pocket.dump import read_weights
from pocket.dump_posts import Picture, Settings, pictures_of
from pocket.world import NATIVE_SIDE
from rewards.files import write_atomically
from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.requests import RenderSettings
from rollouts.rollout import Rollout
from rollouts.workers import InProcessPool, WorkerSpec

logger = logging.getLogger(__name__)

WORK_FOLDER = ".work"
"""In the dump's folder: the calls, and the store of what is drawn, which a second run takes up."""


def draw_images(
    world: str | Path, output: str | Path, *, images_per_model: int = 40, seed: int = 0, batch_size: int = 2
) -> dict[str, Any]:
    """Write images/<image id>.png for every image of the dump with the same arguments.

    Models that can't be drawn with have no pictures. Other files in images/ are removed.

    Args:
        world: Folder of the pocket world.
        output: Of the dump; its folder `.work` keeps what is drawn.
        images_per_model, seed: Those of the dump.
        batch_size: Pictures drawn at once; part of what decides their last bits.

    Returns:
        `drawn` and `failed`: numbers of pictures.
    """
    output, work = Path(output), Path(output) / WORK_FOLDER
    galleries = [(model, pictures_of(model, images_per_model, seed)) for model in MODELS]
    catalog = Catalog(_entries(world, galleries).values())
    catalog.save(work / "catalog.jsonl")
    images = [(model, picture) for model, pictures in galleries for picture in pictures]
    rows = [json.dumps(_row(catalog, *image)) + "\n" for image in images]
    write_atomically(work / "calls.jsonl", "".join(rows).encode())
    # Padded, so that a picture does not depend on what a kill has left of its batch.
    settings = RenderSettings(batch_size=batch_size, pad_batches=True, native_side=NATIVE_SIDE, trigger_words="none")
    rollout = Rollout(
        work / "calls.jsonl", work / "catalog.jsonl", settings, store=work / "store", num_images=1, seed=seed,
        weights=world,
    )  # fmt: skip
    spec = WorkerSpec(
        catalog=str(work / "catalog.jsonl"), weights=str(world), settings=settings, store=str(work / "store")
    )
    with rollout:
        if not rollout.finished:
            with InProcessPool(spec) as pool:
                rollout.run(pool)
        failed = _export(rollout, images, output / "images")
    return {"drawn": len(images) - failed, "failed": failed}


def _entries(world: str | Path, galleries: list[tuple[PocketModel, list[Picture]]]) -> dict[str, CatalogEntry]:
    """Catalogue entries by name: of each checkpoint, and of each LoRA one for every base and weight it is used with."""
    entries: dict[str, CatalogEntry] = {}
    for model, pictures in galleries:
        if not pictures:
            continue
        weights = read_weights(world, model)
        entry = catalog_entry(model, weights.sha256, weights.size)
        for settings in (picture.settings for picture in pictures):
            changes: dict[str, Any] = {"name": _name(model, settings), "version_id": len(entries)}
            if model.base:
                base = BY_SLUG[settings.base].catalog_name
                changes |= {"base_checkpoint": base, "lora_weight": settings.weight}
            if changes["name"] not in entries:
                entries[changes["name"]] = entry.model_copy(update=changes)
    return entries


def _name(model: PocketModel, settings: Settings) -> str:
    return f"{model.catalog_name} ({settings.base}, {settings.weight})" if model.base else model.catalog_name


def _row(catalog: Catalog, model: PocketModel, picture: Picture) -> dict[str, Any]:
    """The image as a row of a table of calls."""
    settings = picture.settings
    parameters = {
        "width": settings.size[0],
        "height": settings.size[1],
        "sampling method": settings.sampler,
        "sampling steps": settings.steps,
        "cfg scale": settings.cfg,
    }
    call = APICall.from_dict(catalog[_name(model, settings)].default_call().to_dict() | parameters)
    instruction = {"prompt": picture.prompt, "negative prompt": settings.negative_prompt}
    return {"prompt_id": str(picture.id), "instruction": instruction, "call": call.to_dict()}


def _export(rollout: Rollout, images: Sequence[tuple[PocketModel, Picture]], folder: Path) -> int:
    """Write the pictures of a finished rollout as plain PNGs, which are the same whenever they are drawn.

    Returns how many are missing, and logs why.
    """
    stored = rollout.store.get_many(rollout.keys, metadata=False)
    written: set[str] = set()
    failed: dict[str, list[str]] = {}
    for (model, picture), asked in zip(images, rollout.asked, strict=True):
        failure = asked.failure or stored[asked.jobs[0].key].failure
        if failure is not None:
            failed.setdefault(model.slug, []).append(failure.message)
            continue
        path = folder / f"{picture.id}.png"
        written.add(path.name)
        buffer = io.BytesIO()
        rollout.store.load(asked.jobs[0].key).save(buffer, "PNG")
        if not path.is_file() or path.read_bytes() != buffer.getvalue():
            write_atomically(path, buffer.getvalue())
    for path in folder.glob("*.png"):  # of other arguments
        if path.name not in written:
            path.unlink()
    for slug, messages in failed.items():
        level = logging.INFO if BY_SLUG[slug].defect else logging.WARNING
        logger.log(level, "%d pictures of %s can't be drawn: %s", len(messages), BY_SLUG[slug].name, messages[0])
    return sum(map(len, failed.values()))
