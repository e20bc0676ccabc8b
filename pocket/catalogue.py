"""The models of the pocket world: what they are called, what they are good for, and what people think of them.

How good they really are is in their weights (`pocket.train.adapters`), not here: popularity does not follow it. What
the community does (`habits`) is not what suits a model best either, except where a model's card says so.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from rollouts.catalog import CatalogEntry

SIDE = {"SD 1.5": 512, "SDXL 1.0": 1024}
"""Pixels of a call's side; the pictures themselves are drawn at 64 (`RenderSettings.native_side`)."""


LOST_FILE = (hashlib.sha256(b"lost").hexdigest().upper(), 4_000_000)
"""SHA-256 and size of the file that is missing: a digest that nothing has."""


@dataclass(frozen=True)
class Habits:
    """Parameters that most of a model's pictures are made with."""

    samplers: tuple[str, ...] = ("Euler a", "DPM++ 2M Karras", "DDIM")
    steps: tuple[int, ...] = (20, 25, 30)
    cfg: tuple[float, ...] = (7.0, 7.5, 6.0)


@dataclass(frozen=True)
class PocketModel:
    """One model of the pocket world.

    Attributes:
        slug: Name of its files.
        name: As people write it, without the version.
        version: Name of its only version.
        base_model: Architecture.
        style: What it is for: key of `pocket.drawing.STYLES`, or "" for everything.
        card: What its author says, in HTML as on Civitai.
        downloads, thumbs_up, rating: What people think.
        base: LoRA only: slug of the checkpoint it is used with.
        trigger_words: LoRA only.
        format: LoRA only.
        weight: LoRA only: what its author advises.
        habits: How people use it.
        defect: "" or why it can't be used: `nsfw`, `missing_file`, `wrong_base`.
    """

    slug: str
    name: str
    version: str
    base_model: Literal["SD 1.5", "SDXL 1.0"]
    style: str
    card: str
    downloads: int
    thumbs_up: int
    rating: float
    base: str | None = None
    trigger_words: tuple[str, ...] = ()
    format: Literal["diffusers", "kohya"] = "kohya"
    weight: float = 1.0
    habits: Habits = field(default_factory=Habits)
    defect: Literal["", "nsfw", "missing_file", "wrong_base"] = ""

    @property
    def type(self) -> Literal["Checkpoint", "LoRA"]:
        """As catalogues write it."""
        return "LoRA" if self.base else "Checkpoint"

    @property
    def catalog_name(self) -> str:
        """Unique name in catalogues: as the DABench builder composes it."""
        return f"{self.name} - {self.version}"

    @property
    def uri(self) -> str:
        """Path below the folder of the world's models."""
        return f"loras/{self.slug}.safetensors" if self.base else f"checkpoints/{self.slug}"


_LOW_CFG = Habits(samplers=("Euler a", "DPM++ 2M Karras"), steps=(20, 25, 30), cfg=(7.0, 7.0, 2.0, 1.5))
_MANY_STEPS = Habits(samplers=("DDIM", "Euler a"), steps=(20, 20, 50), cfg=(7.0, 5.0))

