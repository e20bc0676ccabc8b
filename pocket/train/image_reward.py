"""Train the pocket ImageReward from nothing on rankings of drawings, in the module that runs the official one.

    train(Path("runs/pocket/image_reward"), pictures, held_out)
    load_scorer("image_reward", checkpoint="runs/pocket/image_reward")

ImageReward's authors start from BLIP, which knows what words look like. Here that is learned beside the rankings: the
right caption of a picture against others (BLIP's matching), and a classifier on the image's first token that is dropped
at the end.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.drawing import ATTRIBUTES, Scene, caption, nearby
from pocket.judge import SIZES
from pocket.tokenizer import bert_vocabulary
from pocket.train.clip import normalize
from pocket.train.fitting import finish, fit
from pocket.train.pictures import Pictures, as_pixels, shift
from pocket.train.preferences import (
    HeldOutPairs,
    RankingMaker,
    Rankings,
    accuracies,
    held_out_pairs,
    ranking_loss,
)
from rewards.blip import TextConfig, VisionConfig
from rewards.image_reward import MEAN, STD, ImageRewardModel
from rewards.two_towers import pad_token_ids

VISION = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
    "vocab_size": len(bert_vocabulary()), "max_position_embeddings": 40,
}  # fmt: skip
STEPS, RANKINGS, LENGTH = 2_400, 24, 4
_MATCHED = 2
"""The best pictures of each ranking that are matched with captions; in the others less can be seen."""


def train(folder: Path, pictures: Pictures, held_out: Pictures, *, steps: int = STEPS) -> None:
    """Train and save; `done.json` says how often it orders held-out pairs right, by kind of pair.

    Args:
        folder: Of this stage; the scorer is saved there.
        pictures: Training set; degraded ones in it are left out.
        held_out: Clean drawings of other combinations.
        steps: In all.
    """
    torch.manual_seed(0)
    model, texts = new_model(), Texts(folder)
    heads = nn.Linear(VISION["embed_dim"], sum(SIZES))
    maker, pairs = RankingMaker(pictures), held_out_pairs(held_out)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        model.mlp.eval()  # its dropouts would draw from other random numbers than this step's
        rng = random.Random(f"image_reward/{step}")
        rankings = maker.make(RANKINGS, LENGTH, rng)
        pixels = shift(as_pixels(rankings.images.reshape(-1, *rankings.images.shape[2:])), generator)
        tokens = model.blip.visual_encoder(normalize(pixels))
        parts = heads(tokens[:, 0]).split(SIZES, -1)
        labels = torch.tensor([scene.indices() for shown in rankings.scenes for scene in shown]).T
        seen = torch.stack([F.cross_entropy(part, truth) for part, truth in zip(parts, labels, strict=True)]).sum()
        ranked, matched = _scores(model, texts, tokens, rankings, rng)
        return ranking_loss(ranked) + F.softplus(matched[:, 1:] - matched[:, :1]).mean() + 0.5 * seen

    def measure() -> dict[str, float]:
        return accuracies(lambda captions, images: score(model, texts, captions, images), pairs)

    fit(
        [model, heads], step_loss, steps=steps, folder=folder, learning_rate=1e-3, weight_decay=0.02, ema=0.995,
        seed=61, probe=measure, probe_every=250,
    )  # fmt: skip
    calibrate(model, texts, pairs)
    save(model, folder)
    finish(folder, measure())


class Texts:
    """The words as token ids, by the vocabulary that it writes into a folder.

    Args:
        folder: vocab.txt goes there.
    """

    def __init__(self, folder: Path):
        from transformers import BertTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()))
        self.tokenizer: Any = BertTokenizer.from_pretrained(str(folder))
        self.known: dict[str, tuple[int, ...]] = {}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and the mask of what is no padding, both (n, tokens)."""
        for text in captions:
            if text not in self.known:
                self.known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        tokenizer, pieces = self.tokenizer, [self.known[text] for text in captions]
        token_ids = pad_token_ids(
            pieces, start=tokenizer.cls_token_id, end=tokenizer.sep_token_id, pad=tokenizer.pad_token_id,
            device=torch.device("cpu"),
        )  # fmt: skip
        return token_ids, token_ids != tokenizer.pad_token_id


def new_model() -> ImageRewardModel:
    """The model with random weights; BLIP's contrastive projections, which nothing reads, are zero."""
    model = ImageRewardModel(VisionConfig(**VISION), TextConfig(**TEXT), TEXT["hidden_size"])
    for unused in (model.blip.vision_proj, model.blip.text_proj):
        for parameter in unused.parameters():
            nn.init.zeros_(parameter.requires_grad_(False))
    words = model.blip.text_encoder.embeddings
    for table in (model.blip.visual_encoder.pos_embed, model.blip.visual_encoder.cls_token,
                  words.word_embeddings.weight, words.position_embeddings.weight):  # fmt: skip
        nn.init.trunc_normal_(table, std=0.02)
    return model


@torch.no_grad()
def score(model: ImageRewardModel, texts: Texts, captions: Sequence[str], images: np.ndarray) -> Tensor:
    """Raw scores (n,) of uint8 images (n, 64, 64, 3), each for its caption."""
    scores = []
    for start in range(0, len(captions), 256):
        tokens = model.blip.visual_encoder(normalize(as_pixels(images[start : start + 256])))
        token_ids, mask = texts(captions[start : start + 256])
        scores.append(model.mlp(model.blip.text_encoder(token_ids, mask, tokens, None)))
    return torch.cat(scores)


@torch.no_grad()
def calibrate(model: ImageRewardModel, texts: Texts, pairs: HeldOutPairs) -> None:
    """Give the scores of all pictures in the pairs mean 0 and deviation 1 after ImageReward's own normalisation."""
    raw = torch.cat([score(model, texts, pairs.captions, images) for images in (pairs.clean, *pairs.worse.values())])
    last: Any = model.mlp.layers[-1]
    factor = STD / raw.std()
    last.weight.mul_(factor)
    last.bias.copy_((last.bias - raw.mean()) * factor + MEAN)


def save(model: ImageRewardModel, folder: Path) -> None:
    """Write what `load_scorer("image_reward", checkpoint=folder)` reads, beside the vocabulary of `Texts`."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    settings = {
        "scorer": "image_reward",
        "config": {"vision": VISION, "med": TEXT, "mlp_input_size": TEXT["hidden_size"]},
    }
    (folder / "scorer.json").write_text(json.dumps(settings, indent=1))


def _scores(
    model: ImageRewardModel, texts: Texts, tokens: Tensor, rankings: Rankings, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Scores of the ranked pictures (r, k), and of some pictures with captions of which the first is right (n, 5)."""
    count, length = rankings.images.shape[:2]
    captions = [text for text in rankings.captions for _ in range(length)]
    image_of = list(range(count * length))
    for number, shown in enumerate(rankings.scenes):
        for place, scene in enumerate(shown[:_MATCHED]):
            captions += rival_captions(scene, rng)
            image_of += [number * length + place] * (1 + len(ATTRIBUTES))
    token_ids, mask = texts(captions)
    scores = model.mlp(model.blip.text_encoder(token_ids, mask, tokens, torch.tensor(image_of)))
    return scores[: count * length].view(count, length), scores[count * length :].view(-1, 1 + len(ATTRIBUTES))


def rival_captions(scene: Scene, rng: random.Random) -> list[str]:
    """The right caption, then one with each attribute wrong."""
    return [caption(scene), *(caption(nearby(scene, attribute, rng)) for attribute in ATTRIBUTES)]
