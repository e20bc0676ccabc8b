"""Training pictures: their captions, what is made worse, and the file they are kept in."""

import random

import numpy as np
import pytest
import torch

from pocket.degrading import degrade
from pocket.drawing import GOOD_QUALITY, STYLES, draw, is_held_out, random_scenes
from pocket.judge import gradient_energy
from pocket.train.pictures import as_pixels, draw_pictures, jitter

KINDS = ("blurry", "noisy", "faded")


def begins_with(caption, words):
    return caption.startswith(f"{words}, ")


def test_pictures_are_drawn_scenes():
    pictures = draw_pictures(30, seed=4)
    assert len(pictures) == 30
    assert pictures.scenes == random_scenes(30, 4)
    assert (pictures.images == draw(pictures.scenes, 40_000)).all()
    for scene, text in zip(pictures.scenes, pictures.captions, strict=True):
        assert scene.subject in text
    assert pictures.labels().tolist() == [list(scene.indices()) for scene in pictures.scenes]


def test_every_thousand_has_its_own_seed():
    pictures = draw_pictures(1_005, seed=2)
    assert (pictures.images[1_000:] == draw(pictures.scenes[1_000:], 20_001)).all()


def test_held_out_pictures_and_styles():
    pictures = draw_pictures(40, seed=0, held_out=True, styles=("neon",))
    assert all(is_held_out(scene) and scene.style == "neon" for scene in pictures.scenes)


def test_shares_of_words_about_quality(tmp_path):
    """Of good pictures a quarter says so; of bad ones half say how, 30% that they are bad, 20% nothing."""
    cache = tmp_path / "pictures.npy"
    np.save(cache, np.zeros((4_000, 1), np.uint8))  # nothing needs to be drawn

    def shares(degraded):
        texts = draw_pictures(4_000, seed=1, degraded=degraded, cache=cache).captions
        groups = (KINDS, ("low quality",), GOOD_QUALITY)
        return [sum(any(begins_with(text, word) for word in group) for text in texts) / 4_000 for group in groups]

    assert shares(1.0) == pytest.approx([0.5, 0.3, 0.0], abs=0.025)
    assert shares(0.0) == pytest.approx([0.0, 0.0, 0.25], abs=0.025)


def test_captions_say_how_pictures_were_made_worse():
    # the same seed without degradation draws the same pictures
    worse, drawn = draw_pictures(250, seed=6, degraded=0.5), draw_pictures(250, seed=6)
    assert worse.scenes == drawn.scenes
    before, after = gradient_energy(drawn.images), gradient_energy(worse.images)
    contrast = worse.images.std((1, 2, 3)) / drawn.images.std((1, 2, 3))
    found = {kind: [row for row, text in enumerate(worse.captions) if begins_with(text, kind)] for kind in KINDS}
    assert min(map(len, found.values())) > 10
    assert (after[found["blurry"]] < 0.8 * before[found["blurry"]]).all()
    assert (after[found["noisy"]] > before[found["noisy"]]).all()
    assert (contrast[found["faded"]] < 0.6).all()
    good = [row for row, text in enumerate(worse.captions) if any(begins_with(text, words) for words in GOOD_QUALITY)]
    assert (worse.images[good] == drawn.images[good]).all()
    changed = (worse.images != drawn.images).any((1, 2, 3))
    assert changed.mean() == pytest.approx(0.5, abs=0.1)


def test_the_cache_is_read_again(tmp_path):
    path = tmp_path / "folder" / "pictures.npy"
    first = draw_pictures(20, seed=3, degraded=0.5, cache=path)
    assert [file.name for file in path.parent.iterdir()] == ["pictures.npy"]
    again = draw_pictures(20, seed=3, degraded=0.5, cache=path)
    assert again.scenes == first.scenes and again.captions == first.captions
    assert (again.images == first.images).all()
    np.save(path, 255 - first.images)  # what is in the file is what counts
    assert (draw_pictures(20, seed=3, degraded=0.5, cache=path).images == 255 - first.images).all()


def test_a_cache_of_other_pictures(tmp_path):
    path = tmp_path / "pictures.npy"
    draw_pictures(20, seed=3, cache=path)
    with pytest.raises(ValueError, match="pictures.npy holds 20 pictures, not 21; delete it"):
        draw_pictures(21, seed=3, cache=path)


def test_pixels():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1, 5, 7] = (255, 0, 51)
    pixels = as_pixels(images)
    assert pixels.shape == (2, 3, 64, 64) and pixels.dtype == torch.float32
    assert pixels[1, :, 5, 7].tolist() == pytest.approx([1, -1, -0.6])
    assert (pixels[0] == -1).all()


def test_jitter_changes_contrast_and_place_a_little():
    generator = torch.Generator().manual_seed(0)
    flat = jitter(torch.full((500, 3, 64, 64), 0.5), generator, noise=0.0)[:, 0, 0, 0] / 0.5
    assert 0.8 <= float(flat.min()) < 0.82 and 1.18 < float(flat.max()) <= 1.2
    dot = torch.full((1, 3, 64, 64), -1.0)
    dot[..., 32, 32] = 1.0
    places = {int(jitter(dot, generator, noise=0.0)[0, 0].argmax()) for _ in range(400)}
    assert places == {64 * y + x for y in range(29, 36) for x in range(29, 36)}  # up to 3 pixels either way


def test_jitter_adds_noise_and_repeats():
    zeros = torch.zeros(50, 3, 64, 64)
    one, other = (jitter(zeros, torch.Generator().manual_seed(7), noise=0.1) for _ in range(2))
    assert torch.equal(one, other)
    assert float(one.std()) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("style", STYLES)
def test_degraded_pictures_of_every_style_are_images(style):
    picture = draw(random_scenes(1, 0, styles=(style,)), 0)[0]
    for kind in KINDS:
        worse = degrade(picture, kind, random.Random(0))
        assert worse.dtype == np.uint8 and worse.shape == (64, 64, 3)
        assert 3 < np.abs(worse.astype(int) - picture).mean() < 100
