"""What FID and KID keep of a set of images: how it is summed up, named and saved."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewards.files import write_atomically
from rewards.images import ImageError, ImageSource, load_image

FORMAT = "t2i-align feature statistics 1"


class FIDError(ValueError):
    """Images, features or a cache that FID can't be computed from; the message says why."""


@dataclass(frozen=True)
class FeatureStatistics:
    """What is kept of a set of images.

    Attributes:
        mean: float64, shape (d,).
        covariance: Unbiased (divided by n - 1), float64, shape (d, d).
        n: Images that count.
        features: Of a random choice of the images, for KID: float32, shape (at most `max_features`, d).
        errors: Row -> why the image does not count.
    """

    mean: Tensor
    covariance: Tensor
    n: int
    features: Tensor
    errors: dict[int, str]


class Moments:
    """Mean and covariance of float64 vectors that come in chunks, without the cancellation of sums of squares."""

    def __init__(self):
        self.n = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self._scatter = torch.empty(0, 0, dtype=torch.float64)  # sum of outer products of deviations from the mean

    def add(self, vectors: Tensor) -> None:
        """Take in vectors of shape (m, d), m >= 1. (Update of Chan, Golub and LeVeque, 1983.)"""
        m, mean = len(vectors), vectors.mean(0)
        deviations = vectors - mean
        scatter = deviations.T @ deviations
        if self.n == 0:
            self.n, self.mean, self._scatter = m, mean, scatter
            return
        shift, total = mean - self.mean, self.n + m
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.n * m / total)
        self.mean = self.mean + shift * (m / total)
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """Divided by n - 1, shape (d, d)."""
        return self._scatter / (self.n - 1)


def image_set_digest(images: Sequence[ImageSource]) -> str:
    """SHA-256 of a set of images, in any order.

    Files count by path below their common folder, size and time of change, so that a folder may be moved; they are not
    read. Other images count by content.
    """
    paths = [os.path.abspath(image) for image in images if isinstance(image, str | Path)]
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    entries = sorted(_identity(image, common) for image in images)
    return hashlib.sha256("\n".join(entries).encode("utf-8", "surrogateescape")).hexdigest()


def _identity(image: ImageSource, common: str) -> str:
    if isinstance(image, str | Path):
        name = os.path.relpath(os.path.abspath(image), common)
        try:
            stat = os.stat(image)
        except OSError as error:
            return f"{name!r} {error.strerror}"
        return f"{name!r} {stat.st_size} {stat.st_mtime_ns}"
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    try:
        decoded = load_image(image)
    except ImageError as error:
        return str(error)
    header = f"{decoded.mode} {decoded.size} {decoded.getpalette()} "
    return hashlib.sha256(header.encode() + decoded.tobytes()).hexdigest()


def write_statistics(path: str | Path, statistics: FeatureStatistics, key: dict[str, str]) -> None:
    """Write statistics and what they came from as .safetensors, atomically."""
    from safetensors.torch import save

    tensors = {name: getattr(statistics, name).contiguous() for name in ("mean", "covariance", "features")}
    metadata = {"format": FORMAT, "n": str(statistics.n), "errors": json.dumps(statistics.errors), **key}
    write_atomically(path, save(tensors, metadata))


def read_statistics(path: str | Path) -> tuple[FeatureStatistics, dict[str, str]]:
    """Read what `write_statistics` wrote: the statistics, and metadata with the key.

    Raises:
        FIDError: Not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FIDError(f"{path} holds no feature statistics; choose another `cache`.")
            mean, covariance, features = (file.get_tensor(name) for name in ("mean", "covariance", "features"))
    except (SafetensorError, OSError) as error:
        raise FIDError(
            f"{path} can't be read as feature statistics; remove it or choose another `cache`: {error}."
        ) from error
    errors = {int(row): reason for row, reason in json.loads(metadata["errors"]).items()}
    return FeatureStatistics(mean, covariance, int(metadata["n"]), features, errors), metadata
