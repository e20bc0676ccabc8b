"""What a T2I model is good for, in a line or two (DiffAgent Sec. 3.1, "Description Reconstruction").

Cards on model communities are HTML by strangers: changelogs, requests for money, settings. Here the first informative
sentences are taken, else the tags:

    for description in ExtractiveDescriber().describe(cards):
        print(description.key, description.source, description.text)

`align.bench.llm_descriptions.LLMDescriber` has an LLM rewrite the cards and is used alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from align.bench.card_sentences import informative_sentences, names_a_subject
from align.bench.plain_text import html_to_text, is_cjk, short_line, truncate

MIN_CHARS = 20  # the least room a description may be given
MAX_SENTENCES = 2
MAX_TAGS = 8
MAX_TRIGGER_WORDS = 3
_COMPLETE = re.compile(r"""[.!…。！]["'”’)」』）】]*$""")


@dataclass(frozen=True)
class ModelCard:
    """What is known about a model version. All texts are untrusted.

    Attributes:
        key: Identity of the description, for example the version id.
        name: Name of the model.
        type: "Checkpoint" or "LoRA".
        base_model: For example "SD 1.5".
        description_html: The model's card.
        version_description_html: The version's notes, often a changelog.
        tags: Tags of the model.
        trigger_words: Words that call up what a LoRA was trained on.
        sample_prompts: Prompts of sample images.
    """

    key: str
    name: str
    type: str
    base_model: str
    description_html: str | None = None
    version_description_html: str | None = None
    tags: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    sample_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """A description and where it comes from.

    Attributes:
        key: The card's key.
        text: One line of plain text, never empty.
        source: "llm:<model>" or "extractive".
        error: Why there is no LLM text although one was asked for, else None.
    """

    key: str
    text: str
    source: str
    error: str | None = None


def extractive_description(card: ModelCard, max_chars: int = 240) -> str:
    """The first informative sentences of a card, else its tags and trigger words. One line, never empty.

    Raises:
        ValueError: `max_chars` leaves no room for a description.
    """
    check_room(max_chars)
    sentences = _sentences(card)
    if not sentences:
        return truncate(_facts(card), max_chars)
    return _with_tags(_join(sentences, max_chars), card, max_chars)


def _sentences(card: ModelCard) -> list[str]:
    """Up to two sentences on what the model draws, from the version's notes only if the card has none."""
    others: list[str] = []
    for source in (card.description_html, card.version_description_html):
        found = informative_sentences(html_to_text(source))
        about = [sentence for sentence in found if names_a_subject(sentence, (card.name, *card.tags))]
        if about:
            # Cards in two languages say the same in both.
            return ([sentence for sentence in about if not is_cjk(sentence)] or about)[:MAX_SENTENCES]
        others += found
    # Tags say more than a sentence that names no subject.
    return [] if _values(card.tags) or _values(card.trigger_words) else others[:MAX_SENTENCES]


def _join(sentences: list[str], max_chars: int) -> str:
    """As many of the sentences as fit, each with its full stop; the first one is cut if it must be."""
    text = ""
    for sentence in sentences:
        sentence = sentence.rstrip(" ,;:-–—、，；：")
        if not _COMPLETE.search(sentence):
            sentence += "。" if is_cjk(sentence) else "."
        longer = f"{text} {sentence}".strip()
        if len(longer) > max_chars:
            break
        text = longer
    return text or truncate(sentences[0], max_chars)


def _with_tags(text: str, card: ModelCard, max_chars: int) -> str:
    """The text and as many of the card's tags as there is room for and it does not say itself."""
    tags = [tag for tag in _values(card.tags) if tag.casefold() not in text.casefold()][:MAX_TAGS]
    # Nothing follows a sentence that was cut.
    for count in range(len(tags), 0, -1) if _COMPLETE.search(text) else ():
        longer = f"{text} Tags: {', '.join(tags[:count])}."
        if len(longer) <= max_chars:
            return longer
    return text


def _facts(card: ModelCard) -> str:
    """What the fields of a card say, e.g. "SD 1.5 LoRA. Tags: a, b. Trigger words: x."."""
    kind = {"lora": "LoRA", "checkpoint": "checkpoint"}.get(card.type.lower(), card.type)
    what = short_line(f"{card.base_model} {kind}") or "Text-to-image model"
    fields = {"Tags": _values(card.tags)[:MAX_TAGS], "Trigger words": _values(card.trigger_words)[:MAX_TRIGGER_WORDS]}
    parts = [f"{label}: {', '.join(values)}." for label, values in fields.items() if values]
    if not parts and (name := short_line(card.name, 100)):
        return f"{what}: {name}."
    return " ".join([f"{what}.", *parts])


def _values(texts: Iterable[str]) -> list[str]:
    """Tags or trigger words as short plain texts, each once."""
    return list(dict.fromkeys(filter(None, (short_line(text, 60) for text in texts))))


def check_room(max_chars: int) -> None:
    """Raise ValueError if `max_chars` leaves no room for a description."""
    if max_chars < MIN_CHARS:
        raise ValueError(f"`max_chars` must be at least {MIN_CHARS} to hold a description, but got {max_chars}.")


class ExtractiveDescriber:
    """Descriptions taken from the cards themselves: no model, no network, always the same.

    Args:
        max_chars: The most characters a description may have.

    Raises:
        ValueError: `max_chars` leaves no room for a description.
    """

    def __init__(self, *, max_chars: int = 240) -> None:
        check_room(max_chars)
        self.max_chars = max_chars

    def describe(self, cards: Iterable[ModelCard]) -> Iterator[Description]:
        """Yield one description per card, in order."""
        for card in cards:
            yield Description(card.key, extractive_description(card, self.max_chars), "extractive")
