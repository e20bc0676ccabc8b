"""The two towers of an open_clip model, as scorers use them."""

import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from rewards.checkpoints import Checkpoint, CheckpointError, load_state_dict, load_strictly, read_json
from rewards.scorer import ScoringOptions, pick_device, pick_dtype
from rewards.two_towers import TwoTowerScorer, pad_token_ids

if TYPE_CHECKING:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

CONFIG_FILE = "open_clip_config.json"
"""What open_clip writes beside weights."""
MERGES_FILE = "merges.txt.gz"
"""A byte-pair vocabulary other than CLIP's, in the format of open_clip's bpe_simple_vocab_16e6.txt.gz."""
MAX_WORD = 1_000
"""Characters of one word that are tokenized. CLIP's tokenizer takes time quadratic in a word's length, and 75 tokens
never reach this far."""


class OpenClipTowers:
    """An open_clip model in evaluation mode with its tokenizer.

    Attributes:
        model: The model; its text tower must be CLIP's own (causal, with a byte-pair tokenizer).
        tokenizer: open_clip's, with CLIP's merges or others.
        max_tokens: Tokens of a prompt that fit, without start and end: 75 for context length 77.
        image_size: Side of the square images it takes, in pixels.
    """

    def __init__(
        self, model: "open_clip.CLIP", *, device: torch.device, dtype: torch.dtype, merges: Path | None = None
    ):
        self.tokenizer = load_tokenizer(merges, model)
        self.model = lower_precision(model.eval().requires_grad_(False), dtype).to(device)
        self.causal_mask = cast(Tensor, self.model.attn_mask)
        self.device = device
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

    @classmethod
    def read_preprocessing(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of this class that follow from a configuration's "preprocess_cfg"; by default none."""
        return {}

    def tokenize(self, prompt: str) -> list[int]:
        """Byte-pair ids, CLIP's or those of other merges."""
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
        config: See `find_architecture`.
        default_config: Name of an open_clip architecture.
        tokenizer: See `find_architecture`.
        device, dtype: See `rewards.load_scorer`.
        options: See `ScoringOptions`.
        own: Further arguments of `cls`.

    Raises:
        ValueError: The tokenizer is no file of merges.
        CheckpointError: Weights, or a vocabulary, that don't fit.
    """
    found = find_architecture(checkpoint, config, default_config, tokenizer=tokenizer, name=cls.name)
    device, dtype = pick_device(device), pick_dtype(dtype)
    own = cls.read_preprocessing(found.preprocessing) | own
    towers = load_towers(checkpoint, found.config, device=device, dtype=dtype, merges=found.merges)
    return cls(towers, device=device, dtype=dtype, checkpoint=checkpoint, options=options, **own)


class Architecture(NamedTuple):
    """How the weights of an open_clip model are to be used.

    Attributes:
        config: See `build_model`.
        preprocessing: The configuration's "preprocess_cfg"; empty if it has none.
        merges: File of byte-pair merges; None: CLIP's own.
    """

    config: Mapping[str, Any] | str | Path
    preprocessing: Mapping[str, Any]
    merges: Path | None


def find_architecture(
    checkpoint: Checkpoint, config: Mapping[str, Any] | str | Path | None, default: str, *, tokenizer: Any, name: str
) -> Architecture:
    """What a user asked for, or else what lies beside the weights.

    Args:
        checkpoint: Where the weights are.
        config: See `build_model`; if None, that in scorer.json beside the weights, or open_clip_config.json there, or
            else `default`.
        default: Name of an open_clip architecture.
        tokenizer: File of byte-pair merges (.txt.gz); if None, merges.txt.gz beside the weights, if the configuration
            is from there too, or else CLIP's own.
        name: Of the scorer, for errors.

    Raises:
        ValueError: The tokenizer is no file of merges.
        CheckpointError: A configuration that can't be read.
    """
    beside = checkpoint.path.parent
    merges = None if tokenizer is None else _merges_path(tokenizer, name)
    if config is None:
        saved = beside / CONFIG_FILE
        config = checkpoint.settings.get("config") or (read_json(saved) if saved.is_file() else None)
        if config is not None and merges is None and (beside / MERGES_FILE).is_file():
            merges = beside / MERGES_FILE
    config = default if config is None else config
    if not isinstance(config, Mapping) and Path(config).suffix == ".json":
        config = read_json(config)
    preprocessing = config.get("preprocess_cfg", {}) if isinstance(config, Mapping) else {}
    return Architecture(config, preprocessing, merges)


def load_tokenizer(merges: Path | None, model: "open_clip.CLIP") -> "SimpleTokenizer":
    """open_clip's tokenizer for a model.

    Args:
        merges: File of byte-pair merges; None: CLIP's own.
        model: What has to fit.

    Raises:
        CheckpointError: Not such a file, or the model has another number of tokens.
    """
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    try:
        path = default_bpe() if merges is None else str(merges)
        tokenizer = SimpleTokenizer(path, context_length=model.context_length)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{merges} can't be read as gzipped byte-pair merges: {error}.") from error
    if tokenizer.vocab_size != model.vocab_size:
        source = "CLIP's own vocabulary" if merges is None else str(merges)
        raise CheckpointError(
            f"{source} has {tokenizer.vocab_size} tokens, but the model's text_cfg.vocab_size is {model.vocab_size}. "
            f"Give the merges it was trained with as `tokenizer`, or put them beside the weights as {MERGES_FILE}."
        )
    return tokenizer


def load_towers(
    checkpoint: Checkpoint, config: Mapping[str, Any] | str | Path, *, device: torch.device, dtype: torch.dtype,
    merges: Path | None = None,
) -> OpenClipTowers:  # fmt: skip
    """The towers of a checkpoint whose keys are those of open_clip's `CLIP`; see `build_model`, `load_tokenizer`."""
    model = build_model(config, load_state_dict(checkpoint.path), checkpoint.path)
    return OpenClipTowers(model, device=device, dtype=dtype, merges=merges)


def build_model(
    config: Mapping[str, Any] | str | Path, state: Mapping[str, Tensor], where: str | Path
) -> "open_clip.CLIP":
    """An open_clip model with given weights on the CPU, built without being initialised first.

    Args:
        config: Name of an open_clip architecture, its configuration, or a JSON file of it.
        state: Nothing missing and nothing left over.
        where: Named in errors.

    Raises:
        CheckpointError: Unknown architecture, another kind of tokenizer than CLIP's, or keys that don't fit.
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


def _merges_path(tokenizer: Any, name: str) -> Path:
    if not isinstance(tokenizer, str | Path) or not str(tokenizer).endswith(".txt.gz"):
        raise ValueError(
            f"`tokenizer` of {name} must be a file of byte-pair merges (.txt.gz), but got {tokenizer!r}; leave it out "
            "for CLIP's own."
        )
    if not Path(tokenizer).is_file():
        raise CheckpointError(f"`tokenizer`: there is no file {tokenizer}.")
    return Path(tokenizer)
