"""LAION's aesthetic predictor: a linear head on CLIP ViT-L/14 image embeddings (LAION-AI/aesthetic-predictor and
christophschuhmann/improved-aesthetic-predictor on GitHub)."""

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from rewards.checkpoints import CheckpointError, find_checkpoint, load_state_dict, load_strictly
from rewards.image_reward import ScoringHead
from rewards.images import crop_to_square, to_rgb, to_tensor
from rewards.open_clip_towers import OpenClipTowers, load_towers
from rewards.scorer import Scorer, ScoringOptions, pick_device, pick_dtype
from rewards.two_towers import normalize_pixels, unit

ARCHITECTURE = "ViT-L-14-quickgelu"
OFFICIAL_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth@main"
OFFICIAL_CLIP = "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors@main"


class Aesthetic(Scorer):
    """How beautiful people find an image, about 1 to 10; the prompt is not read."""

    name = "aesthetic"
    reads_prompts: ClassVar[bool] = False
    max_tokens = 0

    def __init__(self, towers: OpenClipTowers, head: nn.Module, **common: Any):
        super().__init__(**common)
        self.towers = towers
        self.head = head.eval().requires_grad_(False).to(self.device)

    def preprocess(self, image: Image.Image) -> Tensor:
        """CLIP's own: short side to the model's size, centre crop, RGB, normalised."""
        return normalize_pixels(to_tensor(to_rgb(crop_to_square(image, self.towers.image_size))))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scores (images,) of the unit embeddings."""
        return self.head(unit(self.towers.embed_images(pixels))).flatten()

    def score_pairs(self, images: Tensor, texts: Any, pairs: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        """The image's score for each pair."""
        return images[torch.tensor([index for index, _ in pairs], device=images.device)]


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    clip_checkpoint: Any = None, batch_size: int | None = None, num_workers: int = 4, progress: bool = False,
) -> Aesthetic:  # fmt: skip
    """Load the aesthetic predictor: see `rewards.load_scorer`.

    Args:
        checkpoint: The head: `sac+logos+ava1-l14-linearMSE.pth` or the older single linear layer
            (`sa_0_4_vit_l_14_linear.pth`).
        config: open_clip architecture of the CLIP model; ViT-L-14-quickgelu by default.
        tokenizer: Must be left out: no prompt is read.
        device, dtype: See `rewards.load_scorer`; the head is always float32.
        clip_checkpoint: CLIP's weights with open_clip's keys; OpenAI's ViT-L/14 by default.
        batch_size, num_workers, progress: See `ScoringOptions`.

    Raises:
        ValueError: An option out of range.
        CheckpointError: Weights that don't fit.
    """
    if tokenizer is not None:
        raise ValueError("aesthetic reads no prompt; leave `tokenizer` out.")
    options = ScoringOptions(batch_size, num_workers, progress=progress)
    found = find_checkpoint(checkpoint or OFFICIAL_HEAD)
    device, dtype = pick_device(device), pick_dtype(dtype)
    clip = find_checkpoint(clip_checkpoint or OFFICIAL_CLIP)
    towers = load_towers(clip, config if config is not None else ARCHITECTURE, device=device, dtype=dtype)
    state = load_state_dict(found.path)
    width = towers.model.visual.output_dim
    head = nn.Linear(width, 1) if set(state) == {"weight", "bias"} else ScoringHead(width)
    try:
        load_strictly(head, state, found.path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} The head must fit CLIP's embeddings, {width} wide.") from error
    return Aesthetic(towers, head.float(), device=device, dtype=dtype, checkpoint=found, options=options)
