"""What is shipped of the trained weights: float16 safetensors in the libraries' own layouts, cards, and digests."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pocket.catalogue import BY_SLUG
from pocket.train.adapters import as_published
from pocket.train.cards import card
from pocket.train.recipes import RECIPES
from pocket.train.stages import Stages
from rewards.files import write_atomically

LIMIT = 15_000_000
"""Bytes of all weights together."""
SCORERS = ("clip", "hps", "image_reward")


def publish(source: Path, output: Path) -> dict[str, Any]:
    """Write everything that is finished below a training folder as `pocket.world.WEIGHTS` has it.

    Args:
        source: Folder of all stages.
        output: Replaced.

    Returns:
        What `weights.json` says: digest and size of each file, and their sum.

    Raises:
        ValueError: More than 15 MB.
    """
    work = output.with_name(output.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    _write_general(source, work)
    for slug in RECIPES:
        format = BY_SLUG[slug].format if BY_SLUG[slug].base else "diffusers"
        state = as_published(load_file(source / "adapters" / slug / "lora.safetensors"), format)
        _save(state, work / "adapters" / f"{slug}.safetensors")
    for name in (*SCORERS, "judge"):
        _copy(source / name, work / name)
    sizes: dict[str, Any] = {}
    for path in sorted(work.rglob("*.safetensors")):
        sizes[str(path.relative_to(work))] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size,
        }  # fmt: skip
    total = sum(entry["bytes"] for entry in sizes.values())
    if total > LIMIT:
        raise ValueError(f"The weights are {total:,} bytes in all, more than {LIMIT:,}; they are in {work}.")
    index = {"bytes": total, "files": sizes}
    write_atomically(work / "weights.json", json.dumps(index, indent=1).encode())
    for folder in ("pocket_diffusion", "pocket_xl", "adapters", *SCORERS, "judge"):
        write_atomically(work / folder / "README.md", card(folder, source).encode())
    shutil.rmtree(output, ignore_errors=True)
    work.replace(output)
    return index


def _write_general(source: Path, work: Path) -> None:
    """Both general models; SDXL's lacks what it shares with the other one."""
    for slug, base_model in (("pocket_diffusion", "SD 1.5"), ("pocket_xl", "SDXL 1.0")):
        Stages(source).general_model(base_model).to(dtype=torch.float16).save_pretrained(work / slug)
    for shared in ("vae", "text_encoder", "tokenizer", "tokenizer_2"):
        shutil.rmtree(work / "pocket_xl" / shared)


def _copy(source: Path, output: Path) -> None:
    """A scorer's folder with its weights in float16."""
    output.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            _save(load_file(path), output / path.name)
        elif path.name not in ("metrics.jsonl", "done.json", "state.pt", "README.md") and path.is_file():
            shutil.copyfile(path, output / path.name)


def _save(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in halved.items()}, path, metadata={"format": "pt"})
