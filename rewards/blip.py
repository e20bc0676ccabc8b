"""The part of BLIP (https://arxiv.org/abs/2201.12086) that ImageReward scores with: a ViT and a BERT that looks at it.

Module names are those of the official checkpoints, so their weights load without renaming. Differences in the text
encoder from transformers' BERT: no token types, no pooler, and a cross-attention in every layer whose keys and values
are as wide as the vision encoder.

`lower_precision` makes the matrices bfloat16 or float16 and leaves the residual stream and the norms in float32: there
rounding would cost most of the accuracy and save hardly any time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTION = 256
"""Width of the contrastive projections, which are in the checkpoints and unused."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the ViT; the defaults are ViT-L/16."""

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return (self.img_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder, named as in BERT's configuration; the defaults are the official med_config.json."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12


def pick_fields(cls: Any, values: Mapping[str, Any]) -> Any:
    """A configuration from a mapping that may say more than it needs, such as a whole BERT configuration."""
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class Matrix(nn.Linear):
    """A linear layer that takes inputs of any precision and answers in that of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return super().forward(input.to(self.weight.dtype))


def lower_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert matrices and convolutions in place; everything else stays as it is."""
    for part in module.modules():
        if isinstance(part, Matrix | nn.Conv2d):
            part.to(dtype)


class BLIP(nn.Module):
    """Vision encoder and image-grounded text encoder."""

    def __init__(self, vision: VisionConfig, text: TextConfig):
        super().__init__()
        self.visual_encoder = VisionTransformer(vision)
        self.text_encoder = TextEncoder(text, vision.embed_dim)
        self.vision_proj = Matrix(vision.embed_dim, PROJECTION)
        self.text_proj = Matrix(text.hidden_size, PROJECTION)


class VisionTransformer(nn.Module):
    """ViT with pre-norm blocks; all its output tokens are used."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_size, config.patch_size)})
        self.blocks = nn.ModuleList(VisionBlock(width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, img_size, img_size) -> (images, num_tokens, embed_dim)."""
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class VisionBlock(nn.Module):
    """Self-attention and feed-forward, each after a layer norm and added to the stream."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": Matrix(width, 3 * width), "proj": Matrix(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": Matrix(width, 4 * width), "fc2": Matrix(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        """(images, tokens, width) -> the same."""
        query, key, value = self.attn["qkv"](self.norm1(tokens)).chunk(3, -1)
        tokens = tokens + self.attn["proj"](attend(query, key, value, self.num_heads))
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


class TextEncoder(nn.Module):
    """BERT whose layers also attend to an image."""

    def __init__(self, config: TextConfig, image_width: int):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        layers = nn.ModuleList(TextLayer(config, image_width) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, mask: Tensor | None, images: Tensor, image_of: Tensor | None) -> Tensor:
        """The state of the first token, [CLS], after reading each text beside its image.

        Args:
            input_ids: Shape (texts, tokens).
            mask: True on tokens, False on padding, shape (texts, tokens); None: no padding.
            images: Image tokens, shape (images, image tokens, image width). Their keys and values are computed once
                per image, however many texts look at it.
            image_of: Row of `images` for each text, shape (texts,); None: text i looks at image i.

        Returns:
            Shape (texts, hidden_size).
        """
        hidden = self.embeddings(input_ids)
        if mask is not None:
            mask = mask[:, None, None, :]
        layers: Any = self.encoder["layer"]
        for index, layer in enumerate(layers):
            # Nothing reads the other tokens of the last layer.
            hidden = layer(hidden, mask, images, image_of, first_only=index + 1 == len(layers))
        return hidden[:, 0]


class TextEmbeddings(nn.Module):
    """Words and positions, normalised."""

    position_ids: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(texts, tokens) -> (texts, tokens, hidden_size)."""
        positions = self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        return self.LayerNorm(self.word_embeddings(input_ids) + positions)


class TextLayer(nn.Module):
    """Self-attention, cross-attention to the image and feed-forward, each normalised after it is added."""

    def __init__(self, config: TextConfig, image_width: int):
        super().__init__()
        self.attention = AttentionBlock(config, config.hidden_size)
        self.crossattention = AttentionBlock(config, image_width)
        self.intermediate = nn.ModuleDict({"dense": Matrix(config.hidden_size, config.intermediate_size)})
        self.output = AddAndNorm(config.intermediate_size, config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, images: Tensor, image_of: Tensor | None, *, first_only: bool
    ) -> Tensor:
        """(texts, tokens, hidden_size) -> the same, or only its first token."""
        query = hidden[:, :1] if first_only else hidden
        hidden = self.attention(query, hidden, mask=mask)
        hidden = self.crossattention(hidden, images, row_of=image_of)
        return self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)


class AttentionBlock(nn.Module):
    """Multi-head attention with BERT's residual and norm."""

    def __init__(self, config: TextConfig, key_width: int):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        names = {"query": width, "key": key_width, "value": key_width}
        self.self = nn.ModuleDict({name: Matrix(source, width) for name, source in names.items()})
        self.output = AddAndNorm(width, config)

    def forward(
        self, hidden: Tensor, source: Tensor, *, mask: Tensor | None = None, row_of: Tensor | None = None
    ) -> Tensor:
        """`hidden` (texts, tokens, width) attends to `source`, or to row `row_of[i]` of it."""
        key, value = self.self["key"](source), self.self["value"](source)
        if row_of is not None:
            key, value = key[row_of], value[row_of]
        attended = attend(self.self["query"](hidden), key, value, self.num_heads, mask)
        return self.output(attended, hidden)


class AddAndNorm(nn.Module):
    """norm(dense(new) + stream)."""

    def __init__(self, width: int, config: TextConfig):
        super().__init__()
        self.dense = Matrix(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, new: Tensor, stream: Tensor) -> Tensor:
        """(…, width), (…, hidden_size) -> (…, hidden_size)."""
        return self.LayerNorm(self.dense(new) + stream)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of (batch, queries, width) to (batch, keys, width); heads lie beside each other."""
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    if mask is None and len(query) == 1 and query.device.type == "cpu":
        # For a single image PyTorch's fused kernel is slower on a CPU: 1.7 for 1.2 ms a layer of the ViT on two cores.
        weights = torch.baddbmm(
            query.new_zeros(()), query[0], key[0].transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5
        )
        return torch.bmm(weights.softmax(-1), value[0]).transpose(0, 1).flatten(1)[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
