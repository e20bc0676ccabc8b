"""What is really in a picture: a classifier of the four attributes, and how sharp it is.

The judge is the hidden truth of the pocket world. No reward model sees it or is trained on it; it says how good they
are, and its features are the pocket world's FID.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pocket.drawing import ATTRIBUTES, Scene
from rewards.checkpoints import CheckpointError, find_checkpoint
from rewards.inception import FeatureExtractor

SIZES = tuple(len(values) for values in ATTRIBUTES.values())


class Verdict(NamedTuple):
    """What the judge says of pictures, each for the scene it should show.

    Attributes:
        probabilities: Of the scene's subject, colour, background and style, (n, 4).
        sharpness: 1 is as sharp as a drawing of that style, (n,).
        quality: Geometric mean of the probabilities times sharpness (at most 1), (n,): the ground truth.
    """

    probabilities: Tensor
    sharpness: Tensor
    quality: Tensor


class Judge:
    """A ResNet with one group of answers per attribute.

    Args:
        model: transformers' ResNetForImageClassification; its labels are the values of the attributes in order.
        sharpness: Mean `gradient_energy` of drawings by style, in the order of `STYLES`.
        sha256: Of the weights; names the features in caches.
    """

    def __init__(self, model: Any, sharpness: Sequence[float], sha256: str = ""):
        self.model, self.sha256 = model.eval().requires_grad_(False), sha256
        self.sharpness = torch.tensor(sharpness)

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """Load what `pocket.train` wrote.

        Raises:
            CheckpointError: There is no such folder, or another model in it.
        """
        from transformers import ResNetForImageClassification

        sha256 = find_checkpoint(folder).sha256
        model = ResNetForImageClassification.from_pretrained(str(folder), dtype=torch.float32)
        sharpness = getattr(model.config, "drawn_sharpness", None)
        if sharpness is None:
            raise CheckpointError(f"{folder}: config.json has no `drawn_sharpness`, so it is not a judge's.")
        return cls(model, sharpness, sha256)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, scenes: Sequence[Scene]) -> Verdict:
        """Judge uint8 images (n, 64, 64, 3)."""
        if len(images) != len(scenes):
            raise ValueError(f"Need one scene per image, but got {len(scenes)} scenes and {len(images)} images.")
        labels = torch.tensor([scene.indices() for scene in scenes])
        split = self.logits(images).split(SIZES, -1)
        chosen = [part.softmax(-1).gather(1, labels[:, i : i + 1]) for i, part in enumerate(split)]
        probabilities = torch.cat(chosen, 1)
        sharpness = torch.from_numpy(gradient_energy(images)) / self.sharpness[labels[:, 3]]
        quality = probabilities.clamp(min=1e-4).log().mean(1).exp() * sharpness.clamp(max=1)
        return Verdict(probabilities, sharpness, quality)

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> Tensor:
        """The most likely value of each attribute: (n, 4), positions as in `Scene.indices`."""
        return torch.stack([part.argmax(-1) for part in self.logits(images).split(SIZES, -1)], 1)

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> Tensor:
        """(n, 32) of uint8 images (n, 64, 64, 3)."""
        return _in_chunks(lambda pixels: self.model(pixels).logits, _to_tensor(images))

    def feature_extractor(self) -> FeatureExtractor:
        """Its pooled features, for `rewards.fid.FrechetDistance`."""
        return FeatureExtractor(self._features, name="pocket judge", sha256=self.sha256)

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (64, 64):
            images = nn.functional.interpolate(images.float(), (64, 64), mode="bilinear", antialias=True)
        return self.model.resnet(images.float() / 127.5 - 1).pooler_output.flatten(1)


def new_model() -> Any:
    """The classifier with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = [f"{attribute}: {value}" for attribute, values in ATTRIBUTES.items() for value in values]
    options: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    config = ResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic", **options,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def gradient_energy(images: np.ndarray) -> np.ndarray:
    """How sharp uint8 images (n, 64, 64, 3) are: root mean square of differences between neighbouring pixels, (n,)."""
    grey = images.astype(np.float32).mean(-1)
    across, down = np.diff(grey, axis=2), np.diff(grey, axis=1)
    return np.sqrt((across**2).mean((1, 2)) + (down**2).mean((1, 2)))


def _to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def _in_chunks(function: Any, images: Tensor, size: int = 256) -> Tensor:
    return torch.cat([function(images[i : i + size].float() / 127.5 - 1) for i in range(0, len(images), size)])
