"""Pictures made worse: what low-quality captions describe, and what preference scorers learn to dislike.

Some kinds are faults of files (`noisy`), some of too much guidance (`burnt`), and some of image models that did not
learn enough: outlines that melt (`warped`), patches of wrong colour (`blotchy`), and a cast over all (`tinted`).
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pocket.drawing import SIDE, blur


class Degradation(NamedTuple):
    """A way to make pictures worse.

    Attributes:
        worsen: Picture, strength and random numbers -> picture in floats.
        mildest: Lowest strength that `degrade` chooses by itself.
    """

    worsen: Callable[[np.ndarray, float, random.Random], np.ndarray]
    mildest: float


def degrade(picture: np.ndarray, kind: str, rng: random.Random, strength: float | None = None) -> np.ndarray:
    """A worse copy of a picture.

    Args:
        picture: uint8, (64, 64, 3).
        kind: Key of `DEGRADATIONS`.
        rng: Random numbers.
        strength: Greater than 0 and at most 1; by default uniform between what a person sees at once and 1.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: Unknown kind, or strength out of range.
    """
    if kind not in DEGRADATIONS:
        raise ValueError(f"`kind` must be one of {', '.join(DEGRADATIONS)}, but got {kind!r}.")
    worsen, mildest = DEGRADATIONS[kind]
    if strength is None:
        strength = rng.uniform(mildest, 1)
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` must be greater than 0 and at most 1, but got {strength}.")
    return worsen(picture, strength, rng).clip(0, 255).round().astype(np.uint8)


def _blurred(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return blur(picture[None], 2.5 * strength)[0]


def _noisy(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return picture + _numbers(rng).standard_normal(picture.shape, np.float32) * (45 * strength)


def _faded(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return picture * (1 - 0.75 * strength) + 150 * 0.75 * strength


def _burnt(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return (picture.astype(np.float32) - 128) * (1 + 3 * strength) + 128


def _shuffled(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    """Some blocks of 16 x 16 pixels are copies of others."""
    worse = picture.copy()
    for _ in range(max(1, round(5 * strength))):
        x, y, from_x, from_y = (16 * rng.randrange(4) for _ in range(4))
        worse[y : y + 16, x : x + 16] = picture[from_y : from_y + 16, from_x : from_x + 16]
    return worse


def _warped(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    """Every point comes from somewhere near, neighbours from neighbours: outlines melt."""
    cells = rng.choice((5, 8, 12))
    # finer fields need less: outlines break by the field's slope
    shift = _smooth_noise(_numbers(rng), cells, 2) * (40 / cells * strength)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    return _sample(picture.astype(np.float32), rows + shift[..., 0], columns + shift[..., 1])


def _blotchy(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return picture + _smooth_noise(_numbers(rng), rng.choice((6, 10, 16)), 3) * (40 * strength)


def _tinted(picture: np.ndarray, strength: float, rng: random.Random) -> np.ndarray:
    return picture + _smooth_noise(_numbers(rng), 2, 3) * (50 * strength)


DEGRADATIONS: dict[str, Degradation] = {
    "blurry": Degradation(_blurred, 0.48),
    "noisy": Degradation(_noisy, 0.33),
    "faded": Degradation(_faded, 0.67),
    "burnt": Degradation(_burnt, 0.33),
    "shuffled": Degradation(_shuffled, 1.0),
    "warped": Degradation(_warped, 0.4),
    "blotchy": Degradation(_blotchy, 0.4),
    "tinted": Degradation(_tinted, 0.5),
}


def _numbers(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(32))


def _smooth_noise(numbers: np.random.Generator, cells: int, channels: int) -> np.ndarray:
    """Noise without detail finer than a `cells`-th of the picture: (64, 64, channels), each of mean square 1."""
    centers = (np.arange(cells) + 0.5) * (SIDE / cells)
    distance = (np.arange(SIDE)[:, None] + 0.5 - centers) / (0.6 * SIDE / cells)
    spread = np.exp(-0.5 * distance**2).astype(np.float32)  # (64, cells)
    field = spread @ numbers.normal(size=(channels, cells, cells)).astype(np.float32) @ spread.T
    return (field / np.sqrt((field**2).mean((1, 2), keepdims=True))).transpose(1, 2, 0)


def _sample(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear look-up at (64, 64) points; outside the edge counts."""
    rows, columns = rows.clip(0, SIDE - 1), columns.clip(0, SIDE - 1)
    top, left = np.minimum(rows.astype(np.intp), SIDE - 2), np.minimum(columns.astype(np.intp), SIDE - 2)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    flat, corner = picture.reshape(-1, picture.shape[-1]), top * SIDE + left
    above = flat.take(corner, 0) * (1 - right) + flat.take(corner + 1, 0) * right
    below = flat.take(corner + SIDE, 0) * (1 - right) + flat.take(corner + SIDE + 1, 0) * right
    return above * (1 - down) + below * down
