"""Freestyle chats about the pocket world: its prompts in everyday words with one meaning only, and drawn references.

    player = TemplatePlayer(SceneWording())
    tasks = plan_chats(demonstrations, seed=0, per_demonstration=1, wording=SceneWording(),
                       references=DrawnReferences("references"))
    for chat in player.play(tasks):
        print(chat.texts)

Chats are planned and written by `align.bench.chatgen`. Here every prompt says a scene (`scene_of`), and all that is
said of it are phrases of `pocket.wording`, so it can be known what a chat means.
"""

import random
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from align.bench.chatgen.schema import Demonstration, Reference
from align.bench.chatgen.template_player import NothingToSay
from pocket.drawing import ATTRIBUTES, BACKGROUNDS, STYLES, Scene, draw, nearby
from pocket.wording import Wish, say, spans, with_article

_WRONG = 0.4
"""Share of the pieces of a history that are wrong at first rather than missing; the subject always is."""


def scene_of(prompt: str) -> Wish:
    """What a prompt of the pocket world asks for.

    Raises:
        NothingToSay: It speaks of nothing that can be drawn.
    """
    wish = meant(prompt)
    if not wish.said():
        raise NothingToSay(f"The prompt speaks of nothing that can be drawn: {prompt[:80]!r}.")
    return wish


def meant(text: str) -> Wish:
    """What a text says of a scene, if anything; of two values for an attribute the first."""
    return Wish(**{span.attribute: span.value for span in reversed(spans(text))})


class SceneWording:
    """Everyday words for prompts of the pocket world, each text with exactly one meaning (a `Wording`)."""

    def picture(self, prompt: str, rng: random.Random) -> str:
        """`a red cat on a lawn, like a comic strip`."""
        wish = scene_of(prompt)
        words = [say("color", wish.color, rng)] if wish.color else []
        words += [say("subject", wish.subject, rng) if wish.subject else "thing"]
        thing = with_article(" ".join(words))
        if wish.background:
            thing += f" {say('background', wish.background, rng)}"
        if not wish.style:
            return thing
        style = with_article(say("style", wish.style, rng))
        return rng.choice(
            (f"{thing}, like {style}", f"{thing} as {style}", f"{style} with {thing}", f"{style} of {thing}")
        )

    def change(self, before: str, after: str, rng: random.Random) -> str:
        """`make it red`; several changes with "and" between them."""
        old, new = scene_of(before), scene_of(after)
        changes = [_change(name, value, rng) for name, value in new.said().items() if value != getattr(old, name)]
        if not changes:
            raise NothingToSay(f"{after[:80]!r} says nothing that {before[:80]!r} does not.")
        return " and ".join(changes)

    def difference(self, reference_prompt: str, prompt: str, rng: random.Random) -> str:
        """`with a cat in it and on a lawn`."""
        shown, wish = meant(reference_prompt), scene_of(prompt)
        changes = []
        for name, value in wish.said().items():
            if value != getattr(shown, name):
                phrase = say(name, value, rng)
                forms = {"subject": f"with {with_article(phrase)} in it", "style": f"as {with_article(phrase)}"}
                changes.append(forms.get(name, phrase))
        return " and ".join(changes)

    def turns(self, prompt: str, number: int, rng: random.Random) -> tuple[str, ...]:
        """At every turn one attribute is added or put right."""
        try:
            wish = scene_of(prompt)
        except NothingToSay:
            return (prompt,)
        said = list(wish.said())
        later = rng.sample(said, max(0, min(number - 1, len(said))))
        # Nothing may be missing if otherwise the first message had nothing to ask for.
        all_wrong = len(later) == len(said) and "subject" not in said
        now: dict[str, str | None] = {}
        for name in later:
            wrong = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(wish, name)])
            missing = name != "subject" and not all_wrong and rng.random() >= _WRONG
            now[name] = None if missing else wrong
        turns = []
        for name in later:
            turns.append(prompt_of(replace(wish, **now)))
            now[name] = getattr(wish, name)
        return (*turns, prompt)


def prompt_of(wish: Wish | Scene) -> str:
    """A prompt in the community's words: `red cat, on the grass, pixel art`."""
    thing = " ".join(filter(None, (wish.color, wish.subject)))
    background, style = BACKGROUNDS.get(wish.background or ""), STYLES.get(wish.style or "")
    return ", ".join(filter(None, (thing, background, style)))


class DrawnReferences:
    """Pictures for chats to point to: drawings that differ from what is wanted in one or two attributes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __call__(self, demonstration: Demonstration, rng: random.Random) -> Reference | None:
        """A new picture, saved as PNG; None if the prompt speaks of nothing that can be drawn."""
        try:
            wish = scene_of(demonstration.prompt)
        except NothingToSay:
            return None
        scene = Scene(**{name: wish.said().get(name) or rng.choice(values) for name, values in ATTRIBUTES.items()})
        said = list(wish.said())
        for attribute in rng.sample(said, min(len(said), rng.choice((1, 1, 2)))):
            scene = nearby(scene, attribute, rng)
        seed = rng.getrandbits(32)
        name = re.sub(r"[^\w-]+", "_", demonstration.id)
        path = self.folder / f"{name}-{seed:08x}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw([scene], seed)[0]).save(path, format="PNG")
        return Reference(str(path), prompt_of(scene))


def _change(attribute: str, value: str, rng: random.Random) -> str:
    phrase = say(attribute, value, rng)
    forms = {
        "subject": (f"make it {with_article(phrase)} instead", f"change it to {with_article(phrase)}"),
        "color": (f"make it {phrase}", f"turn it {phrase}", f"colour it {phrase}"),
        "background": (f"draw it {phrase}", f"show it {phrase}"),
        "style": (f"make it look like {with_article(phrase)}", f"turn it into {with_article(phrase)}"),
    }
    return rng.choice(forms[attribute])
