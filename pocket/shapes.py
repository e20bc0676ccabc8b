"""Outlines of the pocket world's subjects, in a box from -1 to 1 with y pointing down."""

from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """A closed polygon (points, 2) and its tone: `main`, `dark` and `light` shades of the subject's colour, or `white`,
    `black`, `wood`, `leaf`."""

    outline: np.ndarray
    tone: str


def _ellipse(x: float, y: float, width: float, height: float | None = None, points: int = 32) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + width * np.cos(angles), y + (height or width) * np.sin(angles)], 1)


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, float)


def _star() -> np.ndarray:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 44, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 17, (y - 1) / 16], 1)


def _moon() -> np.ndarray:
    """A disc without a smaller one that is shifted to the right; the two circles meet at +-50 and +-75 degrees."""
    outer, inner = np.radians(np.linspace(50, 310, 30)), np.radians(np.linspace(285, 75, 30))
    far = np.stack([np.cos(outer), np.sin(outer)], 1)
    near = np.stack([0.44 + 0.79 * np.cos(inner), 0.79 * np.sin(inner)], 1)
    return np.concatenate([far, near])


def _flower() -> list[Part]:
    angles = -np.pi / 2 + np.arange(5) * 2 * np.pi / 5
    petals = [Part(_ellipse(0.42 * np.cos(a), -0.3 + 0.42 * np.sin(a), 0.32, points=18), "main") for a in angles]
    stem = Part(_polygon((-0.08, 0.1), (0.08, 0.1), (0.08, 1.0), (-0.08, 1.0)), "leaf")
    return [stem, *petals, Part(_ellipse(0, -0.3, 0.25, points=18), "light")]


SHAPES: dict[str, list[Part]] = {
    "circle": [Part(_ellipse(0, 0, 0.9, points=48), "main")],
    "square": [Part(_polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)), "main")],
    "triangle": [Part(_polygon((0, -0.95), (0.95, 0.75), (-0.95, 0.75)), "main")],
    "star": [Part(_star(), "main")],
    "heart": [Part(_heart(), "main")],
    "moon": [Part(_moon(), "main")],
    "house": [
        Part(_polygon((-0.7, -0.1), (0.7, -0.1), (0.7, 0.9), (-0.7, 0.9)), "main"),
        Part(_polygon((-0.95, -0.1), (0, -0.95), (0.95, -0.1)), "dark"),
        Part(_polygon((-0.5, 0.3), (-0.1, 0.3), (-0.1, 0.9), (-0.5, 0.9)), "dark"),
        Part(_polygon((0.2, 0.15), (0.52, 0.15), (0.52, 0.47), (0.2, 0.47)), "white"),
    ],
    "tree": [
        Part(_polygon((-0.17, 0.3), (0.17, 0.3), (0.17, 1.0), (-0.17, 1.0)), "wood"),
        Part(_ellipse(-0.42, 0.08, 0.42, 0.4), "main"),
        Part(_ellipse(0.42, 0.08, 0.42, 0.4), "main"),
        Part(_ellipse(0, -0.3, 0.62, 0.65), "main"),
    ],
    "fish": [
        Part(_polygon((0.5, 0), (1.05, -0.5), (1.05, 0.5)), "dark"),
        Part(_polygon((-0.15, -0.38), (0.3, -0.78), (0.38, -0.3)), "dark"),
        Part(_ellipse(-0.12, 0, 0.88, 0.52), "main"),
        Part(_ellipse(-0.58, -0.12, 0.14, points=14), "white"),
    ],
    "car": [
        Part(_polygon((-0.6, -0.1), (-0.38, -0.6), (0.38, -0.6), (0.65, -0.1)), "main"),
        Part(_polygon((-1.05, -0.14), (1.0, -0.14), (1.05, 0.4), (-1.05, 0.4)), "main"),
        Part(_polygon((-0.42, -0.15), (-0.28, -0.47), (0.28, -0.47), (0.44, -0.15)), "white"),
        Part(_ellipse(-0.54, 0.42, 0.28, points=18), "black"),
        Part(_ellipse(0.54, 0.42, 0.28, points=18), "black"),
    ],
    "flower": _flower(),
    "cat": [
        Part(_polygon((-0.8, -0.05), (-0.72, -0.98), (-0.1, -0.48)), "main"),
        Part(_polygon((0.8, -0.05), (0.72, -0.98), (0.1, -0.48)), "main"),
        Part(_ellipse(0, 0.15, 0.84, 0.72, points=36), "main"),
        Part(_ellipse(-0.32, 0.05, 0.15, 0.18, points=14), "white"),
        Part(_ellipse(0.32, 0.05, 0.15, 0.18, points=14), "white"),
        Part(_polygon((-0.14, 0.34), (0.14, 0.34), (0, 0.52)), "dark"),
    ],
}
