"""The pictures of the pocket world: a coloured subject before a background in a style, 64 x 64 pixels, with captions.

    scenes = random_scenes(8, seed=0)
    pictures = draw(scenes, seed=0)  # uint8 (8, 64, 64, 3)
    captions = [caption(scene) for scene in scenes]

Captions follow this grammar; what is in brackets may be missing, in every way that leaves a subject:

    caption    = [quality ", "] (body [", " style] | style " of " body)
    body       = "a " [color " "] subject [" " background]
    subject    = "circle" | "square" | ... (SUBJECTS)
    color      = "red" | "orange" | ... (COLORS)
    background = "on a white background" | "in the sky" | ... (BACKGROUNDS)
    style      = "flat illustration" | "pixel art" | ... (STYLES)
    quality    = "high quality" | "masterpiece, best quality" | "sharp" | "blurry" | "noisy" | "faded" | "low quality"

A twelfth of all combinations of subject, colour, background and style is held out (`is_held_out`): nothing in `pocket`
is trained on them, so that what is measured on them is generalisation.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pocket.shapes import SHAPES, Part

SIDE = 64
"""Pixels of a picture's side."""
_FINE = 4  # shapes are drawn this many times larger, then averaged
_GRID = (np.arange(SIDE) + 0.5).astype(np.float32)

