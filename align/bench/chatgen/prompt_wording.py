"""Stable Diffusion prompts in everyday words, by rule: what somebody who is no professional would say of the picture.

    PromptWording().picture("masterpiece, best quality, 1girl, solo, long hair, black hair, beach, sunset, 8k", rng)
    # "a girl with long black hair, on a beach at sunset"

A prompt is read into pieces (`align.bench.chatgen.prompt_reading`), a handful of which is put together.
"""

import random

from align.bench.chatgen.prompt_reading import Piece, prompt_tags, read_prompt, shortened
from align.bench.chatgen.prompt_vocabulary import (
    COLORS,
    DETERMINERS,
    FEMININE,
    FUNCTION,
    LIMITS,
    MASCULINE,
    OPPOSITES,
    PREPOSITIONS,
    SYNONYMS,
)
from align.bench.chatgen.template_player import NothingToSay, with_article

MOST_WORDS = 25  # of a picture
_LONG_SUBJECT, _CUT = 6, 0.25  # words; share of pictures of longer ones that leave out an ending of it


class PromptWording:
    """Everyday words for Stable Diffusion prompts (a `Wording`)."""

    def picture(self, prompt: str, rng: random.Random) -> str:
        """Subject first, a handful of what else the prompt says, at most `MOST_WORDS` words."""
        subject, pieces = read_prompt(prompt)
        subject = _cut(subject, rng) if rng.random() < _CUT else subject
        return _reword(_compose(subject, _handful(subject, pieces, rng)), rng)

    def change(self, before: str, after: str, rng: random.Random) -> str:
        """What the later prompt adds or puts right."""
        subject, new, gone = _compare(before, after)
        if not (new or gone):
            raise NothingToSay(f"In everyday words nothing differs between {before[:80]!r} and {after[:80]!r}.")
        if new and new[0].kind == "subject":
            return f"make it {new[0].phrase} instead"
        asks = [_ask_for(piece, _pronoun(subject)) for piece in new[:2]]
        return " and ".join(asks or [f"leave out {gone[0].phrase}"])

    def difference(self, reference_prompt: str, prompt: str, rng: random.Random) -> str:
        """What the prompt shows that the reference does not; all of it where the subject is another."""
        try:
            subject, new, gone = _compare(reference_prompt, prompt)
        except NothingToSay:
            return f"showing {self.picture(prompt, rng)}"  # the reference has no words of its own
        if new and new[0].kind == "subject":
            return f"showing {self.picture(prompt, rng)}"
        if not new:
            return f"without {gone[0].phrase}" if gone else ""
        return _compose("", _handful("", tuple(new), rng, most=3)).removeprefix(",").strip()

    def turns(self, prompt: str, number: int, rng: random.Random) -> tuple[str, ...]:
        """Earlier prompts are the tags without weights, one of which is missing or has another colour, time, ..."""
        try:
            _, pieces = read_prompt(prompt)
        except NothingToSay:
            return (prompt,)
        free = sorted({piece.tag for piece in pieces if piece.tag >= 0})
        later = rng.sample(free, max(0, min(number - 1, len(free))))
        tags: dict[int, str] = dict(enumerate(prompt_tags(prompt)))
        right = {position: tags[position] for position in later}
        tags |= {position: _wrong(tags[position], rng) for position in later}
        earlier = []
        for position in later:
            earlier.append(", ".join(tag for tag in tags.values() if tag))
            tags[position] = right[position]
        turns = [prompt]
        for before in reversed(earlier):
            if _is_step(before, turns[0]):
                turns.insert(0, before)
        return tuple(turns)


def _handful(subject: str, pieces: tuple[Piece, ...], rng: random.Random, most: int = 5) -> list[Piece]:
    """Some of the pieces, in their order: few of a kind, and short enough together."""
    chosen: list[Piece] = []
    most = rng.randint(min(2, most), most)
    for piece in rng.sample(pieces, len(pieces)):
        alike = [other for other in chosen if other.kind == piece.kind]
        twin = any(other.phrase.split()[-1] == piece.phrase.split()[-1] != "hair" for other in alike)
        if len(chosen) < most and len(alike) < LIMITS[piece.kind] and not twin:
            more = sorted([*chosen, piece], key=pieces.index)
            chosen = more if len(_compose(subject, more).split()) <= MOST_WORDS - 3 else chosen
    return chosen


