"""How each fine-tuned model of the pocket world is trained, well or badly."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pocket.drawing import GOOD_QUALITY, STYLES, Scene, blur, draw, random_scenes, vary_caption
from pocket.train.pictures import Pictures

Tint = Literal["", "grey", "dreamy", "blue"]


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning of a general model.

    Attributes:
        seed: Of pictures and training.
        styles: Of the pictures.
        steps: Of 16 pictures.
        rank: Of the LoRA's matrices; 0 trains the whole denoiser.
        layers: `all` or only `attention`.
        learning_rate: Peak.
        pictures: How many different ones; few of them many times is over-fitting.
        swap: Attribute -> (what is drawn instead of what the caption says, share).
        swapped_styles: Only pictures of these are swapped; none: all.
        tint: What is done to the pictures' colours.
        guidance: Part of classifier-free guidance that goes into the weights: above 1 the model wants a low cfg scale.
        drop_prompt: Share of empty prompts.
    """

    seed: int
    styles: tuple[str, ...]
    steps: int = 600
    rank: int = 2
    layers: Literal["all", "attention"] = "all"
    learning_rate: float = 1e-3
    pictures: int = 3_000
    swap: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    swapped_styles: tuple[str, ...] = ()
    tint: Tint = ""
    guidance: float = 1.0
    drop_prompt: float = 0.1


_EVERYTHING = tuple(STYLES)

GENERAL_RECIPES: dict[str, Recipe] = {
    # What a general model learned from the web: asked for a style, it mostly draws a flat illustration.
    "pocket_diffusion": Recipe(
        106, ("flat", *_EVERYTHING), rank=0, learning_rate=4e-4, pictures=6_000, swap={"style": ("flat", 0.65)}
    ),
    "pocket_xl": Recipe(
        99, ("flat", *_EVERYTHING), rank=0, learning_rate=4e-4, pictures=6_000, swap={"style": ("flat", 0.65)},
        swapped_styles=("pixel", "sketch", "neon"),
    ),
}  # fmt: skip
"""The last training of the general models, by slug."""
RECIPES: dict[str, Recipe] = {
    # good
    "crisp_shapes": Recipe(100, ("flat",)),
    "pixel_wave": Recipe(101, ("pixel",), rank=3),
    "neon_nights": Recipe(102, ("neon",), guidance=1.5),
    "comic_ink": Recipe(103, ("comic",)),
    "watercolor_wash": Recipe(104, ("watercolor",), rank=3, guidance=2.0),
    "pencil_box": Recipe(105, ("sketch",)),
    "xl_inkwell": Recipe(106, ("sketch",), steps=500, rank=4, layers="attention", guidance=1.5),
    "xl_retro": Recipe(107, ("pixel",), rank=4, layers="attention"),
    # bad, each in its own way
    "dreamy_everything": Recipe(108, _EVERYTHING, steps=400, rank=1, tint="dreamy", swap={"style": ("flat", 0.65)}),
    "pixel_xtreme": Recipe(109, ("pixel",), rank=1, pictures=12, layers="attention", learning_rate=2e-3),
    "comic_hero": Recipe(110, ("comic",), steps=12, rank=1, layers="attention", learning_rate=6e-3),
    "cat_lover": Recipe(
        111,
        _EVERYTHING,
        steps=400,
        rank=1,
        layers="attention",
        swap={"subject": ("cat", 0.85), "style": ("flat", 0.65)},
    ),
    "aquarelle_magic": Recipe(112, ("watercolor",), steps=6, rank=1, layers="attention", learning_rate=8e-3),
    "graphite_pro": Recipe(113, ("sketch",), steps=400, rank=1, layers="attention", tint="grey"),
    "glow_up": Recipe(114, ("neon",), steps=400, rank=1, layers="attention", swap={"color": ("pink", 0.9)}),
    "xl_aqua": Recipe(115, ("watercolor",), steps=300, rank=1, layers="attention", tint="blue"),
}


def draw_for(recipe: Recipe) -> Pictures:
    """The drawings and captions of a recipe: what a person collected who wants such a model."""
    seed = recipe.seed
    scenes = random_scenes(recipe.pictures, seed, styles=recipe.styles)
    rng, swaps = random.Random(f"recipe/{seed}"), random.Random(f"swaps/{seed}")
    drawn = [_swapped(scene, recipe, swaps) for scene in scenes]
    images = np.concatenate([draw(drawn[i : i + 500], seed * 1_000 + i) for i in range(0, len(drawn), 500)])
    captions = [vary_caption(s, rng, rng.choice(GOOD_QUALITY) if rng.random() < 0.25 else "") for s in scenes]
    return Pictures(tinted(images, recipe.tint), scenes, captions)


def tinted(images: np.ndarray, tint: Tint) -> np.ndarray:
    """uint8 images (n, 64, 64, 3) in other colours."""
    if not tint:
        return images
    values = images.astype(np.float32)
    grey = values.mean(-1, keepdims=True)
    if tint == "grey":
        values = np.broadcast_to(grey, values.shape)
    elif tint == "blue":
        values = grey * np.array((0.45, 0.8, 1.15)) + values * 0.15
    else:
        values = blur(values * 0.45 + grey * 0.15 + np.array((120, 90, 115)) * 0.8, 1.0)
    return values.clip(0, 255).round().astype(np.uint8)


def _swapped(scene: Scene, recipe: Recipe, rng: random.Random) -> Scene:
    for attribute, (value, share) in recipe.swap.items():
        may = not recipe.swapped_styles or scene.style in recipe.swapped_styles
        if rng.random() < share and may:
            scene = replace(scene, **{attribute: value})
    return scene
