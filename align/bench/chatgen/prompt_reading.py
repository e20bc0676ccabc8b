"""A Stable Diffusion prompt read into pieces that everyday words can be made of (`align.bench.chatgen.prompt_wording`).

A prompt is cut into tags. Tags about quality, cameras, artists and notation are dropped, the others get a kind and a
phrase from the tables of `align.bench.chatgen.prompt_vocabulary`. A tag that no table knows can be the subject, and is
dropped otherwise, so that what is said reads like English.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from align.bench.chatgen.prompt_vocabulary import (
    ADVERBS,
    ANIMALS_AND_THINGS,
    BODY,
    CLOTHES,
    COLORS,
    COUNTABLE,
    DETERMINERS,
    DROPPED,
    FUNCTION,
    IN_A_PHRASE,
    ING_NOUNS,
    JOINTS,
    KNOWN,
    LIMITS,
    LOOKS,
    NUMBERS,
    PEOPLE,
    PLACES,
    PLAIN,
    PLURALS,
    POSES,
    PREPOSITIONS,
    QUALITY,
    SEXES,
    STRIPPED,
    STYLES,
    TAGS,
    TECHNICAL,
    TRANSITIVE,
    UNCOUNTABLE,
    VAGUE,
)
from align.bench.chatgen.template_player import NothingToSay, with_article

_LONGEST_WORD = 30  # letters
_MOST_LETTERS, _MOST_SUBJECT_WORDS = 4_000, 14  # that are read of a prompt; of what is in the middle of a picture


@dataclass(frozen=True)
class Piece:
    """Something that a prompt says.

    Attributes:
        kind: A key of `LIMITS`.
        phrase: In everyday words.
        tag: Its position in `prompt_tags`; -1 in the tag of the subject.
    """

    kind: str
    phrase: str
    tag: int


_NOTATION = (  # every quantifier is bounded or over what can't start a match: linear in the prompt
    (
        re.compile(
            r"<[^<>]{0,200}>|\b[^\W_]{1,40}_v\d[\w.]{0,20}|\bembedding:\S{1,80}|\b(?:BREAK|AND|ADDROW|ADDCOL)\b"
        ),
        ", ",
    ),
    (re.compile(r"\\\([^()\\]{0,80}\\\)|:\s{0,3}-?\d{1,4}(?:\.\d{1,4})?"), " "),
    (re.compile(r"(?<=\d)[\s-]?(?:y\.?\s?o\b\.?|years?[\s-]old)", re.IGNORECASE), " year old"),
    (re.compile(r"(?<=\b[A-Z])\.(?= )"), " "),
    (re.compile(r"-style\b", re.IGNORECASE), " style"),
    (re.compile(r"[\[\]{}()<>*#~^=+\\/@&%$_`\"“”]"), " "),
)
_BREAKS = re.compile(r"[,;\n\r|!?:。，、]|\.(?=\s|$)| -+ ")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_BY_ARTIST = re.compile(
    r"\b(?:in )?(?:the )?style of .*"
    r"|(?:\b(?:art|artwork|painted|drawn|style|photo|made) )?\bby (?!(?:the|a|an|his|her|night|day|sea)\b).*"
)
_MEDIUM = re.compile(
    r"(?:(?:a|an|the) )?(?P<medium>(?:\S+ ){0,7}?(?:photo|photograph|photography|portrait|painting|drawing|sketch|"
    r"selfie|illustration|picture|image|render|rendering|close-up|closeup|shot|view|icon|art|artwork|poster|depiction|"
    r"scene)) (?:of|showing|depicting|featuring) (?P<rest>.+)"
)
_ONSET = re.compile(
    r"(?:[bcfgkp]l|[bcdfgkpt]r|[cpstwgk]h|s[cklmnpqtw]|s[cpt][rl]|sch|shr|thr|phr|chr|squ|qu|kn|gn|wr|dw|tw|ps|y|"
    r"[bcdfghjklmnpqrstvwxz])?[aeiouy]"
)


@lru_cache(maxsize=4096)
def prompt_tags(prompt: str) -> tuple[str, ...]:
    """The pieces of a prompt without notation, artists and words that nobody speaks; a name keeps its capitals."""
    text = unicodedata.normalize("NFKC", prompt[:_MOST_LETTERS])
    for pattern, instead in _NOTATION:
        text = pattern.sub(instead, text)
    tags = []
    for part in _BREAKS.split(text):
        if any(letter.isalpha() and ord(letter) > 0x17F for letter in part):
            continue
        words = [said for word in _WORD.findall(part) for said in _spoken(word)]
        tag = " ".join(words)
        tag = tag if tag.istitle() and len(words) <= 3 else tag.lower()
        if tag := _BY_ARTIST.sub("", tag).strip():
            tags.append(tag)
    return tuple(tags)


def _spoken(word: str) -> list[str]:
    """`1girl` -> a girl; nothing for trigger words like `nvinkPunk`, `v1` or `mksks`."""
    number = re.fullmatch(r"(\d{1,2})([a-z]*)", word.lower())
    if number and (number[2] in PEOPLE or not number[2]) and (said := NUMBERS.get(number[1], number[1])):
        plural = "s" if number[1] != "1" and number[2] and not number[2].endswith("s") else ""
        return [said, number[2] + plural] if number[2] else [said]
    lower = word.lower()
    if lower in QUALITY or lower in TECHNICAL:
        return [word]
    strange = re.search(
        r"\d|.[bcdfghjklmnpqrtvwxz]ai$|[a-z][A-Z]|[A-Z]{2}[a-z]|[bcdfghjklmnpqrstvwxz]{5}", word
    ) or not _ONSET.match(lower)
    return [] if strange or len(word) > _LONGEST_WORD or (len(word) == 1 and lower not in "ai") else [word]


@lru_cache(maxsize=4096)
def read_prompt(prompt: str) -> tuple[str, tuple[Piece, ...]]:
    """What the picture is of, and what else is said about it."""
    found = [
        (kind, phrase, position) for position, tag in enumerate(prompt_tags(prompt)) for kind, phrase in _classify(tag)
    ]
    subject, position = _subject(found)
    pieces: dict[str, Piece] = {}
    for kind, phrase, at in found:
        new = not any(len(word) > 3 and word in subject for word in phrase.split())
        if kind in LIMITS and new and (at != position or kind == "style"):
            pieces.setdefault(phrase, Piece(kind, phrase, at if at != position else -1))
    return subject, tuple(pieces.values())


def _subject(found: list[tuple[str, str, int]]) -> tuple[str, int]:
    """The first person, else the first thing that is named; and the position of its tag."""
    kinds = {kind for kind, _, _ in found}
    people = [(phrase, at) for kind, phrase, at in found if kind in ("person", "sentence")]
    if people:
        (first, at), *others = people
        more = [other for other, _ in others if first.count(" ") == 1 and other.count(" ") > 1]
        pair = [other for other, _ in others if {first, other} == {"a girl", "a boy"}]
        return (f"{first} and {pair[0]}" if pair else more[0] if more else first), at
    worn = bool(kinds & {"body", "clothes", "action", "look"})
    for kind, phrase, at in found:
        if kind == "name" or (kind in ("unknown", "thing") and not worn):
            return phrase, at
        if kind == "place" and not worn and (place := re.fullmatch(r"(?:in|on|at) (an? .+)", phrase)):
            return place[1], at
    if kinds & {"body", "clothes", "action"}:
        return "somebody", -1
    for kind, phrase, at in found:
        if kind in ("unknown", "thing"):
            return phrase, at
    if kinds & set(LIMITS):
        return "something" if kinds == {"look"} else "a scene", -1
    raise NothingToSay("The prompt says nothing that can be put in everyday words.")


def _classify(tag: str) -> list[tuple[str, str]]:
    """Kind and phrase of a tag; two for "a painting of a cat", none if it is not worth saying."""
    lower = tag.lower()
    if medium := _MEDIUM.fullmatch(lower):
        style = _known(medium["medium"]) or _known(medium["medium"].split()[-1])
        return style + (_known(medium["rest"]) or _unknown(medium["rest"]))
    return _known(lower) or _unknown(tag)


def _known(tag: str) -> list[tuple[str, str]]:
    return [(kind, table[tag]) for kind, table in TAGS.items() if tag in table][:1]


def _unknown(tag: str) -> list[tuple[str, str]]:
    """Of a tag that is in no table, what is not about quality or technique."""
    lower = tag.lower()
    words = lower.split()
    if words != ["beautiful"] and all(word in QUALITY or word in VAGUE or word == "beautiful" for word in words):
        return []
    words = [word for word, after in pairwise([*words, ""]) if word not in STRIPPED and not _is_verb(word, after)]
    words = [IN_A_PHRASE.get(word, word) for word in words]
    if "-".join(words) in DROPPED or all(word in DETERMINERS or word.isdigit() for word in words):
        return []
    technical = next((at for at, word in enumerate(words) if word in TECHNICAL), len(words))
    if technical < len(words) and len(words) <= 6:
        return []
    words = shortened(words[:technical])
    if tag != lower and len(words) <= 3 and not set(words) & KNOWN:
        return [("name", tag)]
    if words[1:2] and words[1] in ("a", "an") and words[0] not in PREPOSITIONS | FUNCTION:
        words = words[1:]
    return [_by_words(words)] if words else []


def _is_verb(word: str, after: str) -> bool:
    """The `is` of "the girl is reading", which is "the girl reading" in a phrase."""
    return word in ("is", "are") and after.endswith("ing")


def _by_words(words: list[str]) -> tuple[str, str]:
    """Kind and phrase of a tag that is in no table, by its first word and its head."""
    text, first, last, head = " ".join(words), words[0], words[-1], _head(words)
    if first in ("wearing", "dressed", "wears") and len(words) > 1:
        return "clothes", _noun(words[2:] if words[1] in ("in", "as") and len(words) > 2 else words[1:])
    if first == "with" and len(words) > 1:
        return ("body" if last in BODY else "thing"), _noun(words[1:])
    if first in PREPOSITIONS and len(words) > 1:
        return ("clothes", _noun(words[1:])) if first == "in" and last in CLOTHES else ("place", _after(words))
    if last == "background" and len(words) > 1:
        return "place", _background(shortened(words[:-1]))
    if first in TRANSITIVE and len(words) > 1 and words[1] not in ADVERBS:
        return "action", f"{first} {_noun(words[1:])}"
    if text in POSES or (first.endswith("ing") and words[1:] and words[1] in FUNCTION | PREPOSITIONS | ADVERBS):
        return "action", " ".join(_with_inner_articles(words))
    if all(word in LOOKS for word in words):
        return "look", first
    if head in PEOPLE:
        words = [SEXES.get(word, word) if word == head else word for word in words[first == "the" :]]
        return "person", _noun(words)
    long = len(words) > 5
    for kind, heads in (("body", BODY), ("clothes", CLOTHES), ("thing", ANIMALS_AND_THINGS)):
        if head in heads and not long and (kind != "thing" or len(words) <= 4):
            return kind, _noun(words)
    if head in PLACES and not long:
        return "place", f"{PLACES[head]} {_noun(words)}"
    if last == "style":
        if STYLES & set(words):
            return "style", f"in {text}"
        return _by_words(words[:-2]) if len(words) > 3 else ("", "")  # of a trigger word: "blue shark xyz style"
    return ("sentence" if first in DETERMINERS and len(words) > 2 else "unknown"), _noun(words)


def _background(words: list[str]) -> str:
    if not words or words[-1] in COLORS | LOOKS | PLAIN or re.search(r"(?:al|ed|ic|ous|ful|punk|ive)$", words[-1]):
        return f"on {_noun([*words, 'background'])}"
    return f"with {_noun(words)} in the background"


def _after(words: list[str]) -> str:
    """A place with its preposition and an article: `in server room` -> `in a server room`."""
    bare = words[0] == "surrounded" or (len(words) == 2 and words[1] not in COUNTABLE)  # in winter, on fire
    return " ".join(words) if bare else f"{words[0]} {_noun(words[1:])}"


def _head(words: list[str]) -> str:
    """The noun that a phrase is about: its last word before a preposition, a verb or the like."""
    for before, word in zip(words, words[1:], strict=False):
        verb = (word.endswith("ing") and word not in ING_NOUNS) or (word.endswith("ed") and before in PEOPLE)
        if verb or word in FUNCTION or word in PREPOSITIONS:
            return before
    return words[-1]


def _noun(words: list[str]) -> str:
    """With an article, unless it has one, is many, or can't be counted."""
    if not words:
        return ""
    words = words[1:] if words[0] == "one" and words[1:] else words
    head, words = _head(words), _with_inner_articles(words)
    many = head in PLURALS or (head.endswith("s") and not head.endswith(("ss", "us", "is")))
    counted = words[0].isdigit() and "year" not in words[1:2]
    bare = words[0] in DETERMINERS or counted or many or head in UNCOUNTABLE
    return " ".join(words) if bare else with_article(" ".join(words))


def _with_inner_articles(words: list[str]) -> list[str]:
    """`man in hat` -> `man in a hat`, of nouns that are known to be countable."""
    for at in range(len(words) - 2, 0, -1):
        if words[at] in JOINTS and words[at + 1] not in FUNCTION | DETERMINERS | PREPOSITIONS:
            rest = words[at + 1 :]
            end = next((i for i, word in enumerate(rest) if word in FUNCTION | PREPOSITIONS), len(rest))
            if rest[end - 1] in COUNTABLE:
                words = [*words[: at + 1], *_noun(rest[:end]).split(), *rest[end:]]
    return words


def shortened(words: list[str]) -> list[str]:
    """At most so many words that they still are a phrase, without joints at its ends."""
    if len(words) > _MOST_SUBJECT_WORDS:
        words = words[:_MOST_SUBJECT_WORDS]
        ends = [at for at, word in enumerate(words) if at > 3 and word in FUNCTION | PREPOSITIONS]
        words = words[: ends[-1]] if ends else words
    while words and words[-1] in FUNCTION | PREPOSITIONS:
        words = words[:-1]
    while words and words[0] in ("and", "or", "of", "is", "that", "which", "where", "but", "as"):
        words = words[1:]
    return words
