"""What each degradation does to pictures whose answer is known."""

import random

import numpy as np
import pytest

from pocket.degrading import DEGRADATIONS, degrade
from pocket.drawing import draw, random_scenes

GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def drawings():
    return draw(random_scenes(12, 3), 3)


def change(drawings, kind, strength):
    """Mean absolute difference over all drawings."""
    worse = [degrade(picture, kind, random.Random(n), strength) for n, picture in enumerate(drawings)]
    return np.abs(np.stack(worse).astype(float) - drawings).mean()


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_more_strength_changes_more(drawings, kind):
    changes = [change(drawings, kind, strength) for strength in (0.2, 0.6, 1.0)]
    assert 0.3 < changes[0] < changes[1] < changes[2] < 100


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_same_random_numbers_give_the_same_picture(drawings, kind):
    before = drawings[0].copy()
    first, second, other = (degrade(drawings[0], kind, random.Random(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    assert (first == second).all() and (first != other).any()
    assert (drawings[0] == before).all()


@pytest.mark.parametrize(
    ("kind", "strength", "value", "expected"),
    [
        ("faded", 1.0, 10, 10 * 0.25 + 150 * 0.75),
        ("faded", 0.4, 10, 10 * 0.7 + 150 * 0.3),
        ("burnt", 1 / 3, 138, 128 + 2 * 10),
        ("burnt", 1.0, 200, 255),
        ("blurry", 1.0, 77, 77),
        ("warped", 1.0, 77, 77),
        ("shuffled", 1.0, 77, 77),
    ],
)
def test_a_picture_of_one_value(kind, strength, value, expected):
    worse = degrade(np.full((64, 64, 3), value, np.uint8), kind, random.Random(0), strength)
    assert (worse == round(expected)).all()


@pytest.mark.parametrize(("kind", "deviation"), [("noisy", 22.5), ("blotchy", 20.0), ("tinted", 25.0)])
def test_noise_is_as_strong_as_said_and_as_smooth(kind, deviation):
    noise = np.stack([degrade(GREY, kind, random.Random(seed), 0.5) for seed in range(20)]).astype(float) - 128
    assert np.sqrt((noise**2).mean()) == pytest.approx(deviation, rel=0.05)
    steps = np.abs(np.diff(noise, axis=2)).mean() / np.abs(noise).mean()
    # neighbours of white noise differ by sqrt(2) of its size; the others' are cells of 4 pixels and of half a picture
    low, high = {"noisy": (1.3, 1.5), "blotchy": (0.1, 0.35), "tinted": (0.01, 0.06)}[kind]
    assert low < steps < high


def test_warping_moves_points_smoothly():
    """On a ramp the change is the way that points moved, two grey values a pixel."""
    ramp = np.broadcast_to((64 + 2 * np.arange(64, dtype=np.uint8))[None, :, None], (64, 64, 3))
    moved = np.stack([degrade(ramp, "warped", random.Random(seed), 0.5)[:, 12:52, 0] for seed in range(60)])
    way = (moved.astype(float) - ramp[:, 12:52, 0]) / 2
    # half of 40 / 5, 40 / 8 and 40 / 12 pixels, each as likely
    expected = 0.5 * np.sqrt(np.mean([(40 / cells) ** 2 for cells in (5, 8, 12)]))
    assert np.sqrt((way**2).mean()) == pytest.approx(expected, rel=0.15)
    assert np.abs(np.diff(way, axis=1)).mean() < 0.6


def test_shuffled_blocks_are_blocks_of_the_picture(drawings):
    def blocks(picture):
        return [bytes(picture[y : y + 16, x : x + 16].tobytes()) for y in range(0, 64, 16) for x in range(0, 64, 16)]

    before, after = blocks(drawings[0]), blocks(degrade(drawings[0], "shuffled", random.Random(5), 0.4))
    assert set(after) <= set(before)
    assert 1 <= sum(one != other for one, other in zip(before, after, strict=True)) <= 2


def test_by_default_a_person_sees_it():
    black = np.zeros((64, 64, 3), np.uint8)
    strengths = [degrade(black, "faded", random.Random(seed))[0, 0, 0] / 112.5 for seed in range(300)]
    assert 0.66 < min(strengths) < 0.69 and 0.98 < max(strengths) <= 1.005


@pytest.mark.parametrize("strength", [0, -1, 1.01])
def test_strengths_out_of_range(strength):
    with pytest.raises(ValueError, match="`strength` must be greater than 0 and at most 1"):
        degrade(GREY, "noisy", random.Random(0), strength)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="`kind` must be one of blurry, .*tinted, but got 'wet'"):
        degrade(GREY, "wet", random.Random(0))
