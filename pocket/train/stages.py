"""What is trained, in which order, and what is shipped of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pocket.catalogue import BY_SLUG
from pocket.drawing import STYLES, random_scenes
from pocket.judge import Judge
from pocket.tokenizer import clip_tokenizer
from pocket.train import adapters, autoencoder, clip, denoiser, denoiser_xl, hps, image_reward, judge
from pocket.train.fitting import finish
from pocket.train.latents import Latents, encode_all
from pocket.train.measuring import measure
from pocket.train.pictures import HELD_OUT_SEED, TRAINING_SEED, Pictures, draw_pictures
from pocket.train.recipes import GENERAL_RECIPES, RECIPES

NUM_PICTURES, NUM_HELD_OUT, NUM_MEASURED = 48_000, 1_500, 96
DEGRADED = 0.12
_NO_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
}  # fmt: skip
BASE_STEPS, XL_STEPS = 10_000, 4_000


class Stages:
    """All stages of training below one folder.

    Args:
        folder: Where everything goes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """In an order in which they can be trained."""
        scorers, general = ["clip", "hps", "image_reward"], [f"general/{slug}" for slug in GENERAL_RECIPES]
        return ["judge", "vae", *scorers, "base", "xl", *general, *(f"adapters/{slug}" for slug in RECIPES)]

    def train(self, name: str) -> None:
        """Train one stage whose predecessors are finished."""
        folder = self.folder / name
        kind, _, slug = name.partition("/")
        if kind == "general":
            self._train_general(folder, slug)
        elif kind == "adapters":
            self._train_adapter(folder, slug)
        elif kind == "base":
            self._train_base(folder)
        elif kind == "xl":
            self._train_xl(folder)
        elif kind == "vae":
            autoencoder.train(folder, self.pictures(), self.latents(), self.held_out())
        elif kind == "hps":
            hps.train(folder, self.folder / "clip", self.pictures(), self.held_out())
        else:
            {"judge": judge, "clip": clip, "image_reward": image_reward}[kind].train(
                folder, self.pictures(), self.held_out()
            )

    def _train_base(self, folder: Path) -> None:
        pictures = self.pictures()
        denoiser.train(folder, pictures, encode_all(self.latents(), pictures), steps=BASE_STEPS)
        finish(folder, self._measure(self.general_model("SD 1.5", tuned=False)))

    def _train_xl(self, folder: Path) -> None:
        pictures = self.pictures()
        latents = encode_all(self.latents(), pictures)
        denoiser_xl.train(folder, self.folder / "base", pictures, latents, steps=XL_STEPS)
        finish(folder, self._measure(self.general_model("SDXL 1.0", tuned=False)))

    def _train_general(self, folder: Path, slug: str) -> None:
        pipeline = self.general_model(BY_SLUG[slug].base_model, tuned=False)
        adapters.train(folder, pipeline, self.latents(), GENERAL_RECIPES[slug])
        finish(folder, self._measure(pipeline))

    def _train_adapter(self, folder: Path, slug: str) -> None:
        """`done.json` compares the model with the general one, on prompts of its style."""
        general, recipe = self.general_model(BY_SLUG[slug].base_model), RECIPES[slug]
        cfg = 1.5 if recipe.guidance >= 2 else 3.0
        before = self._measure(general, recipe.styles)
        adapters.train(folder, general, self.latents(), recipe)
        general.load_lora_weights(folder / "lora.safetensors")
        after = self._measure(general, recipe.styles, cfg)
        finish(folder, after | {f"general model: {name}": value for name, value in before.items()})

    def _measure(self, pipeline: Any, styles: Sequence[str] = tuple(STYLES), cfg: float = 3.0) -> dict[str, float]:
        scenes = random_scenes(NUM_MEASURED, 99, held_out=True, styles=styles)
        return measure(pipeline, Judge.load(self.folder / "judge"), scenes, cfg=cfg)

    def pictures(self) -> Pictures:
        """The training set: flat illustrations twice as often as each other style, some degraded."""
        return draw_pictures(
            NUM_PICTURES, TRAINING_SEED, styles=("flat", *STYLES), degraded=DEGRADED,
            cache=self.folder / "pictures" / "train.npy",
        )  # fmt: skip

    def held_out(self) -> Pictures:
        """Drawings of combinations that nothing is trained on."""
        return draw_pictures(
            NUM_HELD_OUT, HELD_OUT_SEED, held_out=True, cache=self.folder / "pictures" / "held_out.npy"
        )

    def latents(self) -> Latents:
        """Fitted to the first pictures, once."""
        path = self.folder / "vae" / "latents.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Latents.fit(self.pictures().images[:3_000]).save(path)
        return Latents.load(path)

    def general_model(self, base_model: str, *, tuned: bool = True) -> Any:
        """The general model of an architecture as a diffusers pipeline.

        Args:
            base_model: SD 1.5 or SDXL 1.0.
            tuned: As it is published, after `GENERAL_RECIPES`; otherwise as it was before.
        """
        base, xl = self.folder / "base", self.folder / "xl"
        before = base if base_model == "SD 1.5" else xl
        unet = UNet2DConditionModel.from_pretrained((self._tuned(base_model) if tuned else before) / "unet")
        shared: dict[str, Any] = {
            "vae": AutoencoderKL.from_pretrained(self.folder / "vae"),
            "text_encoder": CLIPTextModel.from_pretrained(base / "text_encoder"),
            "tokenizer": clip_tokenizer(),
            "scheduler": denoiser.new_scheduler(),
        }
        if base_model == "SD 1.5":
            return StableDiffusionPipeline(**shared, unet=unet, **_NO_SAFETY_CHECKER)
        return StableDiffusionXLPipeline(
            **shared, unet=unet, tokenizer_2=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(xl / "text_encoder_2"), add_watermarker=False,
        )  # fmt: skip

    def _tuned(self, base_model: str) -> Path:
        (slug,) = (slug for slug in GENERAL_RECIPES if BY_SLUG[slug].base_model == base_model)
        return self.folder / "general" / slug
