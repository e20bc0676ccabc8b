"""Train the judge: a classifier of subject, colour, background and style."""

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pocket.degrading import degrade
from pocket.drawing import ATTRIBUTES, STYLES
from pocket.judge import SIZES, Judge, gradient_energy, new_model
from pocket.train.fitting import finish, fit
from pocket.train.pictures import Pictures, as_pixels, draw_pictures, jitter

STEPS, BATCH = 4_000, 64


def train(folder: Path, pictures: Pictures, held_out: Pictures) -> None:
    """Train on clean and degraded drawings; `done.json` says how well it sees what is in held-out ones.

    Args:
        folder: Of this stage; the model is saved there.
        pictures: Training set.
        held_out: Other combinations.
    """
    torch.manual_seed(0)
    model = new_model()
    labels = pictures.labels()

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        logits = model(jitter(as_pixels(pictures.images[rows.numpy()]), generator)).logits
        parts = zip(logits.split(SIZES, -1), labels[rows].T, strict=True)
        return torch.stack([F.cross_entropy(part, truth, label_smoothing=0.05) for part, truth in parts]).sum()

    fit([model], step_loss, steps=STEPS, folder=folder, learning_rate=3e-3, weight_decay=0.02, seed=11)
    drawn = draw_pictures(1_200, seed=77)
    style = drawn.labels()[:, 3]
    energy = torch.from_numpy(gradient_energy(drawn.images))
    model.config.drawn_sharpness = [round(float(energy[style == i].mean()), 3) for i in range(len(STYLES))]
    model.save_pretrained(folder)
    judge = Judge(model, model.config.drawn_sharpness)
    right = (judge.predict(held_out.images) == held_out.labels()).float().mean(0)
    measured = {f"held_out/{name}": round(float(value), 4) for name, value in zip(ATTRIBUTES, right, strict=True)}
    for kind in ("blurry", "noisy", "faded"):
        worse = torch.from_numpy(held_out.images[:400].copy()).numpy()
        rng = random.Random(kind)
        for row in range(len(worse)):
            worse[row] = degrade(worse[row], kind, rng)
        right = (judge.predict(worse) == held_out.labels()[:400]).float().mean()
        measured[f"held_out/{kind}"] = round(float(right), 4)
    finish(folder, measured)
