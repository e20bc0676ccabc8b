"""Drawn scenes: what a seed decides, what is held out, the grammar of captions, and what the pixels are."""

import random
import re

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import pocket.drawing
from pocket.drawing import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    STYLES,
    SUBJECTS,
    Scene,
    all_scenes,
    blur,
    caption,
    draw,
    is_held_out,
    nearby,
    random_scenes,
    vary_caption,
)

EVERYTHING = list(all_scenes())


def flat(subject="circle", color="red", background="white"):
    return Scene(subject, color, background, "flat")


def test_a_seed_decides_the_pictures():
    scenes = random_scenes(12, seed=3)
    assert (draw(scenes, 5) == draw(scenes, 5)).all()
    different = (draw(scenes, 5) != draw(scenes, 6)).any((1, 2, 3))
    assert different.all()


def test_a_picture_depends_on_its_place_in_the_list_and_on_nothing_else_there():
    scenes = [Scene("cat", "green", "grass", style) for style in STYLES] * 2
    together = draw(scenes, 1)
    for row in (0, 4, 11):
        others = random_scenes(row, seed=row)
        alone = draw([*others, scenes[row]], 1)[row]
        assert (alone == together[row]).all()
    assert (together[0] != together[6]).any()  # the same scene elsewhere is another picture


def test_more_pictures_than_are_painted_at_once():
    scenes = [flat("star")] * 300
    assert (draw(scenes, 0)[:100] == draw(scenes[:100], 0)).all()
    assert len(np.unique(draw(scenes, 0)[[0, 255, 256, 299]], axis=0)) == 4


def test_no_scene_no_picture():
    assert draw([], 0).shape == (0, 64, 64, 3)


def test_a_twelfth_of_the_combinations_is_held_out():
    assert len(EVERYTHING) == len(set(EVERYTHING)) == 12 * 8 * 6 * 6
    held_out = [scene for scene in EVERYTHING if is_held_out(scene)]
    assert len(held_out) == pytest.approx(len(EVERYTHING) / 12, rel=0.15)
    for name, values in ATTRIBUTES.items():
        counts = [sum(getattr(scene, name) == value for scene in held_out) for value in values]
        # every value is measured, and every one is trained on
        assert min(counts) > len(held_out) / len(values) / 2
        assert max(counts) < len(held_out) / len(values) * 2


@pytest.mark.parametrize("held_out", [False, True])
def test_random_scenes_are_of_one_half_and_cover_it(held_out):
    scenes = random_scenes(4_000, seed=1, held_out=held_out)
    assert {is_held_out(scene) for scene in scenes} == {held_out}
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    assert scenes[:50] == random_scenes(50, seed=1, held_out=held_out)
    assert scenes[:50] != random_scenes(50, seed=2, held_out=held_out)


def test_random_scenes_of_some_styles():
    scenes = random_scenes(2_000, seed=0, styles=("neon", "neon", "pixel"))
    share = sum(scene.style == "neon" for scene in scenes) / len(scenes)
    assert {scene.style for scene in scenes} == {"neon", "pixel"}
    assert share == pytest.approx(2 / 3, abs=0.05)  # a style that stands there twice is chosen twice as often


def test_indices_are_positions_in_the_lists():
    for scene in EVERYTHING[::97]:
        values = (ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, scene.indices(), strict=True))
        assert Scene(*values) == scene
    with pytest.raises(ValueError, match="`subject` must be one of circle, .* but is 'dragon'"):
        Scene("dragon", "red", "sky", "flat").indices()


def grammar_of(docstring):
    """A docstring's grammar as a regular expression; `... (NAME)` stands for all values of pocket.drawing.NAME."""
    rules = dict(re.findall(r"^    (\w+) += (.+)$", docstring, re.MULTILINE))

    def expression(name):
        text = re.sub(
            r"\| \.\.\. \((\w+)\)",
            lambda match: "".join(f' | "{value}"' for value in values_of(match[1])),
            rules[name],
        )
        pattern = ""
        for token in re.findall(r'"[^"]*"|\w+|[][()|]', text):
            literal = re.escape(token[1:-1])
            known = {"[": "(?:", "]": ")?", "(": "(?:", ")": ")", "|": "|"}
            pattern += known.get(token) or (literal if token[0] == '"' else f"(?:{expression(token)})")
        return pattern

    return re.compile(expression("caption"))


