"""The two towers of an open_clip model, as scorers use them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rewards.checkpoints import Checkpoint, CheckpointError, load_state_dict, load_strictly, read_json
from rewards.scorer import ScoringOptions, pick_device, pick_dtype
from rewards.two_towers import TwoTowerScorer, pad_token_ids

if TYPE_CHECKING:
    import open_clip

MAX_WORD = 1_000
"""Characters of one word that are tokenized. CLIP's tokenizer takes time quadratic in a word's length, and 75 tokens
never reach this far."""


class OpenClipTowers:
    """An open_clip model in evaluation mode with its tokenizer.

    Attributes:
        model: The model; its text tower must be CLIP's own (causal, with CLIP's tokenizer).
        max_tokens: Tokens of a prompt that fit, without start and end: 75 for context length 77.
        image_size: Side of the square images it takes, in pixels.
    """

    def __init__(self, model: "open_clip.CLIP", *, device: torch.device, dtype: torch.dtype):
        from open_clip.tokenizer import SimpleTokenizer

        self.model = lower_precision(model.eval().requires_grad_(False), dtype).to(device)
        self.causal_mask = cast(Tensor, self.model.attn_mask)
        self.device = device
        self.tokenizer = SimpleTokenizer(context_length=model.context_length)
        self.max_tokens = model.context_length - 2
        side = model.visual.image_size
        self.image_size: int = side if isinstance(side, int) else side[0]

    def tokenize(self, prompt: str) -> list[int]:
        """All token ids of a prompt without start and end."""
        if len(self.tokenizer.cache) > 100_000:  # the library remembers every word it ever saw
            self.tokenizer.cache.clear()
        if any(len(word) > MAX_WORD for word in prompt.split()):
            prompt = " ".join(word[:MAX_WORD] for word in prompt.split())
        return self.tokenizer.encode(prompt)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(images, width), not normalised."""
        return self.model.encode_image(pixels)

    def embed_texts(self, pieces: list[tuple[int, ...]]) -> Tensor:
        """(pieces, width), not normalised.

        The tower is causal and reads its feature at the end token, so what stands behind it can't matter: only the
        longest piece's tokens are computed, not the 77 that CLIP pads to.
        """
        tokenizer, model = self.tokenizer, self.model
        token_ids = pad_token_ids(
            pieces, start=tokenizer.sot_token_id, end=tokenizer.eot_token_id, pad=0, device=self.device
        )
        ends = token_ids.argmax(-1)  # the end token has the highest id
        length = int(ends.max()) + 1
        hidden = model.token_embedding(token_ids[:, :length]) + model.positional_embedding[:length]
        hidden = model.transformer(hidden, attn_mask=self.causal_mask[:length, :length])
        last = model.ln_final(hidden[torch.arange(len(hidden), device=self.device), ends])
        projection = model.text_projection
        if isinstance(projection, nn.Linear):
            return projection(last.to(projection.weight.dtype))
        return last @ projection.to(last.dtype)


class _Then(nn.Module):
    """A norm whose answer is converted."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.norm, self.dtype = norm, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).to(self.dtype)


def lower_precision(model: "open_clip.CLIP", dtype: torch.dtype) -> "open_clip.CLIP":
    """Convert a model in place so that it computes in `dtype`.

    Of CLIP's two transformers only the matrices are converted; the residual stream and the norms stay in float32, where
    rounding would cost most of the accuracy and save hardly any time. Other towers are converted as a whole.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if dtype == torch.float32:
        return model
    visual: Any = model.visual
    if not isinstance(visual, VisionTransformer):
        return model.to(dtype)
    blocks: list[Any] = [*model.transformer.resblocks, *visual.transformer.resblocks]
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        return model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            module.to(dtype)
    visual.ln_pre = _Then(visual.ln_pre, torch.float32)
    for block in blocks:
        block.ln_1, block.ln_2 = _Then(block.ln_1, dtype), _Then(block.ln_2, dtype)
    return model


