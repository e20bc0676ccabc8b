"""Outlines of the subjects: areas in closed form, and the box they lie in."""

import numpy as np
import pytest

from pocket.shapes import SHAPES

TONES = {"main", "dark", "light", "white", "black", "wood", "leaf"}


def area(outline):
    """Of a polygon, by the shoelace formula."""
    x, y = outline.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def lens(radius, other, distance):
    """Area that two circles share."""
    a = (distance**2 + radius**2 - other**2) / (2 * distance)
    b = distance - a
    first = radius**2 * np.arccos(a / radius) - a * np.sqrt(radius**2 - a**2)
    return first + other**2 * np.arccos(b / other) - b * np.sqrt(other**2 - b**2)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("circle", 48 / 2 * np.sin(2 * np.pi / 48) * 0.9**2),  # a regular polygon with 48 corners
        ("square", 1.6**2),
        ("triangle", 1.9 * 1.7 / 2),
        ("star", 10 * 1.05 * 0.45 * np.sin(np.pi / 5) / 2),  # ten triangles from the centre
        ("heart", 180 * np.pi / (17 * 16)),  # the curve's own area is 180 pi, scaled by 1/17 and 1/16
        ("moon", np.pi - lens(1, 0.79, 0.44)),
    ],
)
def test_area(subject, expected):
    assert area(SHAPES[subject][0].outline) == pytest.approx(expected, rel=0.02)


def test_corners_of_the_moon_lie_on_both_of_its_circles():
    outline = SHAPES["moon"][0].outline
    for corner in (outline[0], outline[29]):
        assert np.hypot(*corner) == pytest.approx(1, abs=0.01)
        assert np.hypot(*(corner - [0.44, 0])) == pytest.approx(0.79, abs=0.01)


@pytest.mark.parametrize("subject", SHAPES)
def test_shapes_fill_their_box_and_stay_inside(subject):
    points = np.concatenate([part.outline for part in SHAPES[subject]])
    assert np.abs(points).max() <= 1.1
    assert (np.ptp(points, axis=0) > 1.25).all()  # large enough to be recognised at 64 pixels
    for part in SHAPES[subject]:
        assert part.tone in TONES
        assert part.outline.ndim == 2 and len(part.outline) >= 3
        assert area(part.outline) > 0.01


@pytest.mark.parametrize("subject", SHAPES)
def test_most_of_a_subject_has_its_own_colour(subject):
    """Otherwise nobody could tell a red one from a blue one."""
    parts = SHAPES[subject]
    own = sum(area(part.outline) for part in parts if part.tone in ("main", "dark", "light"))
    assert own > 0.6 * sum(area(part.outline) for part in parts)


@pytest.mark.parametrize("subject", ["circle", "square", "triangle", "heart", "tree", "flower", "star", "cat"])
def test_these_are_the_same_in_a_mirror(subject):
    """The others are not: `draw` turns some of them round."""
    outline = np.concatenate([part.outline for part in SHAPES[subject]])
    for point in outline * [-1, 1]:
        assert np.hypot(*(outline - point).T).min() < 0.1