def _compose(subject: str, pieces: list[Piece]) -> str:
    """The pieces in the order of an English phrase."""
    of = {kind: [piece.phrase for piece in pieces if piece.kind == kind] for kind in LIMITS}
    text = _with_look(subject, of["look"])
    for joint, phrases in (("with", _one_hair(of["body"])), ("wearing", of["clothes"])):
        if phrases:
            text += f"{',' if f' {joint} ' in text else ''} {joint} {_listed(phrases)}"
    text += "".join(f", {phrase}" for phrase in of["action"])
    text += "".join(f" {phrase}" for phrase in of["place"] + of["time"])
    text += f", with {_listed(of['thing'])}" if of["thing"] else ""
    return text + "".join(f", {phrase}" for phrase in of["view"] + of["style"])


def _with_look(subject: str, looks: list[str]) -> str:
    if not looks:
        return subject
    first, _, rest = subject.partition(" ")
    if subject in ("", "something", "somebody"):
        return f"{subject} {looks[0]}".strip()
    if first in ("a", "an"):
        return with_article(f"{looks[0]} {rest}")
    return f"{first} {looks[0]} {rest}" if first in DETERMINERS else subject


def _one_hair(phrases: list[str]) -> list[str]:
    """`long hair`, `black hair` -> `long black hair`."""
    loose = [phrase for phrase in phrases if phrase.endswith(" hair") and " the " not in phrase]
    hair = [phrase.removesuffix(" hair") for phrase in phrases if phrase in loose]
    words = " ".join(sorted(hair, key=lambda phrase: phrase.split()[-1] in COLORS))
    return ([f"{words} hair"] if hair else []) + [phrase for phrase in phrases if phrase not in loose]


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _cut(subject: str, rng: random.Random) -> str:
    """The subject without one of its endings: `a man in a hat on a horse` -> `a man in a hat`."""
    words = subject.split()
    ends = [at for at, word in enumerate(words) if at > 1 and word in FUNCTION - {"a", "an", "the"} | PREPOSITIONS]
    return " ".join(shortened(words[: rng.choice(ends)])) if ends and len(words) > _LONG_SUBJECT else subject


def _reword(text: str, rng: random.Random) -> str:
    """Some of its words as others would say them, so that it is not the prompt's sentence again."""
    words = [rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.4 else word for word in text.split()]
    return " ".join(
        with_article(after).split()[0] if word in ("a", "an") and after else word
        for word, after in zip(words, [*words[1:], ""], strict=True)
    )


def _compare(before: str, after: str) -> tuple[str, list[Piece], list[Piece]]:
    """The later subject, what the later prompt says beside the earlier, and what it says no more."""
    (old_subject, old), (subject, new) = read_prompt(before), read_prompt(after)
    if subject != old_subject:
        return subject, [Piece("subject", subject, -1)], []
    old_phrases, new_phrases = {piece.phrase for piece in old}, {piece.phrase for piece in new}
    gone = [piece for piece in old if piece.phrase not in new_phrases and piece.kind in ("thing", "clothes", "body")]
    return subject, [piece for piece in new if piece.phrase not in old_phrases], gone


def _is_step(before: str, after: str) -> bool:
    """Whether the later prompt says something more of the same subject."""
    try:
        _, new, _ = _compare(before, after)
    except NothingToSay:
        return False
    return bool(new) and new[0].kind != "subject"


def _ask_for(piece: Piece, whom: str) -> str:
    verbs = {"body": f"give {whom}", "clothes": f"have {whom} wear", "thing": "add", "look": f"make {whom}"}
    if piece.kind == "style":
        return f"{'make it look' if piece.phrase.startswith('like') else 'do it'} {piece.phrase}"
    place = piece.kind == "place" and not piece.phrase.startswith("with")
    return f"{'put ' + whom if place else verbs.get(piece.kind, f'show {whom}')} {piece.phrase}"


def _pronoun(subject: str) -> str:
    words = set(subject.split())
    if subject == "somebody" or " and " in subject or words & set(DETERMINERS - {"a", "an", "the"}):
        return "them"
    if words & FEMININE:
        return "her"
    return "him" if words & MASCULINE else "it"


def _wrong(tag: str, rng: random.Random) -> str:
    """The tag with another colour, length or time; often, and where it has none, nothing."""
    words = tag.lower().split()
    others = [
        (at, rng.choice(sorted(COLORS - {word})) if word in COLORS else OPPOSITES[word])
        for at, word in enumerate(words)
        if word in COLORS or word in OPPOSITES
    ]
    if not others or rng.random() < 0.5:
        return ""
    at, word = others[0]
    return " ".join([*words[:at], word, *words[at + 1 :]])
