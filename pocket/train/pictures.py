"""The drawings that everything is trained on, made once and kept in a file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pocket.degrading import degrade
from pocket.drawing import GOOD_QUALITY, STYLES, Scene, draw, random_scenes, vary_caption

TRAINING_SEED, HELD_OUT_SEED = 1, 2
_CHUNK = 1000


@dataclass(frozen=True)
class Pictures:
    """Drawings.

    Attributes:
        images: uint8, (n, 64, 64, 3).
        scenes: What they show.
        captions: Varied.
        kinds: How each was made worse: a key of `pocket.degrading.DEGRADATIONS`, or "" if it was not.
    """

    images: np.ndarray
    scenes: list[Scene]
    captions: list[str]
    kinds: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.scenes)

    def labels(self) -> Tensor:
        """(n, 4) positions of the attributes' values."""
        return torch.tensor([scene.indices() for scene in self.scenes])

    def clean_rows(self) -> list[int]:
        """Rows of the drawings that were not made worse."""
        return [row for row in range(len(self)) if not self.kinds or not self.kinds[row]]


def draw_pictures(
    count: int, seed: int, *, held_out: bool = False, styles: Sequence[str] = tuple(STYLES), degraded: float = 0.0,
    cache: Path | None = None,
) -> Pictures:  # fmt: skip
    """Drawings of random scenes.

    Args:
        count: How many.
        seed: Of scenes, pictures and captions.
        held_out: Of combinations that nothing is trained on.
        styles: Chosen uniformly; a style may stand here more than once.
        degraded: Share that is made worse; most of those say so in their captions, as good ones sometimes say that.
        cache: The images are kept in this .npy file; scenes and captions are quickly made again.

    Raises:
        ValueError: The file holds another number of pictures. (Other differences are not seen.)
    """
    scenes = random_scenes(count, seed, held_out=held_out, styles=styles)
    rng = random.Random(f"captions/{seed}")
    kinds = [rng.choice(("blurry", "noisy", "faded")) if rng.random() < degraded else "" for _ in scenes]
    captions = [vary_caption(scene, rng, _quality(kind, rng)) for scene, kind in zip(scenes, kinds, strict=True)]
    if cache and cache.is_file():
        kept = np.load(cache, mmap_mode="r")
        if len(kept) != count:
            raise ValueError(f"{cache} holds {len(kept)} pictures, not {count}; delete it and they are drawn again.")
        return Pictures(kept, scenes, captions, kinds)
    chunks = []
    for start in tqdm(range(0, count, _CHUNK), desc="drawing", unit="k", disable=count <= _CHUNK):
        chunks.append(draw(scenes[start : start + _CHUNK], seed * 10_000 + start // _CHUNK))
    images = np.concatenate(chunks)
    for row, kind in enumerate(kinds):
        if kind:
            images[row] = degrade(images[row], kind, rng)
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.with_suffix(".part").open("wb") as file:
            np.save(file, images)
        cache.with_suffix(".part").replace(cache)
    return Pictures(images, scenes, captions, kinds)


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, 64, 64, 3) -> float32 (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def jitter(pixels: Tensor, generator: torch.Generator, noise: float = 0.06) -> Tensor:
    """A little noise, contrast and shift on (n, 3, 64, 64), so that pictures that are not drawn are read as well."""
    contrast = torch.rand(len(pixels), 1, 1, 1, generator=generator) * 0.4 + 0.8
    return shift(pixels * contrast + torch.randn(pixels.shape, generator=generator) * noise, generator)


def shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move (n, 3, 64, 64) by up to three pixels, all the same way: alone of `jitter` it makes no picture worse."""
    dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return F.pad(pixels, (3, 3, 3, 3), mode="replicate")[..., 3 + dy : 67 + dy, 3 + dx : 67 + dx]


def _quality(kind: str, rng: random.Random) -> str:
    dice = rng.random()
    if kind:
        return kind if dice < 0.5 else "low quality" if dice < 0.8 else ""
    return rng.choice(GOOD_QUALITY) if dice < 0.25 else ""
