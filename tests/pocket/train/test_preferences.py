"""Rankings get worse step by step in one respect, and the pairs that scorers are measured on."""

import random

import numpy as np
import pytest
import torch

from pocket.degrading import DEGRADATIONS
from pocket.drawing import ATTRIBUTES, Scene, vary_caption
from pocket.train.pictures import Pictures, draw_pictures
from pocket.train.preferences import RankingMaker, accuracies, held_out_pairs, named_attributes, ranking_loss


@pytest.fixture(scope="module")
def pictures():
    return draw_pictures(900, seed=8, styles=("flat", "neon"), degraded=0.3)


@pytest.fixture(scope="module")
def rankings(pictures):
    return RankingMaker(pictures).make(80, 5, random.Random(0))


def wrong(scene, first):
    return {name for name in ATTRIBUTES if getattr(scene, name) != getattr(first, name)}


def test_the_first_picture_is_a_clean_drawing_of_the_caption(pictures, rankings):
    clean = {pictures.images[row].tobytes(): row for row, kind in enumerate(pictures.kinds) if not kind}
    for images, scenes, faults, text in zip(
        rankings.images, rankings.scenes, rankings.faults, rankings.captions, strict=True
    ):
        assert pictures.scenes[clean[images[0].tobytes()]] == scenes[0]
        assert scenes[0].subject in text and faults[0] == {}


def test_each_picture_is_worse_than_the_one_before_in_one_respect(rankings):
    kinds_of_steps = {"wrong": 0, "stronger": 0, "further": 0}
    for scenes, faults in zip(rankings.scenes, rankings.faults, strict=True):
        for place in range(1, 5):
            before, after = wrong(scenes[place - 1], scenes[0]), wrong(scenes[place], scenes[0])
            if before != after:
                assert before < after and len(after) == len(before) + 1 and faults[place] == faults[place - 1]
                kinds_of_steps["wrong"] += 1
                continue
            assert scenes[place] == scenes[place - 1]
            grown = [kind for kind, s in faults[place].items() if s > faults[place - 1].get(kind, 0)]
            assert len(grown) == 1
            assert {k: s for k, s in faults[place - 1].items() if k not in grown}.items() <= faults[place].items()
            kinds_of_steps["stronger" if grown[0] in faults[place - 1] else "further"] += 1
    assert min(kinds_of_steps.values()) > 30
    assert {kind for row in rankings.faults for kind in row[-1]} == set(DEGRADATIONS)


def test_only_what_the_caption_says_can_be_wrong(rankings):
    left_out = 0
    for text, scenes in zip(rankings.captions, rankings.scenes, strict=True):
        said = set(named_attributes(text, scenes[0]))
        assert wrong(scenes[-1], scenes[0]) <= said
        left_out += len(said) < 4
    assert left_out > 5


def test_neighbours_look_different_and_the_same_numbers_give_the_same_rankings(pictures, rankings):
    assert (rankings.images[:, 1:] != rankings.images[:, :-1]).any((2, 3, 4)).mean() > 0.99
    again = RankingMaker(pictures).make(80, 5, random.Random(0))
    assert (again.images == rankings.images).all() and again.captions == rankings.captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sharp, a red cat in the sky, pixel art", ("subject", "color", "background", "style")),
        ("a cat in the sky, pixel art", ("subject", "background", "style")),
        ("a red cat, pixel art", ("subject", "color", "style")),
        ("a red cat in the sky", ("subject", "color", "background")),
        ("pixel art of a red cat", ("subject", "color", "style")),
    ],
)
def test_what_a_caption_names(text, expected):
    assert named_attributes(text, Scene("cat", "red", "sky", "pixel")) == expected


def test_every_caption_names_its_subject():
    rng = random.Random(0)
    for subject in ATTRIBUTES["subject"]:
        scene = Scene(subject, "blue", "night", "comic")
        assert all("subject" in named_attributes(vary_caption(scene, rng), scene) for _ in range(20))


def test_ranking_loss_by_hand():
    # pairs of the first row: 1, 3 and 2 apart; of the second: -1, -1 and 0
    scores = torch.tensor([[3.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    differences = [1, 3, 2, -1, -1, 0]
    assert ranking_loss(scores).item() == pytest.approx(np.mean([np.log1p(np.exp(-d)) for d in differences]))


def test_ranking_loss_of_two_is_the_cross_entropy_of_hps():
    scores = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(7, dtype=torch.long))
    torch.testing.assert_close(ranking_loss(scores), expected)


def test_held_out_pairs_and_their_accuracies():
    held_out = draw_pictures(30, seed=5, held_out=True)
    pairs = held_out_pairs(held_out, 25)
    assert list(pairs.worse) == [*DEGRADATIONS, *(f"wrong_{name}" for name in ATTRIBUTES)]
    assert (pairs.clean == held_out.images[:25]).all() and len(pairs.captions) == 25
    assert all((worse != pairs.clean).any((1, 2, 3)).all() for worse in pairs.worse.values())
    truth = {text: picture for text, picture in zip(pairs.captions, pairs.clean, strict=True)}

    def oracle(captions, images):
        """Right for all pictures but blurry ones, between which it sees no difference."""
        if images is pairs.worse["blurry"] or images is pairs.clean:
            return torch.ones(25)
        return torch.tensor([float((truth[text] == image).all()) for text, image in zip(captions, images, strict=True)])

    measured = accuracies(oracle, pairs)
    assert measured.pop("accuracy/blurry") == 0.0
    assert measured.pop("accuracy/clean_over_degraded") == 7 / 8
    assert measured.pop("accuracy/mean") == round(11 / 12, 4)
    assert set(measured.values()) == {1.0} and "accuracy/right_over_wrong" in measured


def test_a_wrong_picture_is_a_drawing_of_what_it_shows():
    values = {"flat": 10, "neon": 200}
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in values.values()])
    only_two = Pictures(images, [Scene("cat", "red", "sky", style) for style in values], ["", ""])
    made = RankingMaker(only_two).make(300, 2, random.Random(0))
    styles = [[scene.style for scene in scenes] for scenes in made.scenes]
    assert sum(first != second for first, second in styles) > 3
    for pair, shown in zip(made.images, styles, strict=True):
        assert pair[0, 0, 0, 0] == values[shown[0]]
        if shown[0] != shown[1]:
            assert (pair[1] == values[shown[1]]).all()