class OpenClipScorer(TwoTowerScorer):
    """A scorer whose towers are those of an open_clip model."""

    def __init__(self, towers: OpenClipTowers, **common: Any):
        super().__init__(**common)
        self.towers = towers
        self.max_tokens = towers.max_tokens

    def tokenize(self, prompt: str) -> list[int]:
        """CLIP's byte-pair ids."""
        return self.towers.tokenize(prompt)

    def embed_texts(self, pieces: list[tuple[int, ...]]) -> Tensor:
        """See `OpenClipTowers`."""
        return self.towers.embed_texts(pieces)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """See `OpenClipTowers`."""
        return self.towers.embed_images(pixels)


ScorerType = TypeVar("ScorerType", bound=OpenClipScorer)


def load_open_clip_scorer(
    cls: type[ScorerType], checkpoint: Checkpoint, config: Any, default_config: str, *, tokenizer: Any, device: Any,
    dtype: Any, options: ScoringOptions, **own: Any,
) -> ScorerType:  # fmt: skip
    """A scorer of class `cls` with the weights of a checkpoint.

    Args:
        cls: Called with the towers, what every `Scorer` takes, and `own`.
        checkpoint: Where the weights are.
        config: open_clip configuration; if none, the one saved beside the weights, or else `default_config`.
        default_config: Name of an open_clip architecture.
        tokenizer: Must be None; an argument of every scorer.
        device, dtype: See `rewards.load_scorer`.
        options: See `ScoringOptions`.
        own: Further arguments of `cls`.

    Raises:
        ValueError: A tokenizer was given.
        CheckpointError: Weights that don't fit.
    """
    if tokenizer is not None:
        raise ValueError(f"{cls.name} always uses CLIP's own tokenizer; leave `tokenizer` out.")
    device, dtype = pick_device(device), pick_dtype(dtype)
    if config is None:
        config = checkpoint.settings.get("config", default_config)
    towers = load_towers(checkpoint, config, device=device, dtype=dtype)
    return cls(towers, device=device, dtype=dtype, checkpoint=checkpoint, options=options, **own)


def load_towers(
    checkpoint: Checkpoint, config: Mapping[str, Any] | str | Path, *, device: torch.device, dtype: torch.dtype
) -> OpenClipTowers:
    """The towers of a checkpoint whose keys are those of open_clip's `CLIP`; see `build_model`."""
    model = build_model(config, load_state_dict(checkpoint.path), checkpoint.path)
    return OpenClipTowers(model, device=device, dtype=dtype)


def build_model(
    config: Mapping[str, Any] | str | Path, state: Mapping[str, Tensor], where: str | Path
) -> "open_clip.CLIP":
    """An open_clip model with given weights on the CPU, built without being initialised first.

    Args:
        config: Name of an open_clip architecture, its configuration, or a JSON file of it.
        state: Nothing missing and nothing left over.
        where: Named in errors.

    Raises:
        CheckpointError: Unknown architecture, another tokenizer than CLIP's, or keys that don't fit.
    """
    from accelerate import init_empty_weights

    resolved = open_clip_config(config)
    with init_empty_weights(include_buffers=False):
        model = _build(resolved)
    load_strictly(model, state, where)
    return model


def open_clip_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The configuration of an architecture by name, path of a JSON file, or as it is.

    Raises:
        CheckpointError: No such architecture or file.
    """
    import open_clip

    if isinstance(config, Mapping):
        return _model_part(config)
    if Path(config).suffix == ".json":
        return _model_part(read_json(config))
    found = open_clip.get_model_config(str(config))
    if found is None:
        raise CheckpointError(f"open_clip has no architecture {config}; see open_clip.list_models().")
    return found


def _build(config: dict[str, Any]) -> "open_clip.CLIP":
    import open_clip

    text = config.get("text_cfg", {})
    if any(text.get(key) for key in ("hf_model_name", "hf_tokenizer_name")) or config.get("custom_text"):
        raise CheckpointError("Only open_clip models with CLIP's own text tower and tokenizer are supported.")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that the model has no pretrained weights: they follow
    try:
        return open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    except TypeError as error:
        raise CheckpointError(f"`config` is no open_clip model configuration: {error}.") from error
    finally:
        logging.disable(level)


def _model_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip configurations on the Hub are wrapped in {"model_cfg": …, "preprocess_cfg": …}."""
    return dict(config.get("model_cfg", config))
