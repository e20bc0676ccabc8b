"""The latents of the pocket world: principal components of 4 x 4 pixel patches, 8 channels at 16 x 16.

An autoencoder this small, trained end to end, loses the colours. These latents are fixed beforehand, so that denoisers
need not wait for the decoder (`pocket.train.autoencoder`), and each channel's size follows what it contributes to a
picture.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pocket.train.pictures import Pictures

CHANNELS, PATCH, CELLS = 8, 4, 16
_FADING = 0.35
"""Power by which later components are smaller than the first; 1 is their natural size, 0 gives all the same."""


class Latents:
    """The projection of pictures to latents.

    Args:
        mean: (48,) of a patch.
        projection: (48, 8).
    """

    def __init__(self, mean: np.ndarray, projection: np.ndarray):
        self.mean, self.projection = mean, projection

    @classmethod
    def fit(cls, images: np.ndarray) -> "Latents":
        """Principal components of the patches of uint8 images (n, 64, 64, 3)."""
        patches = _patches(images).reshape(-1, PATCH * PATCH * 3).astype(np.float64)
        mean = patches.mean(0)
        variances, vectors = np.linalg.eigh(np.cov((patches - mean).T))
        deviations, vectors = np.sqrt(variances[::-1][:CHANNELS]), vectors[:, ::-1][:, :CHANNELS]
        # a component's sign is free; fixed so that the same pictures always give the same latents
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(CHANNELS)])
        projection = vectors / deviations * (deviations / deviations[0]) ** _FADING
        return cls(mean.astype(np.float32), projection.astype(np.float32))

    @classmethod
    def load(cls, path: str | Path) -> "Latents":
        """Read what `save` wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["projection"])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({"mean": self.mean, "projection": self.projection}, path)

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (n, 64, 64, 3) -> float32 (n, 8, 16, 16), of unit size in the first channel."""
        latents = (_patches(images) - self.mean) @ self.projection
        return torch.from_numpy(latents).reshape(-1, CELLS, CELLS, CHANNELS).permute(0, 3, 1, 2).contiguous()


def encode_all(latents: Latents, pictures: Pictures) -> Tensor:
    """Latents of all pictures, in float16."""
    chunks = [latents.encode(pictures.images[i : i + 1000]).half() for i in range(0, len(pictures), 1000)]
    return torch.cat(chunks)


def _patches(images: np.ndarray) -> np.ndarray:
    """(n, 256, 48) in [-1, 1]."""
    blocks = images.reshape(-1, CELLS, PATCH, CELLS, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, CELLS * CELLS, PATCH * PATCH * 3).astype(np.float32) / 127.5 - 1
