"""Freestyle chats by template: how people from everyday life ask for a picture that somebody made with a professional
prompt. Stands in for the LLM-driven role-play of ChatGen (https://arxiv.org/abs/2411.17176, Sec. 3.1.2).

    demonstration = Demonstration("17", scene, prompt, negative_prompt, "Pixel Wave - v10", arguments)
    for row in write_chats([demonstration], seed=0):
        print(row["messages"])

A role (`pocket.roles`) has a register, which gives the phrases, and quirks, which are done to them. A chat says what
the demonstration shows in everyday words (`pocket.wording`), so it can be known what it means; it repeats neither the
professional prompt nor the name of the model.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from pocket.drawing import ATTRIBUTES, Scene, draw, nearby
from pocket.roles import EMOJI, MANNERS, REPLIES, ROLES, Role
from pocket.wording import Wish, say, spans, wish_of, with_article

__all__ = ["ROLES", "SHARES", "Demonstration", "Reference", "Role", "draw_reference", "write_chat", "write_chats"]

InputType = Literal["single", "multimodal", "history"]
SHARES: Mapping[str, float] = {"single": 0.576, "multimodal": 0.271, "history": 0.153}
"""Of the input types: those of ChatGenBench's training set (ChatGen, Table 3)."""
_TURNS = {2: 0.4, 3: 0.35, 4: 0.15, 5: 0.1}
_MOST_TRIES = 200


@dataclass(frozen=True)
class Reference:
    """A picture that a chat points to.

    Attributes:
        image: Path or address, as it stands in the chat's image part.
        scene: What it shows.
    """

    image: str
    scene: Scene


@dataclass(frozen=True)
class Demonstration:
    """A picture that somebody made, and how (ChatGen Sec. 3.1.1).

    Attributes:
        id: Unique.
        scene: What it shows; a `Wish` if its prompt leaves something open.
        prompt: The professional one.
        negative_prompt: Likewise.
        model: Name in the catalogue.
        arguments: Sampler, steps and so on.
        setting: As in ChatGenBench: supervised or few_shot.
        split: Of the data set.
        source: Where it comes from.
        reference: For multimodal chats: a picture that shows something near it.
    """

    id: str
    scene: Scene | Wish
    prompt: str
    negative_prompt: str
    model: str
    arguments: Mapping[str, Any]
    setting: str = "supervised"
    split: str = "train"
    source: Mapping[str, Any] = field(default_factory=dict)
    reference: Reference | None = None


