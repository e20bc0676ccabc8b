"""CLIP score, https://arxiv.org/abs/2104.08718 (DiffAgent Eq. 2), with any open_clip model."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from rewards.checkpoints import find_checkpoint
from rewards.images import crop_to_square, to_rgb, to_tensor
from rewards.open_clip_towers import OpenClipScorer, OpenClipTowers, load_open_clip_scorer
from rewards.scorer import ScoringOptions
from rewards.two_towers import OPENAI_MEAN, OPENAI_STD, normalize_pixels

ARCHITECTURE = "ViT-B-32-quickgelu"
OFFICIAL = "timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors@main"


class CLIPScore(OpenClipScorer):
    """How well an image fits a prompt: w * max(cosine, 0), in [0, w].

    The paper of the CLIP score puts "A photo depicts " before each caption; DiffAgent does not say so, and prompts for
    pictures aren't captions. `prefix` brings it back.
    """

    name = "clip_score"

    def __init__(
        self, towers: OpenClipTowers, *, weight: float = 2.5, prefix: str = "",
        mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD, **common: Any,
    ):  # fmt: skip
        super().__init__(towers, **common)
        self.weight, self.prefix, self.mean, self.std = weight, prefix, mean, std

    @classmethod
    def read_preprocessing(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Mean and standard deviation of the channels, if the configuration says them."""
        return {name: tuple(settings[name]) for name in ("mean", "std") if settings.get(name)}

    def tokenize(self, prompt: str) -> list[int]:
        """Byte-pair ids of the prefix and the prompt."""
        return super().tokenize(self.prefix + prompt)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Short side to the model's size, centre crop, RGB, normalised: CLIP's own."""
        pixels = to_tensor(to_rgb(crop_to_square(image, self.towers.image_size)))
        return normalize_pixels(pixels, self.mean, self.std)

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """DiffAgent Eq. 2."""
        return self.weight * cosine.clamp(min=0)


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    weight: float = 2.5, prefix: str = "", batch_size: int | None = None, num_workers: int = 4,
    long_prompts: str = "truncate", progress: bool = False,
) -> CLIPScore:  # fmt: skip
    """Load the CLIP score: see `rewards.load_scorer`.

    Args:
        checkpoint: Weights with open_clip's keys: local file, folder written by `rewards.convert` or by open_clip, or
            Hub file; OpenAI's ViT-B/32 by default.
        config: Name of an open_clip architecture, its configuration (its "preprocess_cfg" gives mean and std), or a
            JSON file of it; by default what lies beside the weights, or else ViT-B-32-quickgelu, since OpenAI's weights
            need that activation.
        tokenizer: File of byte-pair merges in open_clip's format (.txt.gz); by default merges.txt.gz beside weights
            that have their configuration there, or else CLIP's own.
        device, dtype: See `rewards.load_scorer`.
        weight: w of Eq. 2.
        prefix: Put before every prompt.
        batch_size, num_workers, long_prompts, progress: See `ScoringOptions`.

    Raises:
        ValueError: An option out of range, or a tokenizer that is no such file.
        CheckpointError: Weights or a vocabulary that don't fit.
    """
    options = ScoringOptions(batch_size, num_workers, long_prompts, progress)
    return load_open_clip_scorer(
        CLIPScore, find_checkpoint(checkpoint or OFFICIAL), config, ARCHITECTURE, tokenizer=tokenizer, device=device,
        dtype=dtype, options=options, weight=weight, prefix=prefix,
    )  # fmt: skip
