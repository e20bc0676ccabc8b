"""Train the pocket CLIP, an open_clip model: pictures and captions of drawings, and an auxiliary classifier."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.drawing import ATTRIBUTES, Scene, caption
from pocket.judge import SIZES
from pocket.tokenizer import CONTEXT_LENGTH, clip_tokenizer, save_merges
from pocket.train.fitting import finish, fit
from pocket.train.pictures import Pictures, as_pixels, jitter
from rewards.two_towers import OPENAI_MEAN, OPENAI_STD

CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 6, "head_width": 24},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 763, "width": 64, "heads": 4, "layers": 2},
}
STEPS, BATCH = 3_200, 128
_IN_ROWS = 0.6
"""Share of batches in which groups of pictures differ in one attribute only: the negatives that are hard."""


def train(folder: Path, pictures: Pictures, held_out: Pictures, *, steps: int = STEPS) -> None:
    """Train and save; `done.json` says how often it picks the right caption for held-out drawings."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    heads = nn.Linear(CONFIG["embed_dim"], sum(SIZES))
    labels = pictures.labels()
    groups = _Groups(labels.numpy())
    token_ids = tokenize(pictures.captions)
    full_token_ids = tokenize([caption(scene) for scene in pictures.scenes])

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(step)
        grouped = rng.random() < _IN_ROWS
        rows = groups.pick(rng, BATCH) if grouped else np.array(rng.sample(range(len(pictures)), BATCH))
        texts = full_token_ids[rows] if grouped else token_ids[rows]
        pixels = normalize(jitter(as_pixels(pictures.images[rows]), generator, 0.03))
        image, text = model.encode_image(pixels), model.encode_text(texts)
        contrast = contrastive_loss(image, text, texts, model.logit_scale)
        parts = zip(heads(image).split(SIZES, -1), labels[rows].T, strict=True)
        return contrast + 0.5 * torch.stack([F.cross_entropy(part, truth) for part, truth in parts]).sum()

    fit(
        [model, heads], step_loss, steps=steps, folder=folder, learning_rate=1.5e-3, weight_decay=0.02, ema=0.995,
        seed=41, probe=lambda: zero_shot(model, held_out.images[:300], held_out.scenes[:300]), probe_every=400,
    )  # fmt: skip
    save(model, folder)
    finish(folder, zero_shot(model, held_out.images, held_out.scenes))


def contrastive_loss(image: Tensor, text: Tensor, token_ids: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss; equal captions are no negatives of each other."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = log_scale.exp().clamp(max=60) * image @ text.T
    equal = (token_ids[:, None] == token_ids[None]).all(-1) & ~torch.eye(len(token_ids), dtype=torch.bool)
    logits = logits.masked_fill(equal, -1e4)
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


@torch.no_grad()
def zero_shot(model: Any, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """How often the right caption has the highest cosine among those that differ in one attribute, for each attribute.

    Args:
        model: An open_clip model with the pocket tokenizer.
        images: uint8 (n, 64, 64, 3).
        scenes: What they show.
    """
    features = F.normalize(
        torch.cat([model.encode_image(part) for part in normalize(as_pixels(images)).split(256)]), dim=-1
    )
    right = {}
    for attribute, values in ATTRIBUTES.items():
        rivals = [caption(Scene(**{**vars(scene), attribute: value})) for scene in scenes for value in values]
        distinct = {text: row for row, text in enumerate(dict.fromkeys(rivals))}
        embedded = torch.cat([model.encode_text(part) for part in tokenize(list(distinct)).split(512)])
        embedded = F.normalize(embedded, dim=-1)[[distinct[text] for text in rivals]].view(len(scenes), len(values), -1)
        best = torch.einsum("nd,nvd->nv", features, embedded).argmax(1).tolist()
        truth = [values.index(getattr(scene, attribute)) for scene in scenes]
        right[f"zero_shot/{attribute}"] = round(float(np.mean(np.array(best) == np.array(truth))), 4)
    return right


def save(model: Any, folder: Path) -> None:
    """Write weights, `open_clip_config.json`, the tokenizer's merges, and what `rewards.load_scorer` needs to know."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    wrapped = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(wrapped, indent=1))
    save_merges(folder / "merges.txt.gz")


def tokenize(texts: Sequence[str]) -> Tensor:
    """(n, CONTEXT_LENGTH), padded with 0 as open_clip does."""
    rows = _tokenizer()(list(texts), truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]
    return torch.tensor([row + [0] * (CONTEXT_LENGTH - len(row)) for row in rows])


@cache
def _tokenizer() -> Any:
    return clip_tokenizer()


def normalize(pixels: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's normalisation."""
    mean, std = torch.tensor(OPENAI_MEAN).view(3, 1, 1), torch.tensor(OPENAI_STD).view(3, 1, 1)
    return (pixels / 2 + 0.5 - mean) / std


class _Groups:
    """Pictures by what they show, to pick groups that differ in one attribute only."""

    def __init__(self, labels: np.ndarray):
        self.rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, label in enumerate(labels.tolist()):
            self.rows[tuple(label)].append(row)
        self.scenes = list(self.rows)

    def pick(self, rng: random.Random, count: int) -> np.ndarray:
        picked: list[int] = []
        while len(picked) < count:
            scene = rng.choice(self.scenes)
            attribute = rng.choices(range(4), (5, 2, 2, 2))[0]
            for value in range(SIZES[attribute]):
                same = self.rows.get((*scene[:attribute], value, *scene[attribute + 1 :]))
                picked += [rng.choice(same)] if same else []
        return np.array(picked[:count])
