"""ImageReward, https://arxiv.org/abs/2304.05977 (DiffAgent Eq. 3), from the official checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rewards.batching import BatchSize, in_batches
from rewards.blip import BLIP, TextConfig, VisionConfig, lower_precision, pick_fields
from rewards.checkpoints import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_state_dict,
    load_strictly,
    read_config,
)
from rewards.images import crop_to_square, to_rgb, to_tensor
from rewards.scorer import Scorer, ScoringOptions, pick_device, pick_dtype
from rewards.two_towers import normalize_pixels, pad_token_ids

OFFICIAL = "zai-org/ImageReward/ImageReward.pt@main"
OFFICIAL_TOKENIZER = "google-bert/bert-base-uncased"
MAX_LENGTH = 35
"""Tokens the official code reads, [CLS] and [SEP] included."""

# Mean and deviation of the raw output on the authors' test set; attributes, not weights, of the official model.
MEAN, STD = 0.16717362830052426, 1.0333394966054072


class ImageRewardModel(nn.Module):
    """BLIP and the scoring head; state dict as in the official ImageReward.pt."""

    def __init__(self, vision: VisionConfig, text: TextConfig, mlp_input_size: int):
        super().__init__()
        self.blip = BLIP(vision, text)
        self.mlp = ScoringHead(mlp_input_size)


class ScoringHead(nn.Module):
    """Linear layers without activations; the dropouts between them, inactive, shift the names of the weights.

    LAION's aesthetic predictor has the same layers, dropouts and names.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """(batch, width) -> (batch,)."""
        return self.layers(features)[:, 0]


class ImageReward(Scorer):
    """How much people prefer an image for a prompt.

    Scores are unbounded, mean 0 and deviation 1 on the authors' test set (most lie in [-2, 2]).
    """

    name = "image_reward"
    max_tokens = MAX_LENGTH - 2

    def __init__(self, model: ImageRewardModel, tokenizer: Any, *, size: int, **common: Any):
        super().__init__(**common)
        self.model = model.eval().requires_grad_(False).to(self.device)
        lower_precision(self.model.blip, self.dtype)  # the head stays float32, as in the official code
        self.tokenizer = tokenizer
        self.size = size
        self._pair_batch = BatchSize(4 * self.batch_size)

    def tokenize(self, prompt: str) -> list[int]:
        """WordPiece ids."""
        return self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Short side to 224 and centre crop in the image's own mode, and only then RGB, as the official code."""
        return normalize_pixels(to_tensor(to_rgb(crop_to_square(image, self.size))))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """All tokens of the vision encoder: (images, tokens, width)."""
        return self.model.blip.visual_encoder(pixels)

    def score_pairs(self, images: Tensor, texts: Any, pairs: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        """Scores (pairs,); the pairs of an image stand together."""
        batches = in_batches(pairs, self._pair_batch, lambda batch: list(self._score_batch_of_pairs(images, batch)))
        return torch.stack(list(batches))

    def _score_batch_of_pairs(self, images: Tensor, pairs: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        tokenizer = self.tokenizer
        # Padding behind a text is masked, so the official 35 tokens are computed only where a text has them.
        input_ids = pad_token_ids(
            [piece for _, piece in pairs], start=tokenizer.cls_token_id, end=tokenizer.sep_token_id,
            pad=tokenizer.pad_token_id, device=self.device,
        )  # fmt: skip
        lengths = torch.tensor([len(piece) + 2 for _, piece in pairs], device=self.device)
        mask = torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]
        used, image_of = torch.tensor([index for index, _ in pairs]).unique(return_inverse=True)
        same = len(used) == len(pairs)
        features = self.model.blip.text_encoder(
            input_ids,
            None if len(set(lengths.tolist())) == 1 else mask,
            images if len(used) == len(images) else images[used.to(self.device)],
            None if same else image_of.to(self.device),
        )
        return (self.model.mlp(features.float()) - MEAN) / STD


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    batch_size: int | None = None, num_workers: int = 4, long_prompts: str = "truncate", progress: bool = False,
) -> ImageReward:  # fmt: skip
    """Load ImageReward: see `rewards.load_scorer`.

    Args:
        checkpoint: The official ImageReward.pt, a converted folder, or a Hub file; the official one by default.
        config: {"vision": {…}, "med": {…}, "mlp_input_size": n}, or a JSON file of it; the official sizes by default.
        tokenizer: Folder with bert-base-uncased's vocabulary, its Hub id, or the tokenizer itself.
        device, dtype: See `rewards.load_scorer`.
        batch_size, num_workers, long_prompts, progress: See `ScoringOptions`.

    Raises:
        ValueError: An option out of range.
        CheckpointError: Weights or a tokenizer that are missing or don't fit.
    """
    options = ScoringOptions(batch_size, num_workers, long_prompts, progress)
    found = find_checkpoint(checkpoint or OFFICIAL)
    device, dtype = pick_device(device), pick_dtype(dtype)
    config = config if config is not None else found.settings.get("config")
    model, size = build_model(config, load_state_dict(found.path), found.path)
    return ImageReward(
        model,
        load_tokenizer(tokenizer, found),
        size=size,
        device=device,
        dtype=dtype,
        checkpoint=found,
        options=options,
    )


def build_model(
    config: Mapping[str, Any] | str | Path | None, state: Mapping[str, Tensor], where: str | Path
) -> tuple[ImageRewardModel, int]:
    """The model with given weights on the CPU, and the side of the images it takes.

    Raises:
        CheckpointError: Unknown sizes, or keys that don't fit them.
    """
    from accelerate import init_empty_weights

    sizes = read_config(config, {})
    if unknown := set(sizes) - {"vision", "med", "mlp_input_size"}:
        raise CheckpointError(f"`config` has unknown keys {sorted(unknown)}; it has vision, med and mlp_input_size.")
    vision, text = pick_fields(VisionConfig, sizes.get("vision", {})), pick_fields(TextConfig, sizes.get("med", {}))
    width = sizes.get("mlp_input_size", text.hidden_size)
    if width != text.hidden_size:
        raise CheckpointError(f"`mlp_input_size` is {width}, but the text encoder is {text.hidden_size} wide.")
    with init_empty_weights(include_buffers=False):
        model = ImageRewardModel(vision, text, width)
    load_strictly(model, state, where)
    return model, vision.img_size


def load_tokenizer(tokenizer: Any, checkpoint: Checkpoint) -> Any:
    """BERT's tokenizer, from where it was named or from beside the weights.

    Raises:
        CheckpointError: No vocabulary there.
    """
    from transformers import BertTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    beside = checkpoint.path.parent
    if tokenizer is not None and Path(tokenizer).name == "vocab.txt":
        tokenizer = Path(tokenizer).parent
    source = tokenizer or (beside if (beside / "vocab.txt").is_file() else OFFICIAL_TOKENIZER)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise CheckpointError(f"{source} has neither vocab.txt nor tokenizer.json.")
    try:
        return BertTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Can't load the tokenizer {source}; give a folder with bert-base-uncased's vocab.txt as `tokenizer`."
        ) from error


def official_config() -> dict[str, Any]:
    """The sizes of the official model, as `config`."""
    return {"vision": vars(VisionConfig()), "med": vars(TextConfig()), "mlp_input_size": TextConfig().hidden_size}