SUBJECTS = tuple(SHAPES)
COLORS = {
    "red": (220, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (245, 215, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (135, 50, 190),
    "pink": (250, 125, 180),
    "brown": (125, 75, 40),
}
BACKGROUNDS = {
    "white": "on a white background",
    "black": "on a black background",
    "sky": "in the sky",
    "sunset": "at sunset",
    "grass": "on the grass",
    "night": "at night",
}
STYLES = {
    "flat": "flat illustration",
    "pixel": "pixel art",
    "sketch": "pencil sketch",
    "neon": "neon glow",
    "watercolor": "watercolor painting",
    "comic": "comic book",
}
GOOD_QUALITY = ("high quality", "masterpiece, best quality", "sharp")


@dataclass(frozen=True)
class Scene:
    """What is in a picture: keys of `SUBJECTS`, `COLORS`, `BACKGROUNDS` and `STYLES`."""

    subject: str
    color: str
    background: str
    style: str

    def indices(self) -> tuple[int, int, int, int]:
        """Positions of the four attributes in their lists.

        Raises:
            ValueError: One has another value.
        """
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, but is {getattr(self, name)!r}.")
        subject, color, background, style = (values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())
        return subject, color, background, style


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "color": tuple(COLORS),
    "background": tuple(BACKGROUNDS),
    "style": tuple(STYLES),
}
"""Fields of a `Scene` and their values, in the order of `Scene.indices`."""


def all_scenes(styles: Sequence[str] = tuple(STYLES)) -> Iterator[Scene]:
    """Every combination, held out or not."""
    for subject, color, background, style in product(SUBJECTS, COLORS, BACKGROUNDS, styles):
        yield Scene(subject, color, background, style)


def is_held_out(scene: Scene) -> bool:
    """Whether a combination is kept from everything that is trained: one in twelve, by a checksum of its name."""
    return zlib.crc32("|".join((scene.subject, scene.color, scene.background, scene.style)).encode()) % 12 == 0


def random_scenes(
    count: int, seed: int, *, held_out: bool = False, styles: Sequence[str] = tuple(STYLES)
) -> list[Scene]:
    """Scenes drawn uniformly, with repetition, from the combinations that are (not) held out."""
    pool = [scene for scene in all_scenes(styles) if is_held_out(scene) == held_out]
    return random.Random(f"scenes/{seed}").choices(pool, k=count)


def caption(scene: Scene, *, style: bool = True) -> str:
    """The full caption of a scene, without words about quality."""
    body = f"a {scene.color} {scene.subject} {BACKGROUNDS[scene.background]}"
    return f"{body}, {STYLES[scene.style]}" if style else body


def vary_caption(scene: Scene, rng: random.Random, quality: str = "") -> str:
    """One of the captions of a scene by the grammar: five of six say everything, the others leave one attribute out."""
    color, background, style = f"{scene.color} ", f" {BACKGROUNDS[scene.background]}", STYLES[scene.style]
    dice = rng.random()
    if dice < 0.05:
        color = ""
    elif dice < 0.10:
        background = ""
    elif dice < 0.16:
        style = ""
    body = f"a {color}{scene.subject}{background}"
    if style and rng.random() < 0.2:
        body = f"{style} of {body}"
    elif style:
        body = f"{body}, {style}"
    return f"{quality}, {body}" if quality else body


def nearby(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with another value of one attribute."""
    values = [value for value in ATTRIBUTES[attribute] if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: rng.choice(values)})


def draw(scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """Draw scenes: place, size, tilt and details vary with the seed and the position in the list.

    Args:
        scenes: What to draw.
        seed: Same scenes and seed, same pictures.

    Returns:
        uint8, shape (len(scenes), 64, 64, 3).
    """
    pictures = np.zeros((len(scenes), SIDE, SIDE, 3), np.uint8)
    for style in STYLES:
        rows = [row for row, scene in enumerate(scenes) if scene.style == style]
        for start in range(0, len(rows), 256):
            some = rows[start : start + 256]
            sketches = [_Sketch(scenes[row], random.Random(f"draw/{seed}/{row}")) for row in some]
            pictures[some] = _PAINTERS[style](sketches).clip(0, 255).round().astype(np.uint8)
    return pictures


class _Sketch:
    """One picture before it is painted: its outlines in fine pixels, its colour, its random numbers."""

    def __init__(self, scene: Scene, rng: random.Random):
        self.scene, self.rng = scene, rng
        self.numbers = np.random.default_rng(rng.getrandbits(32))
        self.color = np.clip(np.array(COLORS[scene.color]) + self.numbers.uniform(-10, 10, 3), 0, 255)
        center = SIDE / 2 + np.array([rng.uniform(-6, 6), rng.uniform(-4, 5)])
        radius, tilt = rng.uniform(18, 24), np.radians(rng.uniform(-10, 10))
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        mirror = np.array([-1 if scene.subject in ("fish", "car", "house") and rng.random() < 0.5 else 1, 1])
        self.parts = [
            Part((part.outline * mirror) @ turn * radius + center, part.tone) for part in SHAPES[scene.subject]
        ]

    def tone(self, tone: str) -> np.ndarray:
        return {
            "main": self.color,
            "dark": self.color * 0.6,
            "light": self.color * 0.35 + np.array((255, 255, 220)) * 0.65,
            "white": np.array((245, 245, 245)),
            "black": np.array((35, 35, 40)),
            "wood": np.array((105, 65, 35)),
            "leaf": np.array((50, 130, 50)),
        }[tone]

    def filled(self, wobble: float = 0.0) -> np.ndarray:
        """All parts one upon the other: (64, 64, 4), colours times coverage, and coverage in [0, 1]."""
        image, pen = _canvas()
        for part in self.parts:
            outline = part.outline + self.numbers.normal(0, wobble, part.outline.shape) if wobble else part.outline
            pen.polygon(_points(outline), fill=(*(int(value) for value in self.tone(part.tone)), 255))
        return _average(image)

    def outlined(self, width: float, *, strokes: int = 1, shake: float = 0.0, by_tone: bool = False) -> np.ndarray:
        """Coverage (64, 64) by the outlines of all parts; `by_tone`: (64, 64, 4) as `filled`."""
        image, pen = _canvas()
        for part in self.parts:
            tone = "main" if part.tone in ("main", "dark", "light") else part.tone
            color = tuple(int(value) for value in self.tone(tone)) if by_tone else (255, 255, 255)
            for _ in range(strokes):
                points = _points(part.outline + self.numbers.normal(0, shake, 2))
                pen.line([*points, *points[:2]], fill=(*color, 255), width=round(width * _FINE), joint="curve")
        averaged = _average(image)
        return averaged if by_tone else averaged[..., 3]


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGBA", (SIDE * _FINE, SIDE * _FINE), (0, 0, 0, 0))
    return image, ImageDraw.Draw(image)


def _points(outline: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x) * _FINE, float(y) * _FINE) for x, y in outline]


def _average(image: Image.Image) -> np.ndarray:
    """RGBA in fine pixels -> (64, 64, 4): premultiplied colours, and coverage in [0, 1]."""
    # "RGBa" is Pillow's premultiplied mode, so that transparent black does not darken the edges
    averaged = np.asarray(image.convert("RGBa").reduce(_FINE), np.float32)
    return np.concatenate([averaged[..., :3], averaged[..., 3:] / 255], -1)


def _over(backgrounds: np.ndarray, layers: np.ndarray) -> np.ndarray:
    return backgrounds * (1 - layers[..., 3:]) + layers[..., :3]


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    share = (_GRID / SIDE)[:, None, None]
    return np.broadcast_to(np.array(top) * (1 - share) + np.array(bottom) * share, (SIDE, SIDE, 3)).astype(np.float32)


def _disc(x: float, y: float, width: float, height: float) -> np.ndarray:
    """Coverage (64, 64, 1) of an ellipse with a soft edge of one pixel."""
    distance = np.hypot((_GRID[None] - x) / width, (_GRID[:, None] - y) / height)
    return np.clip((1 - distance) * min(width, height) + 0.5, 0, 1)[..., None]


def _paint_background(sketch: _Sketch) -> np.ndarray:
    """(64, 64, 3) of what stands behind the subject."""
    rng, kind = sketch.rng, sketch.scene.background
    light = rng.uniform(-5, 5)
    if kind in ("white", "black"):
        return np.full((SIDE, SIDE, 3), (247 if kind == "white" else 12) + light * 0.6, np.float32)
    if kind == "sky":
        picture = _gradient((95, 170, 240), (190, 225, 250)) + light
        for _ in range(2):
            x, y = rng.uniform(4, 60), rng.uniform(5, 24)
            for dx, dy in ((-4, 1), (0, -1), (4, 1)):
                cover = _disc(x + dx, y + dy, 4.5, 3.2)
                picture = picture * (1 - cover) + 252 * cover
        return picture
    if kind == "sunset":
        picture = _gradient((105, 60, 130), (255, 150, 70)) + light
        cover = _disc(rng.uniform(8, 56), rng.uniform(55, 60), 7, 7)
        return picture * (1 - cover) + np.array((255, 225, 130)) * cover
    if kind == "grass":
        horizon = rng.uniform(35, 42)
        share = np.clip(_GRID - horizon + 0.5, 0, 1)[:, None, None]
        picture = (_gradient((175, 215, 245), (205, 230, 250)) + light) * (1 - share)
        picture = picture + (np.array((115, 185, 80)) + light) * share
        for _ in range(10):
            x, y = rng.randrange(SIDE), rng.randrange(int(horizon) + 3, SIDE)
            picture[y - 2 : y + 1, x] = (80, 150, 55)
        return picture
    picture = _gradient((12, 16, 50), (35, 45, 95)) + light * 0.5
    for _ in range(14):
        picture[rng.randrange(SIDE), rng.randrange(SIDE)] = (235, 235, 210)
    return picture


def _backgrounds(sketches: Sequence[_Sketch]) -> np.ndarray:
    return np.stack([_paint_background(sketch) for sketch in sketches])


def _fills(sketches: Sequence[_Sketch], wobble: float = 0.0) -> np.ndarray:
    return np.stack([sketch.filled(wobble) for sketch in sketches])


def _outlines(sketches: Sequence[_Sketch], width: float, **options: Any) -> np.ndarray:
    return np.stack([sketch.outlined(width, **options) for sketch in sketches])[..., None]


def blur(pictures: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (n, 64, 64, channels) along both sides; edges are repeated."""
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * pictures.ndim
        pad[axis] = (reach, reach)
        padded = np.pad(pictures.astype(np.float32), pad, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
        pictures = windows @ weights
    return pictures


def _flat(sketches: Sequence[_Sketch]) -> np.ndarray:
    return _over(_backgrounds(sketches), _fills(sketches))


def _pixel_art(sketches: Sequence[_Sketch]) -> np.ndarray:
    """Blocks of 4 x 4 pixels in seven levels a channel."""
    blocks = _flat(sketches).reshape(-1, SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))
    return (np.round(blocks / 42) * 42).repeat(4, 1).repeat(4, 2)


def _pencil_sketch(sketches: Sequence[_Sketch]) -> np.ndarray:
    """On paper that shows a little of the background: hatched inside, with outlines drawn twice."""
    colors = np.stack([sketch.color for sketch in sketches])[:, None, None].astype(np.float32)
    paper = 212 + (_backgrounds(sketches) - 128) * 0.33
    hatching = ((_GRID[None] + _GRID[:, None]) % 8 < 4).astype(np.float32)[None, ..., None]
    inside = _fills(sketches)[..., 3:] * (0.35 + 0.45 * hatching)
    drawn = paper * (1 - inside) + colors * inside
    lines = _outlines(sketches, 1.1, strokes=2, shake=0.45)
    return drawn * (1 - lines) + (colors * 0.45 + 15) * lines


def _neon(sketches: Sequence[_Sketch]) -> np.ndarray:
    """Bright outlines with a glow before a background in the dark."""
    layers = np.stack([sketch.outlined(2.0, by_tone=True) for sketch in sketches])
    light = layers[..., :3] * 0.85 + 15 * layers[..., 3:]
    return _backgrounds(sketches) * 0.3 + blur(light, 2.0) * 1.1 + light * 0.9


def _watercolor(sketches: Sequence[_Sketch]) -> np.ndarray:
    """Pale, with wobbling edges that are darker, on grainy paper."""
    layers = _fills(sketches, wobble=0.7)
    pale = layers.copy()
    pale[..., :3] = pale[..., :3] * 0.8 + 255 * 0.2 * pale[..., 3:]
    painted = blur(_over(_backgrounds(sketches) * 0.6 + 100, pale), 0.8)
    cover = layers[..., 3:]
    edge = np.clip(cover - blur(cover, 1.6), 0, 1)
    grain = np.stack([sketch.numbers.normal(0, 1, (16, 16, 1)) for sketch in sketches]).repeat(4, 1).repeat(4, 2)
    return painted * (1 - 0.6 * edge) + blur(grain, 2.5) * 22


def _comic(sketches: Sequence[_Sketch]) -> np.ndarray:
    """Strong colours in few levels, dots in the background, thick black outlines."""
    background = _backgrounds(sketches)
    dots = np.hypot((_GRID[None] % 8) - 4, (_GRID[:, None] % 8) - 4)
    dots = np.clip(2.4 - dots, 0, 1)[None, ..., None]
    background = background * (1 - 0.3 * dots) + 128 * 0.3 * dots
    strong = (_over(background, _fills(sketches)) - 128) * 1.2 + 128
    lines = _outlines(sketches, 2.4)
    return strong * (1 - lines) + 10 * lines


_PAINTERS = {
    "flat": _flat,
    "pixel": _pixel_art,
    "sketch": _pencil_sketch,
    "neon": _neon,
    "watercolor": _watercolor,
    "comic": _comic,
}
