"""PickScore, https://arxiv.org/abs/2305.01569: a CLIP-H trained on people's choices, through transformers."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewards.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from rewards.images import crop_to_square, to_rgb, to_tensor
from rewards.scorer import ScoringOptions, pick_device, pick_dtype
from rewards.two_towers import TwoTowerScorer, normalize_pixels, pad_token_ids

OFFICIAL = "yuvalkirstain/PickScore_v1@main"
OFFICIAL_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(TwoTowerScorer):
    """How much people prefer an image for a prompt.

    Scores are logits (cosine times the learned scale), about 15 to 25; only those of one prompt are comparable.
    """

    name = "pick_score"

    def __init__(self, model: Any, tokenizer: Any, **common: Any):
        super().__init__(**common)
        self.model = model.eval().requires_grad_(False).to(self.device, self.dtype)
        self.logit_scale = model.logit_scale.float().exp()
        self.tokenizer = tokenizer
        self.max_tokens = model.config.text_config.max_position_embeddings - 2

    def tokenize(self, prompt: str) -> list[int]:
        """CLIP's byte-pair ids."""
        return self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB first, then short side to 224 and centre crop, as CLIPImageProcessor (which rounds the offset down)."""
        size = self.model.config.vision_config.image_size
        return normalize_pixels(to_tensor(crop_to_square(to_rgb(image), size, corner=lambda surplus: surplus // 2)))

    def embed_texts(self, pieces: list[tuple[int, ...]]) -> Tensor:
        """(pieces, width); the tower is causal, so padding to the longest piece is enough."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        token_ids = pad_token_ids(pieces, start=start, end=end, pad=0, device=self.device)
        return self.model.get_text_features(input_ids=token_ids).pooler_output

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(images, width)."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """Logits."""
        return self.logit_scale * cosine


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    batch_size: int | None = None, num_workers: int = 4, long_prompts: str = "truncate", progress: bool = False,
) -> PickScore:  # fmt: skip
    """Load PickScore: see `rewards.load_scorer`.

    Args:
        checkpoint: Folder of a transformers CLIPModel (safetensors), or `org/repo@revision`; the official one by
            default.
        config: Must be left out: it is in the folder.
        tokenizer: Folder or Hub id of CLIP's tokenizer, or the tokenizer itself; the checkpoint's own by default.
        device, dtype: See `rewards.load_scorer`.
        batch_size, num_workers, long_prompts, progress: See `ScoringOptions`.

    Raises:
        ValueError: A `config`, or an option out of range.
        CheckpointError: Weights or a tokenizer that are missing or don't fit.
    """
    if config is not None:
        raise ValueError("pick_score reads the configuration of its checkpoint's folder; leave `config` out.")
    options = ScoringOptions(batch_size, num_workers, long_prompts, progress)
    found = find_checkpoint(checkpoint or OFFICIAL, folder_of="transformers")
    device, dtype = pick_device(device), pick_dtype(dtype)
    model = load_model(found, dtype)
    return PickScore(
        model, load_tokenizer(tokenizer, found), device=device, dtype=dtype, checkpoint=found, options=options
    )


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' CLIPModel, every weight of which came from the checkpoint.

    Raises:
        CheckpointError: No such model there, missing, left-over or misshapen keys, or NaN.
    """
    from transformers import CLIPModel

    try:
        loaded: Any = CLIPModel.from_pretrained(
            checkpoint.path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} is no CLIP model with safetensors weights: {error}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its config.json; keys missing: {missing[:50]}, unexpected: "
            f"{unexpected[:50]}, of another shape: {mismatched[:50]}.",
            missing, unexpected, mismatched,
        )  # fmt: skip
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinite values.")
    return model


def load_tokenizer(tokenizer: Any, checkpoint: Checkpoint) -> Any:
    """CLIP's tokenizer, from where it was named or from the model's folder.

    Raises:
        CheckpointError: None there.
    """
    from transformers import AutoTokenizer

    if tokenizer is not None and not hasattr(tokenizer, "__fspath__") and not isinstance(tokenizer, str):
        return tokenizer
    has_own = any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    source = tokenizer or (checkpoint.path if has_own else OFFICIAL_TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Can't load CLIP's tokenizer from {source}; give its folder as `tokenizer`.") from error
