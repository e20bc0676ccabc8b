"""Features of pictures, for FID and its intervals: computed once per picture and kept in parts of a folder."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rewards.batching import BatchSize, in_batches, prefetch
from rewards.checkpoints import find_checkpoint
from rewards.feature_statistics import FIDError
from rewards.files import write_atomically
from rewards.images import ImageError, ImageSource, load_image
from rewards.inception import FeatureExtractor, load_inception, to_pixels
from rewards.scorer import pick_device

logger = logging.getLogger(__name__)

_PER_PART = 256  # pictures that a kill loses at most
_THREADS = 4


@dataclass(frozen=True)
class FeatureOptions:
    """Which network's features FID compares.

    Attributes:
        checkpoint: File of the Inception of 2015 (see `rewards.inception.load_inception`), or folder of a
            transformers vision model, whose pooled output is taken.
        kind: `inception` or `transformers`.
        side: Pixels to which pictures are resized (bilinear, antialiased) for a transformers model.
        mean, std: Of pixels in [0, 1], likewise.
    """

    checkpoint: str
    kind: str = "inception"
    side: int = 224
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("inception", "transformers"):
            raise ValueError(f"`fid.kind` must be inception or transformers, but is {self.kind!r}.")
        if self.side < 8 or self.std <= 0:
            raise ValueError(f"`fid.side` must be at least 8 and `fid.std` above 0, but are {self.side}, {self.std}.")


def load_features(options: FeatureOptions, device: str | None = None) -> FeatureExtractor:
    """The network whose features are compared.

    Args:
        options: Which.
        device: None: a GPU if there is one.

    Raises:
        CheckpointError: No such file or folder.
        ImportError: torch-fidelity is missing (Inception).
    """
    if options.kind == "inception":
        return load_inception(options.checkpoint, device=device)
    from transformers import AutoModel

    found = find_checkpoint(options.checkpoint)
    model: Any = AutoModel.from_pretrained(options.checkpoint, dtype=torch.float32, trust_remote_code=False)
    place = pick_device(device)
    model.eval().requires_grad_(False).to(place)

    def pooled(pixels: Tensor) -> Tensor:
        normal = (pixels.to(place) / 255 - options.mean) / options.std
        return model(pixel_values=normal).pooler_output.flatten(1)

    def preprocess(image: Image.Image) -> Tensor:
        pixels = to_pixels(image).float()
        if pixels.shape[-2:] == (options.side, options.side):
            return pixels
        size = (options.side, options.side)
        return torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]

    name = f"{model.config.model_type}, pooled, {options.side}, ({options.mean:g}, {options.std:g})"
    return FeatureExtractor(pooled, name=name, sha256=found.sha256, preprocess=preprocess)


def features_folder(parent: Path, extractor: FeatureExtractor) -> Path:
    """Where the features of one network are kept; another one's are in another folder."""
    digest = hashlib.sha256(json.dumps([extractor.name, extractor.sha256]).encode()).hexdigest()[:16]
    return parent / "features" / digest


def compute_features(
    pictures: Mapping[str, Callable[[], ImageSource]],
    extractor: FeatureExtractor,
    folder: Path,
    *,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Features of every picture that can be read; those that the folder has are not computed again.

    Args:
        pictures: What reads each of them, by key, which says what is in it: a store's key, or a digest of a file.
        extractor: The network.
        folder: Of parts (.safetensors).
        batch_size: Pictures per forward pass, halved when memory runs out.

    Returns:
        float32 vectors by key. A picture that can't be read, or whose features are not finite, is left out with a
        warning.

    Raises:
        FIDError: A part that can't be read.
    """
    kept = read_features(folder)
    missing = [key for key in pictures if key not in kept]
    size, failed = BatchSize(batch_size), 0

    def prepare(key: str) -> tuple[str, Tensor | None]:
        source = pictures[key]
        try:
            return key, extractor.preprocess(load_image(source()))
        except ImageError as error:
            logger.warning("left out of FID: %s", error)
            return key, None

    def extract(batch: list[tuple[str, Tensor | None]]) -> list[tuple[str, np.ndarray | None]]:
        there = [pixels for _, pixels in batch if pixels is not None]
        with torch.inference_mode():
            vectors = iter(extractor.function(torch.stack(there)).float().cpu().numpy() if there else [])
        return [(key, None if pixels is None else next(vectors)) for key, pixels in batch]

    ready = prefetch(prepare, missing, num_workers=_THREADS, ahead=2 * batch_size)
    found = iter(tqdm(
        in_batches(ready, size, extract), total=len(missing), desc="features", unit="image", disable=None
    ))  # fmt: skip
    while chunk := list(islice(found, _PER_PART)):
        usable = {key: vector for key, vector in chunk if vector is not None and np.isfinite(vector).all()}
        failed += len(chunk) - len(usable)
        if usable:
            _write_part(folder, usable)
            kept |= usable
    if failed:
        logger.warning("%d of %d pictures are left out of FID", failed, len(missing))
    return {key: kept[key] for key in pictures if key in kept}


def read_features(folder: Path) -> dict[str, np.ndarray]:
    """What `compute_features` has written to a folder; nothing if there is none.

    Raises:
        FIDError: A part that can't be read.
    """
    from safetensors import SafetensorError, safe_open

    kept: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                keys, vectors = json.loads(file.metadata()["keys"]), file.get_tensor("features")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FIDError(f"{path} holds no features; remove it and run the command again: {error}.") from error
        kept |= dict(zip(keys, vectors, strict=True))
    return kept


def _write_part(folder: Path, vectors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.safetensors")]
    path = folder / f"part-{max(numbers, default=-1) + 1:06d}.safetensors"
    data = save({"features": np.stack(list(vectors.values()))}, {"keys": json.dumps(list(vectors))})
    write_atomically(path, data)
