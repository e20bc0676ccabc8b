"""Scorers that compare an image's embedding with a prompt's: CLIP and its descendants."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.batching import BatchSize, in_batches
from rewards.scorer import Scorer

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel means and deviations of CLIP's training images (openai/CLIP, clip.py)."""


class TextFeatures(NamedTuple):
    """Unit vectors of pieces of prompts."""

    features: Tensor  # (pieces, width), float32
    row: dict[tuple[int, ...], int]


class TwoTowerScorer(Scorer):
    """Scores are a function of the cosine between the embeddings of prompt and image."""

    def encode_texts(self, pieces: list[tuple[int, ...]]) -> TextFeatures:
        """Embed the distinct pieces of prompts; those of similar length go together, so that little is padding."""
        ordered = sorted(pieces, key=len)
        batches = in_batches(ordered, BatchSize(4 * self.batch_size), lambda batch: list(self._embed(batch)))
        features = torch.stack(list(batches))
        return TextFeatures(features, {piece: row for row, piece in enumerate(ordered)})

    def _embed(self, pieces: list[tuple[int, ...]]) -> Tensor:
        return unit(self.embed_texts(pieces))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors, shape (images, width), float32."""
        return unit(self.embed_images(pixels))

    def score_pairs(self, images: Tensor, texts: TextFeatures, pairs: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        """`from_cosine` of each pair."""
        image_rows = torch.tensor([index for index, _ in pairs], device=self.device)
        text_rows = torch.tensor([texts.row[piece] for _, piece in pairs], device=self.device)
        # A product of vectors, not of matrices: its rounding does not depend on what else is in the batch.
        return self.from_cosine((images[image_rows] * texts.features[text_rows]).sum(-1))

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """The score, elementwise."""
        return cosine

    @abstractmethod
    def embed_texts(self, pieces: list[tuple[int, ...]]) -> Tensor:
        """Embeddings (pieces, width) of token ids without special tokens."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeddings (images, width)."""


def unit(features: Tensor) -> Tensor:
    """Vectors scaled to length 1 in float32, as the official scorers do."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def normalize_pixels(
    pixels: Tensor, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
) -> Tensor:
    """Subtract the channel means of (3, height, width) and divide by the deviations."""
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pad_token_ids(pieces: list[tuple[int, ...]], *, start: int, end: int, pad: int, device: torch.device) -> Tensor:
    """Token ids with start and end tokens, padded on the right to the longest: (pieces, tokens), int64."""
    length = max(map(len, pieces)) + 2
    rows = [[start, *piece, end] + [pad] * (length - len(piece) - 2) for piece in pieces]
    return torch.tensor(rows, device=device)
