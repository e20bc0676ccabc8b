"""Train the pocket HPS v2 as its authors did: a CLIP, fine-tuned on which of two pictures is preferred for a caption.

    train(Path("runs/pocket/hps"), Path("runs/pocket/clip"), pictures, held_out)
    load_scorer("hps_v2", checkpoint="runs/pocket/hps")

The authors show pairs; here all pairs of a ranking count, which is the same loss.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pocket.train.clip import normalize, save, tokenize
from pocket.train.fitting import finish, fit
from pocket.train.pictures import Pictures, as_pixels, shift
from pocket.train.preferences import RankingMaker, accuracies, held_out_pairs, ranking_loss
from rewards.checkpoints import find_checkpoint, load_state_dict
from rewards.open_clip_towers import build_model

STEPS, RANKINGS, LENGTH = 800, 24, 4


def train(folder: Path, clip_folder: Path, pictures: Pictures, held_out: Pictures, *, steps: int = STEPS) -> None:
    """Train and save; `done.json` says how often it orders held-out pairs right, by kind of pair.

    Args:
        folder: Of this stage; the scorer is saved there in the files of the CLIP.
        clip_folder: What `pocket.train.clip` wrote.
        pictures: Training set; degraded ones in it are left out.
        held_out: Clean drawings of other combinations.
        steps: In all.
    """
    weights = find_checkpoint(clip_folder).path
    model = build_model(clip_folder / "open_clip_config.json", load_state_dict(weights), weights)
    maker, pairs = RankingMaker(pictures), held_out_pairs(held_out)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rankings = maker.make(RANKINGS, LENGTH, random.Random(f"hps/{step}"))
        pixels = shift(as_pixels(rankings.images.reshape(-1, *rankings.images.shape[2:])), generator)
        image = F.normalize(model.encode_image(normalize(pixels)), dim=-1).view(RANKINGS, LENGTH, -1)
        text = F.normalize(model.encode_text(tokenize(rankings.captions)), dim=-1)
        return ranking_loss(model.logit_scale.exp() * torch.einsum("rkd,rd->rk", image, text))

    def measure() -> dict[str, float]:
        return accuracies(lambda captions, images: score(model, captions, images), pairs)

    fit(
        [model], step_loss, steps=steps, folder=folder, learning_rate=5e-4, weight_decay=0.02, ema=0.99, seed=51,
        probe=measure, probe_every=200,
    )  # fmt: skip
    save(model, folder)
    finish(folder, measure())


@torch.no_grad()
def score(model: Any, captions: Sequence[str], images: np.ndarray) -> Tensor:
    """Cosines (n,) of uint8 images (n, 64, 64, 3), each with its caption."""
    cosines = []
    for start in range(0, len(captions), 256):
        image = model.encode_image(normalize(as_pixels(images[start : start + 256])), normalize=True)
        text = model.encode_text(tokenize(captions[start : start + 256]), normalize=True)
        cosines.append((image * text).sum(-1))
    return torch.cat(cosines)
