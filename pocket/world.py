"""The pocket world as a folder of models: what `rollouts` draws with and `rewards` scores with.

    python -m pocket.world --output runs/world

What is shipped (`pocket/weights`) is small: two general models, low-rank changes for all others, and the scorers. Here
it becomes what Civitai has: whole checkpoints in diffusers' layout, LoRA files, and `catalog.jsonl`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.catalogue import LOST_FILE, MODELS, PocketModel, catalog_entry
from rewards.commandline import run_command
from rewards.files import write_atomically
from rollouts.catalog import Catalog
from rollouts.weights import WeightFolder, weights_parts, weights_sha256

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
"""What is shipped; each folder has a card, and weights.json the digests."""
GENERAL = {"SD 1.5": "pocket_diffusion", "SDXL 1.0": "pocket_xl"}
"""Slugs of the models that all others are made from."""
NATIVE_SIDE = 64
"""Pixels at which these models draw: `RenderSettings.native_side`."""
SCORERS: dict[str, dict[str, Any]] = {
    "clip_score": {"name": "clip_score", "checkpoint": str(WEIGHTS / "clip")},
    "hps_v2": {"name": "hps_v2", "checkpoint": str(WEIGHTS / "hps")},
    "image_reward": {"name": "image_reward", "checkpoint": str(WEIGHTS / "image_reward")},
}
"""The three scorers of the unified metric, as `rollouts.run` and `rewards.score` take them."""
_STAMP = "weights.sha256"


class WorldError(ValueError):
    """A world that can't be built; the message names the folder and the way out."""


@dataclass
class WorldConfig:
    """Options of `python -m pocket.world`."""

    output: str = field(metadata={"help": "Folder for the models and catalog.jsonl."})
    weights: str = field(
        default=str(WEIGHTS), metadata={"help": "What was shipped, or `python -m pocket.train` wrote."}
    )


def build(folder: str | Path, *, weights: str | Path = WEIGHTS) -> Catalog:
    """Write the models of the pocket world; what is there already and came from the same weights stays.

    Args:
        folder: Gets `catalog.jsonl`, `checkpoints/<slug>/` and `loras/<slug>.safetensors`.
        weights: Folder as `WEIGHTS`.

    Returns:
        The catalogue: all models but the one that is withheld. One file is missing and one does not fit, as in life.

    Raises:
        WorldError: Weights that are missing, or a folder that holds something else.
    """
    folder, weights = Path(folder), Path(weights)
    if not (weights / "adapters").is_dir():
        raise WorldError(f"{weights} has no folder `adapters`; give what `python -m pocket.train` wrote as `weights`.")
    digest = _digest_of_all(weights)
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == digest:
        return Catalog.load(folder / "catalog.jsonl")
    if folder.is_dir() and any(folder.iterdir()) and not stamp.is_file() and not (folder / "checkpoints").is_dir():
        raise WorldError(f"{folder} is not empty and no pocket world; give another folder as `output`.")
    stamp.unlink(missing_ok=True)
    entries = []
    for model in MODELS:
        if model.defect == "nsfw":
            continue
        if model.defect != "missing_file":
            _write_model(model, folder / model.uri, weights)
        entries.append(catalog_entry(model, *_sha256_and_size(model, folder / model.uri)))
    catalog = Catalog(entries)
    catalog.save(folder / "catalog.jsonl")
    write_atomically(stamp, digest.encode())
    return catalog


def merged(state: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's weights with a LoRA in diffusers' format added at full strength: W + up @ down, in W's precision.

    Raises:
        WorldError: A layer of the LoRA that the denoiser does not have.
    """
    state = dict(state)
    for key, down in change.items():
        layer, _, matrix = key.removeprefix("unet.").rpartition(".lora_")
        if matrix != "A.weight":
            continue
        name = f"{layer}.weight"
        if name not in state:
            raise WorldError(f"The change {key} has no layer {layer} to be added to.")
        up = change[key.replace("lora_A", "lora_B")]
        delta = up.flatten(1).float() @ down.flatten(1).float()
        state[name] = (state[name].float() + delta.view(state[name].shape)).to(state[name].dtype)
    return state


def _write_model(model: PocketModel, path: Path, weights: Path) -> None:
    """A checkpoint as a folder, or a LoRA as a file."""
    if model.base:
        source = "xl_inkwell" if model.defect == "wrong_base" else model.slug
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / "adapters" / f"{source}.safetensors", path)
        return
    shutil.rmtree(path, ignore_errors=True)
    general = GENERAL[model.base_model]
    shutil.copytree(weights / GENERAL["SD 1.5"], path, ignore=shutil.ignore_patterns("README.md"))
    if general != GENERAL["SD 1.5"]:  # which shares its autoencoder and first text encoder
        shutil.copytree(weights / general, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
        shutil.copytree(path / "tokenizer", path / "tokenizer_2")
    if model.slug != general:
        unet = path / "unet" / "diffusion_pytorch_model.safetensors"
        state = merged(load_file(unet), load_file(weights / "adapters" / f"{model.slug}.safetensors"))
        save_file({name: value.contiguous() for name, value in state.items()}, unet, metadata={"format": "pt"})


def _sha256_and_size(model: PocketModel, path: Path) -> tuple[str, int]:
    """What the catalogue says of a model's files."""
    if model.defect == "missing_file":
        return LOST_FILE
    return weights_sha256(path), sum(part.stat().st_size for part in weights_parts(path))


def _digest_of_all(weights: Path) -> str:
    files = sorted(path for path in weights.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
    named = [[str(path.relative_to(weights)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    cards = [[model.slug, repr(model)] for model in MODELS]
    return hashlib.sha256(json.dumps([named, cards]).encode()).hexdigest()


def main(config: WorldConfig) -> None:
    """Build the world."""
    catalog = build(config.output, weights=config.weights)
    folder = WeightFolder(config.output)
    missing = [entry.name for entry in catalog.values() if not (folder.folder / entry.files[0].uri).exists()]
    logger.info("%s: %d models, of which without a file: %s", config.output, len(catalog), ", ".join(missing))


if __name__ == "__main__":
    run_command(main, WorldConfig, errors=(WorldError, OSError))
