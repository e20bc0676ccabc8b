"""Features that are computed once and kept."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from align.evaluation.picture_features import (
    FeatureOptions,
    compute_features,
    features_folder,
    load_features,
    read_features,
)
from pocket.judge import Judge
from pocket.world import WEIGHTS
from rewards.feature_statistics import FIDError
from rewards.inception import FeatureExtractor


def noise(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def extractor():
    return load_features(FeatureOptions(str(WEIGHTS / "judge"), "transformers", side=64), "cpu")


def test_a_transformers_model_gives_what_the_judge_does(extractor, tmp_path):
    judge = Judge.load(WEIGHTS / "judge").feature_extractor()
    images = {"a": noise(0, (64, 64)), "b": noise(1, (96, 64)), "c": noise(2, (64, 64))}
    found = compute_features({key: lambda i=image: i for key, image in images.items()}, extractor, tmp_path)
    assert list(found) == ["a", "b", "c"]
    for key, image in images.items():
        expected = judge.function(judge.preprocess(image)[None])[0].numpy()
        assert found[key] == pytest.approx(expected, abs=1e-4)


def test_only_new_pictures_are_computed(tmp_path):
    seen = []

    def count(pixels):
        seen.append(len(pixels))
        return pixels.float().mean((2, 3))

    extractor = FeatureExtractor(count, name="means")
    paths = {}
    for i in range(5):
        paths[str(i)] = tmp_path / f"{i}.png"
        noise(i, (8, 8)).save(paths[str(i)])
    sources = {key: partial(str, path) for key, path in paths.items()}
    folder = features_folder(tmp_path, extractor)
    some = {key: sources[key] for key in ("0", "1")}
    first = compute_features(some, extractor, folder)
    both = compute_features(sources, extractor, folder)
    assert sum(seen) == 5 and len(both) == 5 and np.array_equal(both["0"], first["0"])
    assert both["4"] == pytest.approx(np.asarray(Image.open(paths["4"])).mean((0, 1)), abs=1e-4)
    assert set(read_features(folder)) == set("01234") and len(list(folder.iterdir())) == 2
    assert features_folder(tmp_path, FeatureExtractor(count, name="others")) != folder
    next(folder.iterdir()).write_text("damaged")
    with pytest.raises(FIDError, match="holds no features; remove it and run the command again"):
        read_features(folder)


def test_pictures_that_can_not_be_read_are_left_out(tmp_path, caplog):
    (tmp_path / "x.png").write_text("no picture")
    sources = {"a": lambda: noise(0, (8, 8)), "b": partial(str, tmp_path / "x.png"), "c": lambda: noise(1, (8, 8))}
    extractor = FeatureExtractor(lambda pixels: pixels.float().mean((2, 3)) / torch.tensor([1, 1, 0.0]))
    with caplog.at_level(logging.WARNING):
        assert compute_features(sources, extractor, tmp_path / "infinite") == {}
        sources = dict(list(sources.items())[:2])
        found = compute_features(sources, FeatureExtractor(lambda p: p.float().mean((2, 3))), tmp_path / "finite")
    assert list(found) == ["a"] and "1 of 2 pictures are left out of FID" in caplog.text
