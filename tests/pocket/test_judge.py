"""The judge's numbers in closed form, with an untrained classifier."""

import numpy as np
import pytest
import torch
from PIL import Image

from pocket.drawing import ATTRIBUTES, Scene, draw, random_scenes
from pocket.judge import SIZES, Judge, gradient_energy, new_model
from rewards.checkpoints import CheckpointError
from rewards.fid import FrechetDistance

SHARPNESS = [8.0, 12.0, 9.0, 10.0, 6.0, 20.0]
FLAT_RED_CIRCLE = Scene("circle", "red", "white", "flat")


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(new_model(), SHARPNESS)


def indifferent(judge, bias=None):
    """The judge, with a classifier that answers the same to every picture."""
    head = judge.model.classifier[1]
    head.weight.zero_()
    head.bias.copy_(torch.zeros(sum(SIZES)) if bias is None else bias)
    return judge


def one_edge(height, count=1):
    """Pictures whose left half is darker than the right one."""
    images = np.full((count, 64, 64, 3), 50, np.uint8)
    images[:, :, 32:] += np.uint8(height)
    return images


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((64, 64), 200), 0),
        (np.broadcast_to(3 * np.arange(64), (64, 64)), 3),  # 3 from each column to the next
        (3 * np.arange(64)[:, None] + np.arange(64), np.sqrt(10)),
        (255 * (np.indices((64, 64)).sum(0) % 2), 255 * np.sqrt(2)),  # a chess board
        (100 * (np.arange(64) >= 32) * np.ones((64, 1)), 100 / np.sqrt(63)),  # one of 63 columns of differences
    ],
)
def test_gradient_energy(image, expected):
    images = np.repeat(image[None, ..., None], 3, -1).astype(np.uint8)
    assert gradient_energy(images) == pytest.approx(expected)


def test_gradient_energy_is_of_the_mean_of_the_channels():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[..., 1] = np.arange(64)
    assert gradient_energy(image) == pytest.approx(1 / 3)


def test_probabilities_are_of_the_scenes_own_values(judge):
    images, scenes = draw(random_scenes(5, 0), 0), random_scenes(5, 1)
    verdict = judge(images, scenes)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        logits = judge.model(pixels).logits.double().exp()
    for row, scene in enumerate(scenes):
        start = 0
        for column, (size, label) in enumerate(zip(SIZES, scene.indices(), strict=True)):
            group = logits[row, start : start + size]
            assert float(verdict.probabilities[row, column]) == pytest.approx(float(group[label] / group.sum()), 1e-4)
            start += size


def test_quality_without_an_opinion(judge):
    # 12 subjects, 8 colours, 6 backgrounds, 6 styles, all equally likely; half as sharp as a drawing.
    images = one_edge(SHARPNESS[0] / 2 * np.sqrt(63))
    energy = 31 / np.sqrt(63)  # the edge is a whole number of grey levels
    verdict = indifferent(judge)(images, [FLAT_RED_CIRCLE])
    torch.testing.assert_close(verdict.probabilities, 1 / torch.tensor([[12.0, 8, 6, 6]]))
    assert float(verdict.sharpness) == pytest.approx(energy / 8)
    assert float(verdict.quality) == pytest.approx((1 / (12 * 8 * 6 * 6)) ** 0.25 * energy / 8, rel=1e-4)


def test_sharper_than_a_drawing_is_no_better(judge):
    twice, thrice = indifferent(judge)(np.concatenate([one_edge(127), one_edge(190)]), [FLAT_RED_CIRCLE] * 2).quality
    assert float(twice) == float(thrice) == pytest.approx((1 / (12 * 8 * 6 * 6)) ** 0.25, rel=1e-4)


def test_sharpness_is_by_style(judge):
    scenes = [Scene("cat", "red", "sky", style) for style in ATTRIBUTES["style"]]
    sharpness = judge(one_edge(100, 6), scenes).sharpness
    torch.testing.assert_close(sharpness, 100 / 63**0.5 / torch.tensor(SHARPNESS))


def test_one_wrong_attribute_does_not_make_quality_zero(judge):
    """A probability of 1e-30 counts as 1e-4."""
    bias = torch.zeros(sum(SIZES))
    bias[3] = 70  # sure that it is a star
    bias[12] = bias[12 + 8] = bias[12 + 8 + 6] = 70  # red, on white, flat
    quality = indifferent(judge, bias)(one_edge(200), [FLAT_RED_CIRCLE]).quality
    assert float(quality) == pytest.approx(0.1, rel=1e-3)  # the fourth root of 1e-4


def test_predictions_are_the_most_likely_values(judge):
    bias = torch.zeros(sum(SIZES))
    wanted = Scene("cat", "brown", "night", "comic")
    for start, label in zip(np.cumsum([0, *SIZES[:-1]]), wanted.indices(), strict=True):
        bias[int(start) + label] = 1
    assert indifferent(judge, bias).predict(one_edge(10, 3)).tolist() == [list(wanted.indices())] * 3


def test_many_images_are_judged_in_chunks(judge):
    images = draw(random_scenes(300, 0), 0)
    whole = judge.logits(images)
    assert whole.shape == (300, 32)
    torch.testing.assert_close(whole[250:260], judge.logits(images[250:260]), atol=1e-5, rtol=1e-5)


def test_labels_of_the_model_name_the_values():
    names = new_model().config.id2label
    assert (names[0], names[12], names[31]) == ("subject: circle", "color: red", "style: comic")


def test_a_saved_judge_is_the_same(judge, tmp_path):
    judge.model.config.drawn_sharpness = SHARPNESS
    judge.model.save_pretrained(tmp_path)
    images, scenes = draw(random_scenes(4, 0), 0), random_scenes(4, 0)
    again = Judge.load(tmp_path)
    assert len(again.sha256) == 64
    for mine, loaded in zip(judge(images, scenes), again(images, scenes), strict=True):
        torch.testing.assert_close(mine, loaded)


def test_no_judge_there(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Judge.load(tmp_path / "nothing")


def test_a_folder_that_is_another_model(judge, tmp_path):
    judge.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="drawn_sharpness"):
        Judge.load(tmp_path)


def test_one_scene_per_image(judge):
    with pytest.raises(ValueError, match="Need one scene per image, but got 2 scenes and 3 images"):
        judge(one_edge(10, 3), [FLAT_RED_CIRCLE] * 2)


def test_distance_of_its_features(judge):
    """0 of the same pictures; larger the more they differ; pictures of another size are resized."""
    images = draw(random_scenes(160, 0), 0)
    pictures = [Image.fromarray(image) for image in images]
    distance = FrechetDistance(judge.feature_extractor(), kid_subsets=0, num_workers=0)
    distance.reference(pictures)
    same = distance.compute(pictures).fid
    larger = distance.compute([picture.resize((128, 128)) for picture in pictures]).fid
    darker = distance.compute([picture.point(lambda value: value // 4) for picture in pictures]).fid
    assert same == pytest.approx(0, abs=1e-3)
    assert same < larger < darker / 10
