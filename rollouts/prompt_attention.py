"""A1111's prompt notation: `(word:1.2)`, `((word))`, `[word]`, `\\(` and BREAK.

Round brackets multiply the weight of what they enclose by 1.1, square ones divide it by 1.1, and a number before the
closing round bracket is the factor itself. Brackets that are never closed reach to the end of the prompt, and closing
ones without a partner are text (A1111's wiki, "Attention/emphasis"). `<lora:…>` tags are gone before this is read.
"""

import re
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1
_EXPLICIT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Weighted(NamedTuple):
    """A piece of a prompt and the factor of its tokens."""

    text: str
    weight: float


def parse_attention(prompt: str) -> list[list[Weighted]]:
    """Split a prompt into sections at BREAK, each a list of pieces of equal weight; an empty prompt has one section.

    Never fails: what is no notation is text.
    """
    pieces: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    position = 0
    while position < len(prompt):
        character = prompt[position]
        if character == "\\" and position + 1 < len(prompt) and prompt[position + 1] in "()[]\\":
            pieces.append((prompt[position + 1], 1.0))
            position += 2
            continue
        explicit = _EXPLICIT.match(prompt, position) if character == ":" and open_round else None
        if explicit:
            multiply(open_round.pop(), float(explicit[1]))
            position = explicit.end()
            continue
        if character == "(":
            open_round.append(len(pieces))
        elif character == "[":
            open_square.append(len(pieces))
        elif character == ")" and open_round:
            multiply(open_round.pop(), ROUND)
        elif character == "]" and open_square:
            multiply(open_square.pop(), SQUARE)
        else:
            pieces.append((character, 1.0))
        position += 1
    for start in open_round:
        multiply(start, ROUND)
    for start in open_square:
        multiply(start, SQUARE)
    return _sections(pieces)


def _sections(pieces: list[tuple[str, float]]) -> list[list[Weighted]]:
    """Join neighbours of equal weight and cut at BREAK."""
    joined: list[list[str | float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1][0] = f"{joined[-1][0]}{text}"
        else:
            joined.append([text, weight])
    sections: list[list[Weighted]] = [[]]
    for text, weight in joined:
        for number, part in enumerate(_BREAK.split(str(text))):
            if number:
                sections.append([])
            if part:
                sections[-1].append(Weighted(part, float(weight)))
    while len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing follows the last BREAK
    return sections