def write_chats(
    demonstrations: Iterable[Demonstration], seed: int, shares: Mapping[str, float] = SHARES, *,
    per_demonstration: int = 1,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Chats for demonstrations, each by another role. What one becomes does not depend on the others.

    Args:
        demonstrations: Those without a reference get no multimodal chats, but more of the other types.
        seed: Same seed, same chats.
        shares: Of the input types.
        per_demonstration: Chats of each, at most as many as there are roles.

    Yields:
        Rows of ChatGenBench (see `write_chat`).

    Raises:
        ValueError: Unknown input type, no share, or more chats than roles.
    """
    if unknown := sorted(set(shares) - set(get_args(InputType))):
        raise ValueError(f"`shares` may hold {', '.join(get_args(InputType))}, but has {', '.join(unknown)}.")
    if not 1 <= per_demonstration <= len(ROLES):
        raise ValueError(f"`per_demonstration` must be 1 to {len(ROLES)}, but is {per_demonstration}.")
    for demonstration in demonstrations:
        left = {kind: share for kind, share in shares.items() if kind != "multimodal" or demonstration.reference}
        if not sum(left.values()) > 0:
            raise ValueError(f"{demonstration.id}: `shares` {dict(shares)} leave no input type that is possible.")
        rng = random.Random(f"chats/{seed}/{demonstration.id}")
        for number, role in enumerate(rng.sample(ROLES, per_demonstration)):
            kind = rng.choices(list(left), list(left.values()))[0]
            row = write_chat(demonstration, role, kind, rng)
            yield row | {"id": f"{demonstration.id}/{number}"}


def write_chat(
    demonstration: Demonstration, role: Role, input_type: InputType | str, rng: random.Random
) -> dict[str, Any]:
    """A demonstration as a chat by one role.

    Args:
        demonstration: What is wanted in the end.
        role: Who asks.
        input_type: `single`: one message. `multimodal`: one with the reference picture and how the wanted picture
            differs from it. `history`: two to five messages with the assistant's replies between them, the last of
            which arrives at the demonstration.
        rng: Decides the words.

    Returns:
        A row of ChatGenBench. The content of a message is text, or with a picture a list of parts
        `{"type": "image", "image": ...}` and `{"type": "text", "text": ...}`. `source` holds beside the demonstration's
        own the `scene` that is wanted, `turns` with what is wanted after each message of the user (None: anything),
        and the `reference`.

    Raises:
        ValueError: Unknown input type, a multimodal chat without reference, or a prompt or model name that can't be
            avoided.
    """
    if input_type not in get_args(InputType):
        raise ValueError(f"`input_type` must be one of {', '.join(get_args(InputType))}, but is {input_type!r}.")
    wish = wish_of(demonstration.scene)
    turns = _plan_history(wish, rng) if input_type == "history" else [wish]
    speaker = _Speaker(demonstration, role, rng)
    source = dict(demonstration.source) | {"scene": vars(wish), "turns": [vars(turn) for turn in turns]}
    if input_type == "multimodal":
        reference = demonstration.reference
        if reference is None:
            raise ValueError(f"{demonstration.id}: a multimodal chat needs a `reference`; see `draw_reference`.")
        text = speaker.says(partial(_ask_for_the_like, reference, wish, role, rng))
        parts = [{"type": "image", "image": reference.image}, {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        source["reference"] = {"image": reference.image, "scene": vars(reference.scene)}
    else:
        messages = [{"role": "user", "content": speaker.says(partial(_ask, turns[0], role, rng))}]
        for before, now in zip(turns, turns[1:], strict=False):
            messages.append({"role": "assistant", "content": rng.choice(REPLIES)})
            text = speaker.says(partial(_ask_to_change, before, now, role, rng), follow_up=True)
            messages.append({"role": "user", "content": text})
    return {
        "id": demonstration.id, "messages": messages, "input_type": input_type, "prompt": demonstration.prompt,
        "negative_prompt": demonstration.negative_prompt, "model": demonstration.model,
        "arguments": dict(demonstration.arguments), "setting": demonstration.setting, "split": demonstration.split,
        "source": source, "role": role.name, "generator": "template",
    }  # fmt: skip


def draw_reference(demonstration: Demonstration, path: str | Path, rng: random.Random) -> Demonstration:
    """The demonstration with a reference: a drawing that differs in one or two of its attributes, saved as PNG.

    Args:
        demonstration: What it leaves open is chosen at random.
        path: File to write; folders are created.
        rng: Decides what differs.
    """
    wish = wish_of(demonstration.scene)
    scene = Scene(**{name: wish.said().get(name) or rng.choice(values) for name, values in ATTRIBUTES.items()})
    said = list(wish.said()) or ["subject"]
    for attribute in rng.sample(said, min(len(said), rng.choice((1, 1, 2)))):
        scene = nearby(scene, attribute, rng)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw([scene], rng.getrandbits(32))[0]).save(path, format="PNG")
    return replace(demonstration, reference=Reference(str(path), scene))


def _plan_history(wish: Wish, rng: random.Random) -> list[Wish]:
    """What is wanted after each message: at every turn one attribute is added or put right."""
    said = list(wish.said())
    if not said:
        raise ValueError("A history needs a scene of which something is said.")
    number = min(rng.choices(list(_TURNS), list(_TURNS.values()))[0], 1 + len(said))
    later = rng.sample(said, number - 1)
    now = {}
    for attribute in later:
        wrong = rng.choice([value for value in ATTRIBUTES[attribute] if value != getattr(wish, attribute)])
        now[attribute] = wrong if attribute == "subject" or rng.random() < 0.4 else None
    turns = [replace(wish, **now)]
    for attribute in later:
        turns.append(replace(turns[-1], **{attribute: getattr(wish, attribute)}))
    return turns


def _picture(wish: Wish, role: Role, rng: random.Random) -> str:
    """`a cute little red cat on a lawn, like a comic strip`."""
    size = rng.choice(MANNERS[role.register].sizes)
    words = [size] if size else []
    words += [say("color", wish.color, rng)] if wish.color else []
    words += [say("subject", wish.subject, rng) if wish.subject else "thing"]
    thing = with_article(" ".join(words))
    if wish.background:
        thing += f" {say('background', wish.background, rng)}"
    if not wish.style:
        return thing
    style = with_article(say("style", wish.style, rng))
    return rng.choice((f"{thing}, like {style}", f"{thing} as {style}", f"{style} with {thing}", f"{style} of {thing}"))


def _ask(wish: Wish, role: Role, rng: random.Random) -> str:
    return rng.choice(MANNERS[role.register].requests).format(picture=_picture(wish, role, rng))


def _ask_for_the_like(reference: Reference, wish: Wish, role: Role, rng: random.Random) -> str:
    different = [name for name, value in wish.said().items() if value != getattr(reference.scene, name)]
    changes = []
    for attribute in different or list(wish.said())[:1]:
        phrase = say(attribute, getattr(wish, attribute), rng)
        changes.append(
            {
                "subject": f"with {with_article(phrase)} in it",
                "color": phrase,
                "background": phrase,
                "style": f"as {with_article(phrase)}",
            }[attribute]
        )
    return rng.choice(MANNERS[role.register].likes).format(changes=" and ".join(changes))


def _ask_to_change(before: Wish, now: Wish, role: Role, rng: random.Random) -> str:
    (attribute,) = (name for name in ATTRIBUTES if getattr(before, name) != getattr(now, name))
    phrase = say(attribute, getattr(now, attribute), rng)
    forms = {
        "subject": (f"make it {with_article(phrase)} instead", f"change it to {with_article(phrase)}"),
        "color": (f"make it {phrase}", f"turn it {phrase}", f"colour it {phrase}"),
        "background": (f"draw it {phrase}", f"show it {phrase}"),
        "style": (f"make it look like {with_article(phrase)}", f"turn it into {with_article(phrase)}"),
    }
    change = rng.choice(forms[attribute])
    return rng.choice(MANNERS[role.register].changes).format(change=change, Change=_capital(change))


class _Speaker:
    """One role in one chat: puts its habits on what it asks, and avoids what must not be said."""

    def __init__(self, demonstration: Demonstration, role: Role, rng: random.Random):
        self.id, self.role, self.rng = demonstration.id, role, rng
        names = [demonstration.model, demonstration.model.split(" - ")[0]]
        self.forbidden = [spelt for text in (demonstration.prompt, *names) if (spelt := _spelt(text)).strip()]

    def says(self, ask: Callable[[], str], *, follow_up: bool = False) -> str:
        """A message: `ask` gives the request, which is asked for again while it says what must not be said."""
        for _ in range(_MOST_TRIES):
            text = self._with_quirks(ask() if follow_up else self._framed(ask()))
            if not any(words in _spelt(text) for words in self.forbidden):
                return text
        raise ValueError(
            f"{self.id}: in {_MOST_TRIES} tries no chat was found without its prompt or its model's name: "
            f"{[words.strip() for words in self.forbidden]}."
        )

    def _framed(self, request: str) -> str:
        """A request with what stands before and after it."""
        manner, rng, quirks = MANNERS[self.role.register], self.rng, self.role.quirks
        sentences = [request]
        if rng.random() < 0.5:
            purpose = {"purpose": self.role.purpose, "Purpose": _capital(self.role.purpose)}
            sentences.append(rng.choice(manner.purposes).format(**purpose))
        if "hedges" in quirks:
            sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(manner.hedges))
        if "greets" in quirks:
            sentences.insert(0, rng.choice(manner.greetings))
        if "signs" in quirks:
            sentences.append(f"{rng.choice(manner.farewells)}, the {self.role.trade}.")
        elif rng.random() < 0.15:
            sentences.append(f"{rng.choice(manner.farewells)}.")
        return " ".join(sentences)

    def _with_quirks(self, text: str) -> str:
        rng, quirks = self.rng, self.role.quirks
        if "typos" in quirks:
            text = _mistype(text, rng)
        if "exclaims" in quirks:
            text = re.sub(r"[.!](?= |$)", lambda _: "!" * rng.choice((1, 1, 2, 3)), text)
        if "ellipsis" in quirks:
            text = re.sub(r"\.(?= |$)", "...", text)
        if "unpunctuated" in quirks:
            text = re.sub(r"[.,!?;:]+", "", text)
        if "lowercase" in quirks:
            text = text.lower()
        if "shouting" in quirks and rng.random() < 0.6:
            text = text.upper()
        if "emoji" in quirks and rng.random() < 0.8:
            text += f" {rng.choice(EMOJI) * rng.choice((1, 1, 2))}"
        return text


def _mistype(text: str, rng: random.Random) -> str:
    """One or two words with a letter missing, doubled or in the wrong place; what the text is about stays legible."""
    taken = spans(text)
    words = [
        match
        for match in re.finditer(r"[a-z]{4,}", text)
        if not any(span.start < match.end() and match.start() < span.end for span in taken)
    ]
    for match in sorted(rng.sample(words, min(len(words), rng.choice((1, 2)))), key=lambda match: -match.start()):
        at = rng.randrange(match.start() + 1, match.end() - 1)
        one, two = text[at], text[at + 1]
        text = text[:at] + rng.choice((two + one, two, one + one + two)) + text[at + 2 :]
    return text


def _spelt(text: str) -> str:
    """Its words alone, for comparison."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
