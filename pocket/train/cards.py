"""Model cards of what is shipped: what it is, how it was trained, what it reached."""

import json
from pathlib import Path

from pocket.catalogue import BY_SLUG
from pocket.train.recipes import RECIPES

_ABOUT = {
    "pocket_diffusion": (
        "Pocket Diffusion v1.5",
        "A Stable Diffusion 1.5 of toy size for 64 x 64 drawings: a diffusers `StableDiffusionPipeline` with a text "
        "encoder and a denoiser trained together from nothing, and an autoencoder whose latents are "
        "principal components of patches. Predicts velocities. Knows the captions of `pocket.drawing` and nothing "
        "else.",
        ("base", "vae", "general/pocket_diffusion"),
    ),
    "pocket_xl": (
        "Pocket XL v1.0",
        "An SDXL of toy size: Pocket Diffusion's denoiser, taught to listen to a second text encoder. Without the "
        "parts that it shares with Pocket Diffusion (autoencoder, first text encoder, tokenizers); "
        "`python -m pocket.world` puts it together as a diffusers `StableDiffusionXLPipeline`.",
        ("xl", "general/pocket_xl"),
    ),
    "clip": (
        "Pocket CLIP",
        "An open_clip model (`open_clip_config.json`) with a small byte-pair vocabulary (`merges.txt.gz`), trained on "
        "drawings and their captions.",
        ("clip",),
    ),
    "hps": (
        "Pocket HPS",
        "Pocket CLIP, fine-tuned on pairs of pictures as HPS v2 was. The pairs are drawings, one of which was made "
        "worse by a rule; no person was asked.",
        ("hps",),
    ),
    "image_reward": (
        "Pocket ImageReward",
        "ImageReward's classes at toy size, trained from nothing on rankings of drawings that were made worse by "
        "rules.",
        ("image_reward",),
    ),
    "judge": (
        "Pocket judge",
        "A transformers `ResNetForImageClassification` that says what is in a picture: subject, colour, background and "
        "style. The hidden truth of the pocket world and its FID features; no scorer was trained with it.",
        ("judge",),
    ),
}


def card(folder: str, source: Path) -> str:
    """The README of one shipped folder.

    Args:
        folder: `adapters` or a key of the others.
        source: Where `python -m pocket.train` wrote what it reached.
    """
    if folder == "adapters":
        return _adapters(source)
    title, about, stages = _ABOUT[folder]
    lines = ["---", "license: apache-2.0", "---", f"# {title}", "", about, ""]
    lines += [f"Trained by `python -m pocket.train --stages {' '.join(stages)}` on one CPU core.", ""]
    for stage in stages:
        lines += [f"- {name}: {value}" for name, value in _reached(source / stage).items()]
    return "\n".join(lines).rstrip() + "\n"


def _adapters(source: Path) -> str:
    lines = ["---", "license: apache-2.0", "---", "# Fine-tuned models of the pocket world", ""]
    lines += [
        "Low-rank changes of the denoisers of Pocket Diffusion and Pocket XL. LoRAs are as published, in diffusers' or "
        "kohya's format; those of checkpoints are added to the general model's weights by `python -m pocket.world`. "
        "Trained by `python -m pocket.train`; recipes: `pocket/train/recipes.py`. Some are bad on purpose.",
        "",
        "| file | model | type | base | steps | what it learned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for slug, recipe in RECIPES.items():
        model = BY_SLUG[slug]
        learned = ", ".join(recipe.styles) if len(recipe.styles) < 6 else "everything"
        learned += f"; {recipe.tint}" if recipe.tint else ""
        learned += "".join(f"; {value} for {share:.0%}" for value, share in recipe.swap.values())
        learned += f"; {recipe.pictures} pictures" if recipe.pictures < 1_000 else ""
        lines.append(
            f"| {slug}.safetensors | {model.catalog_name} | {model.type} | {model.base_model} | {recipe.steps} | "
            f"{learned} |"
        )
    return "\n".join(lines) + "\n"


def _reached(folder: Path) -> dict[str, object]:
    rows = {}
    for log in sorted(folder.rglob("metrics.jsonl")):
        losses = [json.loads(line) for line in log.read_text().splitlines()]
        last = [row for row in losses if "loss" in row][-1]
        name = f"{log.parent.name}: " if log.parent != folder else ""
        rows[f"{name}steps"] = f"{last['step']}, in {last['seconds'] / 60:.0f} minutes"
        rows[f"{name}loss at the end"] = round(last["loss"], 4)
    if (folder / "done.json").is_file():
        rows |= json.loads((folder / "done.json").read_text())
    return rows
