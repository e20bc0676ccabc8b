"""Human Preference Score v2, https://arxiv.org/abs/2306.09341 (DiffAgent Eq. 4), with the official checkpoints."""

from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rewards.checkpoints import find_checkpoint
from rewards.images import ImageError, describe_image, to_rgb, to_tensor
from rewards.open_clip_towers import OpenClipScorer, load_open_clip_scorer
from rewards.scorer import ScoringOptions
from rewards.two_towers import normalize_pixels

ARCHITECTURE = "ViT-H-14"
OFFICIAL = {
    "v2.0": "xswu/HPSv2/HPS_v2_compressed.pt@main",
    "v2.1": "xswu/HPSv2/HPS_v2.1_compressed.pt@main",
}


class HPSv2(OpenClipScorer):
    """How much people prefer an image for a prompt.

    Scores are cosines, about 0.2 to 0.35 for the official weights; DiffAgent's Eq. 4 divides them by the learned
    temperature (x 100), which a min-max normaliser takes back.
    """

    name = "hps_v2"

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB, then resized as floats so that the longest side fits, centred on black.

        As hpsv2 1.2.0 with torchvision >= 0.17 (antialiased; values may leave [0, 1] a little). Where that package
        fails on an image whose longest side fits already, this one pads it like any other.
        """
        return normalize_pixels(fit_on_black(to_tensor(to_rgb(image)), self.towers.image_size, describe_image(image)))


def fit_on_black(pixels: Tensor, size: int, name: str) -> Tensor:
    """Scale (3, height, width) so that the longest side is `size` and pad to a square, odd pixels right and below.

    Raises:
        ImageError: The short side would vanish.
    """
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    if min(new_height, new_width) == 0:
        raise ImageError(f"{name}: {width}x{height} is too thin; its short side vanishes at {size} pixels.")
    if (new_height, new_width) != (height, width):
        pixels = F.interpolate(pixels[None], (new_height, new_width), mode="bicubic", antialias=True)[0]
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return F.pad(pixels, (left, size - new_width - left, top, size - new_height - top))


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    version: str = "v2.1", batch_size: int | None = None, num_workers: int = 4, long_prompts: str = "truncate",
    progress: bool = False,
) -> HPSv2:  # fmt: skip
    """Load HPS v2: see `rewards.load_scorer`.

    Args:
        checkpoint: Official .pt file, a folder written by `rewards.convert` or by open_clip, or a Hub file; by default
            the official one of `version`.
        config: open_clip model configuration; by default what lies beside the weights, or else ViT-H-14.
        tokenizer: File of byte-pair merges in open_clip's format (.txt.gz); by default merges.txt.gz beside weights
            that have their configuration there, or else CLIP's own.
        device, dtype: See `rewards.load_scorer`.
        version: `v2.1` or `v2.0`, if no checkpoint is given.
        batch_size, num_workers, long_prompts, progress: See `ScoringOptions`.

    Raises:
        ValueError: Unknown version, an option out of range, or a tokenizer that is no such file.
        CheckpointError: Weights or a vocabulary that don't fit.
    """
    if version not in OFFICIAL:
        raise ValueError(f"`version` must be one of {', '.join(OFFICIAL)}, but got {version!r}.")
    options = ScoringOptions(batch_size, num_workers, long_prompts, progress)
    return load_open_clip_scorer(
        HPSv2, find_checkpoint(checkpoint or OFFICIAL[version]), config, ARCHITECTURE,
        tokenizer=tokenizer, device=device, dtype=dtype, options=options,
    )  # fmt: skip