def values_of(name):
    table = getattr(pocket.drawing, name)
    return table if isinstance(table, tuple) or name == "COLORS" else table.values()


GRAMMAR = grammar_of(pocket.drawing.__doc__)


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("a cat", True),
        ("a red moon at sunset", True),
        ("pencil sketch of a brown house in the sky", True),
        ("masterpiece, best quality, a green car, comic book", True),
        ("blurry, neon glow of a pink fish", True),
        ("a red", False),
        ("a dragon", False),
        ("red cat", False),
        ("a cat, blurry", False),
        ("pixel art of a cat, neon glow", False),
    ],
)
def test_the_grammar_itself(text, follows):
    assert bool(GRAMMAR.fullmatch(text)) == follows


def test_captions_follow_the_grammar():
    rng = random.Random(0)
    qualities = ["", *pocket.drawing.GOOD_QUALITY, "blurry", "noisy", "faded", "low quality"]
    for scene in EVERYTHING:
        text = vary_caption(scene, rng, rng.choice(qualities))
        assert GRAMMAR.fullmatch(text), text
        assert GRAMMAR.fullmatch(caption(scene)) and GRAMMAR.fullmatch(caption(scene, style=False))
        assert re.search(rf"\b{scene.subject}\b", text)


def test_full_captions():
    scene = Scene("fish", "orange", "night", "watercolor")
    assert caption(scene) == "a orange fish at night, watercolor painting"
    assert caption(scene, style=False) == "a orange fish at night"
    assert len({caption(scene) for scene in EVERYTHING}) == len(EVERYTHING)


def test_shares_of_what_captions_leave_out():
    """Of each thousand, 50 lack the colour, 50 the background, 60 the style; a fifth of the rest begins with it."""
    rng, scene = random.Random(1), Scene("tree", "blue", "sky", "comic")
    texts = [vary_caption(scene, rng) for _ in range(20_000)]
    parts = {"blue": 0.95, "in the sky": 0.95, "comic book": 0.94, "comic book of a": 0.94 * 0.2}
    for words, share in parts.items():
        assert sum(words in text for text in texts) / len(texts) == pytest.approx(share, abs=0.01)
    whole = [text for text in texts if all(words in text for words in ("blue", "in the sky", "comic book"))]
    assert len(whole) / len(texts) == pytest.approx(0.84, abs=0.01)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_nearby_scenes_differ_in_one_attribute(attribute):
    rng, scene = random.Random(0), Scene("car", "pink", "black", "sketch")
    found = {nearby(scene, attribute, rng) for _ in range(200)}
    assert {getattr(other, attribute) for other in found} == set(ATTRIBUTES[attribute]) - {getattr(scene, attribute)}
    for name in set(ATTRIBUTES) - {attribute}:
        assert {getattr(other, name) for other in found} == {getattr(scene, name)}


@pytest.mark.parametrize("color", COLORS)
def test_colour_inside_of_a_flat_shape(color):
    centres = draw([flat("square", color)] * 60, 2)[:, 28:36, 28:36].reshape(60, -1, 3).astype(float)
    assert (centres.std(1) == 0).all()  # flat
    means = centres[:, 0]
    wanted = np.array(COLORS[color], float)
    assert np.abs(means - wanted).max() <= 11  # 10 of chance, and they are cut to whole numbers
    assert np.abs(means.mean(0) - wanted).max() < 3


def coverage(pictures, row):
    """How much of every pixel a blue shape on white covers, from the red channel."""
    red = pictures[row, ..., 0].astype(float)
    return (red.max() - red) / (red.max() - red.min())


