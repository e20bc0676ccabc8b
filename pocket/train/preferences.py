"""What people would prefer, by rule: rankings of drawings for captions, and the pairs that scorers are measured on.

A ranking is a caption and several pictures, best first. The first is a clean drawing of what the caption says; each of
the others is worse than the one before in one respect, a further wrong attribute or a stronger degradation, and better
in none, so that nobody has to weigh a wrong colour against a blur.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pocket.degrading import DEGRADATIONS, degrade
from pocket.drawing import (
    ATTRIBUTES,
    GOOD_QUALITY,
    SIDE,
    Scene,
    caption,
    draw,
    nearby,
    vary_caption,
)
from pocket.train.pictures import Pictures
from pocket.wording import mentioned

_WRONG = 0.45
"""Share of the steps down a ranking that make an attribute wrong; the others degrade."""


class Rankings(NamedTuple):
    """Captions, each with k pictures, best first.

    Attributes:
        captions: What was asked for, r of them.
        images: uint8 (r, k, 64, 64, 3).
        scenes: What is drawn in each picture, r lists of k.
        faults: How strongly each picture is degraded, by kind, r lists of k.
    """

    captions: list[str]
    images: np.ndarray
    scenes: list[list[Scene]]
    faults: list[list[dict[str, float]]]


class HeldOutPairs(NamedTuple):
    """Captions, a clean drawing of each, and worse pictures for each.

    Attributes:
        captions: In full, n of them.
        clean: uint8 (n, 64, 64, 3).
        worse: As `clean`, by what is wrong: a key of `DEGRADATIONS`, or `wrong_` and an attribute.
    """

    captions: list[str]
    clean: np.ndarray
    worse: dict[str, np.ndarray]


@dataclass(frozen=True)
class _State:
    """A picture on its way down: the drawing's row, what it shows, which attributes may still go wrong, its faults."""

    row: int
    scene: Scene
    still_right: tuple[str, ...]
    faults: dict[str, float] = field(default_factory=dict)


class RankingMaker:
    """Makes rankings of the clean ones among given drawings; a picture with a wrong attribute is another drawing.

    Args:
        pictures: At least two of each combination are best.
    """

    def __init__(self, pictures: Pictures):
        self.pictures = pictures
        self.clean = pictures.clean_rows()
        self.rows: dict[Scene, list[int]] = defaultdict(list)
        for row in self.clean:
            self.rows[pictures.scenes[row]].append(row)

    def make(self, count: int, length: int, rng: random.Random) -> Rankings:
        """`count` rankings of `length` pictures."""
        made = Rankings([], np.empty((count, length, SIDE, SIDE, 3), np.uint8), [], [])
        for number in range(count):
            row = rng.choice(self.clean)
            scene = self.pictures.scenes[row]
            text = vary_caption(scene, rng, rng.choice(GOOD_QUALITY) if rng.random() < 0.2 else "")
            states = [_State(row, scene, named_attributes(text, scene))]
            while len(states) < length:
                states.append(self._worse(states[-1], rng))
            made.captions.append(text)
            made.scenes.append([state.scene for state in states])
            made.faults.append([state.faults for state in states])
            for place, state in enumerate(states):
                made.images[number, place] = self._picture(state, rng)
        return made

    def _worse(self, state: _State, rng: random.Random) -> _State:
        if state.still_right and rng.random() < _WRONG:
            attribute = rng.choice(state.still_right)
            scene = nearby(state.scene, attribute, rng)
            if rows := self.rows.get(scene):  # there is none if the combination is held out
                left = tuple(other for other in state.still_right if other != attribute)
                return replace(state, row=rng.choice(rows), scene=scene, still_right=left)
        growing = [kind for kind, strength in state.faults.items() if strength <= 0.75]
        if growing and rng.random() < 0.7:
            kind = rng.choice(growing)
            strength = min(1.0, state.faults[kind] + rng.uniform(0.25, 0.5))
        else:
            kind = rng.choice([kind for kind in DEGRADATIONS if kind not in state.faults])
            strength = rng.uniform(0.15, 0.7)
        return replace(state, faults={**state.faults, kind: strength})

    def _picture(self, state: _State, rng: random.Random) -> np.ndarray:
        picture = self.pictures.images[state.row]
        for kind, strength in state.faults.items():
            picture = degrade(picture, kind, rng, strength)
        return picture


def named_attributes(text: str, scene: Scene) -> tuple[str, ...]:
    """Attributes of a scene that its caption names; only these can be wrong."""
    found = mentioned(text)
    return tuple(attribute for attribute in ATTRIBUTES if getattr(scene, attribute) in found[attribute])


def ranking_loss(scores: Tensor) -> Tensor:
    """-log sigmoid(s_i - s_j), averaged over the pairs in which i stands before j.

    It is ImageReward's loss, https://arxiv.org/abs/2304.05977 Eq. 1, and for two pictures the cross-entropy of HPS v2.

    Args:
        scores: Best first, shape (rankings, k).
    """
    better, worse = zip(*combinations(range(scores.shape[1]), 2), strict=True)
    return -F.logsigmoid(scores[:, list(better)] - scores[:, list(worse)]).mean()


def held_out_pairs(held_out: Pictures, count: int = 250) -> HeldOutPairs:
    """Pairs to measure on: a clean drawing over its degraded copy, for each kind, and over one with a wrong attribute.

    Args:
        held_out: Clean drawings of combinations that nothing is trained on.
        count: Pairs of each kind, at most.
    """
    rng = random.Random("held-out pairs")
    clean, scenes = np.array(held_out.images[:count]), held_out.scenes[:count]
    worse = {kind: np.stack([degrade(picture, kind, rng) for picture in clean]) for kind in DEGRADATIONS}
    for number, attribute in enumerate(ATTRIBUTES):
        worse[f"wrong_{attribute}"] = draw([nearby(scene, attribute, rng) for scene in scenes], 9_000 + number)
    return HeldOutPairs([caption(scene) for scene in scenes], clean, worse)


Score = Callable[[Sequence[str], np.ndarray], Tensor]
"""Captions and uint8 images (n, 64, 64, 3) -> (n,), higher is better."""


@torch.no_grad()
def accuracies(score: Score, pairs: HeldOutPairs) -> dict[str, float]:
    """How often the clean and right picture has the higher score, for each kind of pair and on average."""
    best = score(pairs.captions, pairs.clean)
    right = {kind: float((best > score(pairs.captions, worse)).float().mean()) for kind, worse in pairs.worse.items()}
    means = {
        "clean_over_degraded": np.mean([right[kind] for kind in DEGRADATIONS]),
        "right_over_wrong": np.mean([right[f"wrong_{attribute}"] for attribute in ATTRIBUTES]),
        "mean": np.mean(list(right.values())),
    }
    return {f"accuracy/{kind}": round(float(value), 4) for kind, value in (right | means).items()}