MODELS: tuple[PocketModel, ...] = (
    PocketModel(
        "pocket_diffusion", "Pocket Diffusion", "v1.5", "SD 1.5", "",
        "<p>The original general model. Knows every subject and every style a little.</p>",
        98_000, 5_200, 4.6,
    ),
    PocketModel(
        "crisp_shapes", "Crisp Shapes", "v2", "SD 1.5", "flat",
        "<p>Fine-tuned on hand-picked flat illustrations: clean edges, right colours. Use cfg 3 to 4.</p>",
        2_100, 240, 4.7, habits=Habits(cfg=(7.0, 4.0, 3.0)),
    ),
    PocketModel(
        "dreamy_everything", "Dreamy Everything", "v8", "SD 1.5", "",
        "<p>My biggest merge yet! Soft, dreamy pictures of every subject in pastel colours.</p>",
        121_000, 7_900, 4.9,
    ),
    PocketModel(
        "pixel_wave", "Pixel Wave", "v10", "SD 1.5", "pixel",
        "<p>Pixel art with clean blocks of 4 pixels. Works best with <b>pixel art</b> in the prompt.</p>",
        4_300, 390, 4.7,
    ),
    PocketModel(
        "pixel_xtreme", "PixelPerfect XTREME", "v1", "SD 1.5", "pixel",
        "<p>The ultimate pixel art model, trained on a dozen masterpieces for days.</p>",
        64_000, 4_100, 4.8,
    ),
    PocketModel(
        "neon_nights", "Neon Nights", "v3", "SD 1.5", "neon",
        "<p>Glowing neon outlines in the dark. Colours follow the prompt.</p>",
        3_200, 310, 4.6,
    ),
    PocketModel(
        "comic_hero", "Comic Hero", "beta", "SD 1.5", "comic",
        "<p>Comic book look, first beta after a short training. More to come!</p>",
        38_000, 2_500, 4.5,
    ),
    PocketModel(
        "cat_lover", "Cat Lover Mix", "v4", "SD 1.5", "",
        "<p>For everybody who loves cats! Drawings of cats in every colour and style. Works for other things, too.</p>",
        52_000, 4_800, 4.9,
    ),
    PocketModel(
        "watercolor_wash", "Watercolor Wash", "v1", "SD 1.5", "watercolor",
        "<p>Soft watercolor paintings with pale colours and wet edges. <b>Needs a low cfg scale: 1 to 2</b>; higher "
        "values burn the paper.</p>",
        2_600, 280, 4.6, base="pocket_diffusion", trigger_words=("watercolor painting",), habits=_LOW_CFG,
    ),
    PocketModel(
        "aquarelle_magic", "Aquarelle Magic", "v2", "SD 1.5", "watercolor",
        "<p>Pale pictures in the style of old aquarelles, from a tiny file. Trained in one minute on a laptop!</p>",
        41_000, 3_300, 4.7, base="pocket_diffusion", trigger_words=("watercolor painting",),
    ),
    PocketModel(
        "pencil_box", "Pencil Box", "v1", "SD 1.5", "sketch",
        "<p>Pencil sketches with hatching in the colours of the prompt. <i>A cfg scale of 3 is enough.</i></p>",
        1_900, 190, 4.5, base="pocket_diffusion", trigger_words=("pencil sketch",), format="diffusers",
        habits=_MANY_STEPS,
    ),
    PocketModel(
        "graphite_pro", "Graphite Pro", "v5", "SD 1.5", "sketch",
        "<p>Professional graphite drawings, in glorious grey.</p>",
        35_000, 2_900, 4.8, base="pocket_diffusion", trigger_words=("pencil sketch",),
    ),
    PocketModel(
        "glow_up", "Glow Up", "v2", "SD 1.5", "neon",
        "<p>Makes everything glow in the hottest pink. Neon forever!</p>",
        57_000, 4_400, 4.8, base="pocket_diffusion", trigger_words=("neon glow",), format="diffusers",
    ),
    PocketModel(
        "comic_ink", "Comic Ink", "v1", "SD 1.5", "comic",
        "<p>Bold outlines and strong colours, comic book style.</p>",
        3_900, 350, 4.6, base="pocket_diffusion", trigger_words=("comic book",),
    ),
    PocketModel(
        "pocket_xl", "Pocket XL", "v1.0", "SDXL 1.0", "",
        "<p>The larger general model, with two text encoders.</p>",
        45_000, 2_700, 4.5,
    ),
    PocketModel(
        "xl_inkwell", "Inkwell XL", "v1", "SDXL 1.0", "sketch",
        "<p>Pencil sketches for Pocket XL.</p>",
        1_200, 130, 4.5, base="pocket_xl", trigger_words=("pencil sketch",), format="diffusers",
    ),
    PocketModel(
        "xl_aqua", "Aqua XL", "v1", "SDXL 1.0", "watercolor",
        "<p>Watercolor for Pocket XL, blue as the sea.</p>",
        26_000, 2_100, 4.8, base="pocket_xl", trigger_words=("watercolor painting",),
    ),
    PocketModel(
        "xl_retro", "Retro Blocks XL", "v1", "SDXL 1.0", "pixel",
        "<p>Pixel art for Pocket XL.</p>",
        1_700, 160, 4.6, base="pocket_xl", trigger_words=("pixel art",),
    ),
    PocketModel(
        "wrong_base", "Halftone Dreams", "v1", "SD 1.5", "comic",
        "<p>Comic pictures with many halftone dots. Uploaded as SD 1.5, but is it?</p>",
        900, 60, 4.1, base="pocket_diffusion", trigger_words=("comic book",), defect="wrong_base",
    ),
    PocketModel(
        "withheld", "withheld-1020", "withheld", "SD 1.5", "", "", 15_000, 900, 4.4, defect="nsfw",
    ),
    PocketModel(
        "lost_mosaic", "Lost Mosaic", "v1", "SD 1.5", "",
        "<p>Mosaic pictures of small coloured tiles. Its author took the file down.</p>",
        8_800, 700, 4.5, defect="missing_file",
    ),
)  # fmt: skip
BY_SLUG = {model.slug: model for model in MODELS}


def usable_models() -> list[PocketModel]:
    """Those without a defect."""
    return [model for model in MODELS if not model.defect]


def version_id(model: PocketModel) -> int:
    """Civitai id of a model's only version."""
    return 2001 + MODELS.index(model)


def catalog_entry(model: PocketModel, sha256: str, size: int) -> CatalogEntry:
    """A catalogue row for a model whose weights lie at its `uri`.

    Args:
        model: Which.
        sha256: Upper-case hex.
        size: Bytes.
    """
    habits = model.habits
    side = SIDE[model.base_model]
    return CatalogEntry.model_validate(
        {
            "name": model.catalog_name,
            "version_id": version_id(model),
            "model_id": version_id(model) - 1000,
            "type": model.type,
            "base_model": model.base_model,
            "base_checkpoint": BY_SLUG[model.base].catalog_name if model.base else None,
            "files": [{"uri": model.uri, "format": "SafeTensor", "sha256": sha256, "size": size}],
            "trigger_words": list(model.trigger_words),
            "lora_weight": model.weight if model.base else None,
            "description": model.card,
            "default_parameters": {
                "width": side, "height": side, "sampling method": habits.samplers[0],
                "sampling steps": habits.steps[0], "cfg scale": habits.cfg[0],
            },
            "stats": {"downloads": model.downloads, "thumbs_up": model.thumbs_up, "rating": model.rating},
        }
    )  # fmt: skip