def test_edges_of_a_circle_are_smooth_and_its_area_is_right():
    pictures = draw([flat("circle", "blue")] * 20, 3)
    y, x = np.mgrid[:64, :64] + 0.5
    for row in range(20):
        covered = coverage(pictures, row)
        area = covered.sum()
        radius = np.sqrt(area / np.pi)
        assert 0.9 * 18 - 0.3 < radius < 0.9 * 24 + 0.3
        # of a disc, the mean square distance from its centre is half the square of its radius
        centre = [(covered * axis).sum() / area for axis in (x, y)]
        spread = (covered * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)).sum() / area
        assert spread == pytest.approx(radius**2 / 2, rel=0.01)
        # whole inside, nothing outside, and one pixel of neither between them
        distance = np.hypot(x - centre[0], y - centre[1])
        assert (covered[distance < radius - 1] == 1).all() and (covered[distance > radius + 1] == 0).all()
        between = (covered > 0.02) & (covered < 0.98)
        assert 5 * radius < between.sum() <= 8.2 * radius  # a circle passes through 8 r pixels, some just so


def test_shapes_vary_in_place_and_size():
    pictures = draw([flat("circle", "blue")] * 40, 4)
    covered = np.stack([coverage(pictures, row) for row in range(40)])
    radii = np.sqrt(covered.sum((1, 2)) / np.pi)
    assert radii.min() < 0.9 * 19.5 and radii.max() > 0.9 * 22.5
    centres = (covered * (np.arange(64) + 0.5)).sum((1, 2)) / covered.sum((1, 2))
    assert centres.min() < 29 and centres.max() > 35


def test_subjects_stand_out_from_every_background():
    scenes = [Scene("square", "green", background, "flat") for background in BACKGROUNDS]
    for picture in draw(scenes, 0).astype(float):
        corners = picture[[2, 2, 61, 61], [2, 61, 2, 61]]
        assert np.abs(picture[32, 32] - corners).sum(-1).min() > 60


def test_pixel_art_is_blocks_in_seven_levels():
    pictures = draw([Scene(subject, "pink", "sunset", "pixel") for subject in SUBJECTS], 0)
    blocks = pictures.reshape(-1, 16, 4, 16, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    assert set(np.unique(pictures)) <= {0, 42, 84, 126, 168, 210, 252}


def test_styles_look_as_they_are_called():
    pictures = {
        style: draw([Scene(subject, "red", "white", style) for subject in SUBJECTS], 0).astype(float)
        for style in STYLES
    }
    brightness = {style: picture.mean() for style, picture in pictures.items()}
    assert brightness["neon"] == min(brightness.values()) < 120  # in the dark, even before white
    black = {style: (picture.max(-1) < 30).mean() for style, picture in pictures.items()}
    assert black["comic"] > 0.03 > 10 * black["watercolor"]  # ink
    inside = {style: picture[:, 24:40, 24:40] for style, picture in pictures.items()}
    saturation = {style: (picture.max(-1) - picture.min(-1)).mean() for style, picture in inside.items()}
    assert saturation["flat"] > 1.2 * saturation["watercolor"] and saturation["flat"] > 1.2 * saturation["sketch"]


@pytest.mark.parametrize("sigma", [0.2, 0.8, 1.6, 2.5])
def test_blur_is_scipys(sigma):
    pictures = np.random.default_rng(0).uniform(0, 255, (3, 64, 64, 2)).astype(np.float32)
    expected = gaussian_filter(
        pictures.astype(float), (0, sigma, sigma, 0), mode="nearest", radius=(0, *[max(1, round(3 * sigma))] * 2, 0)
    )
    np.testing.assert_allclose(blur(pictures, sigma), expected, atol=1e-3)


def test_blur_keeps_what_is_uniform():
    np.testing.assert_allclose(blur(np.full((1, 64, 64, 3), 77, np.uint8), 2.0), 77, rtol=1e-5)


def test_an_unknown_subject():
    with pytest.raises(KeyError, match="dragon"):
        draw([flat("dragon")], 0)
