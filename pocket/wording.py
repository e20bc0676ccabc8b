"""How people say what is in a picture, in words that need not be those of its caption, and what such a text means.

    rng = random.Random(0)
    say("style", "sketch", rng)  # "like a pencil drawing"
    mentioned("a kitty on the lawn, in pencil")  # {"subject": {"cat"}, "color": set(), "background": {"grass"}, ...}

No phrase of one value holds a word that could mean another value, so a text that is made of these phrases, and of
nothing else that can be seen, has one meaning only.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from pocket.drawing import ATTRIBUTES, BACKGROUNDS, STYLES, Scene
from pocket.tokenizer import words


@dataclass(frozen=True)
class Wish:
    """What a text asks for: a value of each attribute, or None where it says nothing and anything will do."""

    subject: str | None = None
    color: str | None = None
    background: str | None = None
    style: str | None = None

    def said(self) -> dict[str, str]:
        """The attributes that the text speaks of."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def allows(self, scene: Scene) -> bool:
        """Whether a scene is what was asked for."""
        return all(getattr(scene, name) == value for name, value in self.said().items())


def wish_of(scene: Scene | Wish, *without: str) -> Wish:
    """What a scene shows, without some of its attributes."""
    return Wish(**{name: None if name in without else getattr(scene, name) for name in ATTRIBUTES})


class _Phrases(NamedTuple):
    """`plain` are the grammar's own and those near it, in words that text encoders know; `everyday` are others."""

    plain: tuple[str, ...]
    everyday: tuple[str, ...]


def _table(text: str) -> dict[str, _Phrases]:
    """Lines of `value: plain, plain | everyday, everyday`."""
    rows = {}
    for line in text.strip().splitlines():
        value, _, phrases = line.partition(":")
        plain, _, everyday = phrases.partition("|")
        halves = (tuple(phrase.strip() for phrase in half.split(",") if phrase.strip()) for half in (plain, everyday))
        rows[value.strip()] = _Phrases(*halves)
    return rows


PHRASES: dict[str, dict[str, _Phrases]] = {
    "subject": _table("""
        circle: circle | disc, round shape
        square: square | four-sided shape, four-cornered shape
        triangle: triangle | three-cornered shape, three-sided shape
        star: star | five-pointed star, star shape
        heart: heart | love heart, heart shape
        moon: moon | crescent, crescent moon
        house: house | cottage, cabin
        tree: tree | leafy tree, bushy tree
        fish: fish | fishy, swimming fish
        car: car | automobile, motor car
        flower: flower | blossom, bloom
        cat: cat | kitty, pussycat
    """),
    "color": _table("""
        red: red | scarlet, bright red
        orange: orange | tangerine, orange-coloured
        yellow: yellow | lemon yellow, yellow-coloured
        green: green | emerald green, green-coloured
        blue: blue | royal blue, blue-coloured
        purple: purple | violet, purple-coloured
        pink: pink | rosy pink, pink-coloured
        brown: brown | chocolate brown, brown-coloured
    """),
    "background": _table("""
        white: on a white background, on white paper | against plain white, with nothing but white behind it
        black: on a black background, with a black background | against plain black, with solid black behind it
        sky: in the sky | up in the clouds, in front of a cloudy sky
        sunset: at sunset, by sunset | in front of a sunset, as the sun goes down, in the evening sun
        grass: on the grass, on grass | on a lawn, in a meadow
        night: at night, by night, in the dark night | late at night, under a dark night sky
    """),
    "style": _table("""
        flat: flat illustration, simple flat illustration | clean vector graphic, flat poster
        pixel: pixel art, pixel art picture | old video game, retro pixel picture
        sketch: pencil sketch, pencil drawing | sketch in pencil, graphite drawing
        neon: neon glow, glowing neon picture | neon sign, glowing neon tube
        watercolor: watercolor painting, watercolor picture | watercolour, aquarelle
        comic: comic book, comic book drawing | comic strip, comic panel
    """),
}
"""Noun phrases without an article (background: with its preposition) of each value of each attribute."""
_UNCOUNTABLE = frozenset({"pixel art"})


def say(attribute: str, value: str, rng: random.Random, *, everyday: bool = True) -> str:
    """A phrase for a value; only in words that text encoders know unless `everyday`."""
    phrases = PHRASES[attribute][value]
    return rng.choice(phrases.everyday if everyday and rng.random() < 0.6 else phrases.plain)


def with_article(phrase: str) -> str:
    """`a` or `an` before it, or nothing before "pixel art"."""
    if phrase in _UNCOUNTABLE:
        return phrase
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def mentioned(text: str) -> dict[str, set[str]]:
    """The values of each attribute that a text speaks of, in these phrases or those of captions."""
    found: dict[str, set[str]] = {name: set() for name in ATTRIBUTES}
    for span in spans(text):
        found[span.attribute].add(span.value)
    return found


class Span(NamedTuple):
    """A piece of a text that speaks of an attribute."""

    start: int
    end: int
    attribute: str
    value: str


def spans(text: str) -> list[Span]:
    """Where a text speaks of what; of nested phrases the longest."""
    matches = _pattern().finditer(text)
    return [Span(match.start(), match.end(), *_meanings()[match[0].lower()]) for match in matches]


def in_known_words(text: str) -> bool:
    """Whether the text encoders know every word of a text as one token (`pocket.tokenizer.words`)."""
    return set(re.findall(r"[^\W_]+", text.lower())) <= set(words())


@cache
def _meanings() -> dict[str, tuple[str, str]]:
    """Phrase -> (attribute, value)."""
    meanings = {}
    for attribute, table in PHRASES.items():
        for value, phrases in table.items():
            for phrase in (*phrases.plain, *phrases.everyday):
                meanings[phrase] = (attribute, value)
    meanings |= {phrase: ("background", value) for value, phrase in BACKGROUNDS.items()}
    return meanings | {phrase: ("style", value) for value, phrase in STYLES.items()}


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(_meanings(), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)
