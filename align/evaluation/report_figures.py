"""Figures of `report.html`: pictures as data URIs, dot-and-interval plots and curves as inline SVG; text is escaped."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from rewards.images import ImageError, load_image, to_rgb

PNG_SIDE, JPEG_SIDE = 128, 256
"""Pixels: up to the first a picture stays a PNG as it is; larger ones are JPEG, scaled down to the second."""
_LABEL, _WIDTH, _ROW = 190, 640, 26


class PictureBudget:
    """Inlines pictures until they take a number of bytes in all.

    Attributes:
        left_out: Pictures that there was no room for.
        unreadable: Pictures that are gone or broken.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = self.left_out = self.unreadable = 0
        self._known: dict[str, str] = {}

    def tag(self, uri: str | None, alt: str) -> str:
        """An `img` of a picture, or a box that says why there is none.

        Args:
            uri: Path or URL of the picture; None: it was not kept.
            alt: What it shows.
        """
        if uri is None:
            return '<div class="missing">no picture</div>'
        if uri not in self._known:
            try:
                image = to_rgb(load_image(_read(uri)))
            except (ImageError, OSError, ValueError, ImportError):
                self.unreadable += 1
                return '<div class="missing">picture not found</div>'
            self._known[uri] = data_uri(image)
        return self._tag(self._known[uri], alt)

    def show(self, image: Image.Image, alt: str) -> str:
        """An `img` of a picture that is open already."""
        return self._tag(data_uri(image), alt)

    def _tag(self, source: str, alt: str) -> str:
        if self.used + len(source) > self.max_bytes:
            self.left_out += 1
            return '<div class="missing">left out: the report would be too large</div>'
        self.used += len(source)
        small = ' class="small"' if source.startswith("data:image/png") else ""
        return f'<img{small} src="{source}" alt="{escape(alt)}" loading="lazy">'

    def note(self) -> str:
        """A paragraph about pictures that are not there; empty if all are."""
        notes = []
        if self.left_out:
            limit = f"{self.max_bytes / 1e6:g} MB (option max_megabytes)"
            notes.append(f"Pictures left out, since all in all they may take {limit}: {self.left_out}.")
        if self.unreadable:
            notes.append(f"Pictures that could not be read any more: {self.unreadable}.")
        return f'<p class="warn">{" ".join(notes)}</p>' if notes else ""


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI: PNG if it is small, else JPEG, scaled down."""
    buffer = io.BytesIO()
    if max(image.size) <= PNG_SIDE:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((JPEG_SIDE, JPEG_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def dot_plot(rows: Sequence[tuple[str, dict[str, Any]]], *, title: str, scale: float = 100) -> str:
    """Values as dots with their intervals, a row each, as inline SVG.

    Args:
        rows: Label and estimate (`value`, `low`, `high`).
        title: For those who can't see it.
        scale: Values are multiplied by it.
    """
    if not rows:
        return ""
    low = min(estimate["low"] for _, estimate in rows) * scale
    high = max(estimate["high"] for _, estimate in rows) * scale
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(value: float) -> float:
        return _LABEL + (value - low) / (high - low) * (_WIDTH - _LABEL - 30) + 8

    height = _ROW * len(rows) + 34
    parts = [_svg(_WIDTH, height, title)]
    for tick in ticks:
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="grid" stroke="#999" x1="{at}" x2="{at}" y1="4" y2="{height - 26}"/>')
        text = f'<text class="faint" font-size="12" x="{at}" y="{height - 8}" text-anchor="middle">{tick:g}</text>'
        parts.append(text)
    for i, (label, estimate) in enumerate(rows):
        y = _ROW * i + _ROW / 2 + 4
        left, middle, right = (x(scale * estimate[part]) for part in ("low", "value", "high"))
        parts.append(
            f'<text font-size="12" x="{_LABEL - 6}" y="{y + 4}" text-anchor="end">{escape(_short(label))}</text>'
        )
        parts.append(
            f'<line class="mark" stroke="#36c" stroke-width="2" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle class="mark" fill="#36c" cx="{middle:.1f}" cy="{y}" r="4"/>')
    return "".join([*parts, "</svg>"])


def curve(points: Sequence[tuple[float, float]], *, title: str) -> str:
    """A curve over training steps as inline SVG.

    Args:
        points: Step and finite value, at least two different steps; otherwise there is nothing to draw.
        title: Of the values.
    """
    steps = [step for step, _ in points]
    if len(set(steps)) < 2:
        return ""
    ticks = nice_ticks(min(v for _, v in points), max(v for _, v in points))
    low, high = min(ticks[0], *(v for _, v in points)), max(ticks[-1], *(v for _, v in points))
    width, height, left, bottom = 420, 200, 52, 30

    def place(step: float, value: float) -> tuple[float, float]:
        across = left + (step - min(steps)) / (max(steps) - min(steps)) * (width - left - 12)
        return across, height - bottom - (value - low) / (high - low) * (height - bottom - 12)

    parts = [_svg(width, height, f"{title} over training steps")]
    for tick in ticks:
        y = place(steps[0], tick)[1]
        parts.append(f'<line class="grid" stroke="#999" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="faint" font-size="12" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for step, anchor in ((min(steps), "start"), (max(steps), "end")):
        x = place(step, low)[0]
        parts.append(
            f'<text class="faint" font-size="12" x="{x:.1f}" y="{height - 10}" text-anchor="{anchor}">{step:g}</text>'
        )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline class="curve" fill="none" stroke="#36c" points="{line}"/></svg>')
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that reach from `low` or below to `high` or above."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _svg(width: int, height: int, title: str) -> str:
    label = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}"><title>{label}</title>'
    )


def _read(uri: str) -> str | bytes:
    """The path, or the content of what a URL names."""
    if "://" not in uri:
        return uri
    import fsspec

    with fsspec.open(uri, "rb") as file:
        return file.read()


def _short(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
