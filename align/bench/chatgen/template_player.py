"""Chats by template: what everyday people write, put together from the phrases of their register. Needs no language
model, and stands in for the LLM-driven role-play of ChatGen (https://arxiv.org/abs/2411.17176, Sec. 3.1.2).

    player = TemplatePlayer(PromptWording())
    for chat in player.play(plan_chats(demonstrations, seed=0, per_demonstration=1, wording=PromptWording(), ...)):
        print(chat.texts or chat.problem)

A `Wording` says what a professional prompt shows in everyday words. The player frames that as the role would, and
takes care that no chat repeats the prompt or names the model.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Protocol

from align.bench.chatgen.checks import CHECKS
from align.bench.chatgen.roles import EMOJI, MANNERS
from align.bench.chatgen.schema import Chat, ChatTask

MOST_TRIES = 60
_CHECKS = ("names_model", "verbatim_prompt")


class NothingToSay(ValueError):
    """A prompt says nothing that can be put in everyday words: only quality words, or another script."""


class Wording(Protocol):
    """Everyday words for professional prompts. All of it is one line of plain text and decided by `rng` alone."""

    def picture(self, prompt: str, rng: random.Random) -> str:
        """A noun phrase: "a girl with long hair in a garden".

        Raises:
            NothingToSay: Nothing is left of the prompt.
        """
        ...

    def change(self, before: str, after: str, rng: random.Random) -> str:
        """What makes the picture of one prompt that of the other, as a verb phrase: "make it red".

        Raises:
            NothingToSay: They are the same in everyday words.
        """
        ...

    def difference(self, reference_prompt: str, prompt: str, rng: random.Random) -> str:
        """What is different from a picture that is shown; follows "but": "in winter". Empty where nothing is.

        Raises:
            NothingToSay: Nothing is left of the prompt.
        """
        ...

    def turns(self, prompt: str, number: int, rng: random.Random) -> tuple[str, ...]:
        """The prompts that are wanted after each of up to `number` messages. The last is `prompt`; each one before
        lacks a piece of the next or has it wrong. Only `prompt` if it can't be taken apart."""
        ...


class TemplatePlayer:
    """Plays roles by template (a `RolePlayer`). What a chat becomes depends on its task and the seed only."""

    def __init__(self, wording: Wording, seed: int = 0):
        self.wording, self.seed = wording, seed

    def play(self, tasks: Iterable[ChatTask]) -> Iterator[Chat]:
        """A chat for each task, in order; without texts and with a `problem` where none could be written:

        `nothing_to_say`: the prompt, or the step between two turns, has no everyday words. `verbatim_prompt`,
        `names_model`: every text that was tried breaks that check (`align.bench.chatgen.checks`).
        """
        for task in tasks:
            speaker = _Speaker(task, self.wording, random.Random(f"template/{self.seed}/{task.id}/{task.attempt}"))
            try:
                texts = speaker.texts()
            except _Unspeakable as error:
                yield Chat(task, (), "template", error.problem, str(error))
            else:
                yield Chat(task, texts, "template")


class _Unspeakable(Exception):
    def __init__(self, problem: str, detail: str):
        super().__init__(detail)
        self.problem = problem


class _Speaker:
    """One role in one chat: puts its habits on what it asks, and avoids what must not be said."""

    def __init__(self, task: ChatTask, wording: Wording, rng: random.Random):
        self.task, self.wording, self.rng = task, wording, rng
        self.role, self.manner = task.role, MANNERS[task.role.register]
        model = task.demonstration.model
        texts = (task.demonstration.prompt, model, model.split(" - ")[0])
        self.avoided = [words for text in texts if (words := spelt(text)).strip()]

    def texts(self) -> tuple[str, ...]:
        """A message for each target."""
        targets = self.task.targets
        asks: list[Callable[[], str]] = [partial(self._first_request, targets[0])]
        asks += [partial(self._change, before, now) for before, now in pairwise(targets)]
        try:
            return tuple(self._says(ask) for ask in asks)
        except NothingToSay as error:
            raise _Unspeakable("nothing_to_say", " ".join(str(error).split())) from error

    def _says(self, ask: Callable[[], str]) -> str:
        """The first text that gives nothing away; if there is none, the first one that breaks no check.

        A prompt like "horse" can't be asked for without repeating it, and many a model's name is an everyday word.
        """
        fair, problem = "", ("", "")
        for _ in range(MOST_TRIES):
            text = ask()
            broken = next((name for name in _CHECKS if CHECKS[name].sees(text, self.task) is not None), None)
            if broken:
                problem = (broken, text)
            elif not any(words in spelt(text) for words in self.avoided):
                return text
            else:
                fair = fair or text
        if fair:
            return fair
        raise _Unspeakable(problem[0], f"In {MOST_TRIES} tries no other was found: {problem[1]}")

    def _first_request(self, prompt: str) -> str:
        manner, wording, rng = self.manner, self.wording, self.rng
        if self.task.reference is None:
            template, phrase = rng.choice(manner.requests), self._praised(wording.picture(prompt, rng))
        elif different := wording.difference(self.task.reference.prompt, prompt, rng):
            template, phrase = rng.choice(manner.likes), different
        else:
            template, phrase = rng.choice(manner.sames), wording.picture(prompt, rng)
        return self._with_quirks(self._framed(template), phrase)

    def _change(self, before: str, now: str) -> str:
        return self._with_quirks(self.rng.choice(self.manner.changes), self.wording.change(before, now, self.rng))

    def _praised(self, picture: str) -> str:
        """`a cute red cat`: a word that says only that it should please."""
        praise = self.rng.choice(self.manner.praises)
        article, _, rest = picture.partition(" ")
        return f"{with_article(praise)} {rest}" if praise and article in ("a", "an") else picture

    def _framed(self, request: str) -> str:
        """A request with what stands before and after it."""
        manner, rng, quirks = self.manner, self.rng, self.role.quirks
        sentences = [request]
        if rng.random() < 0.5:
            purpose = self.role.purpose
            sentences.append(rng.choice(manner.purposes).format(purpose=purpose, Purpose=capital(purpose)))
        if "hedges" in quirks:
            sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(manner.hedges))
        if "greets" in quirks:
            greeting = rng.choice(manner.greetings)
            if greeting.endswith(",") and not re.match(r"I\b", sentences[0]):
                sentences[0] = sentences[0][:1].lower() + sentences[0][1:]
            sentences.insert(0, greeting)
        if "signs" in quirks:
            sentences.append(f"{rng.choice(manner.farewells)}, the {self.role.trade}.")
        elif rng.random() < 0.15:
            sentences.append(f"{rng.choice(manner.farewells)}.")
        return " ".join(sentences)

    def _with_quirks(self, template: str, phrase: str) -> str:
        rng, quirks = self.rng, self.role.quirks
        if "typos" in quirks:
            template = mistype(template, rng)
        text = _SLOT.sub(lambda slot: capital(phrase) if slot[0] == "{Phrase}" else phrase, template)
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


_SLOT = re.compile(r"\{[Pp]hrase\}")


def mistype(template: str, rng: random.Random) -> str:
    """One or two words with a letter missing, doubled or in the wrong place; never in a slot `{phrase}`, so what the
    text is about stays legible."""
    words = list(re.finditer(r"(?<!\{)\b[a-z]{4,}\b", template))
    for match in sorted(rng.sample(words, min(len(words), rng.choice((1, 2)))), key=lambda match: -match.start()):
        at = rng.randrange(match.start() + 1, match.end() - 1)
        one, two = template[at], template[at + 1]
        wrong = rng.choice((two + one, two, one + one + two) if one != two else (two, one + one + two))
        template = template[:at] + wrong + template[at + 2 :]
    return template


def spelt(text: str) -> str:
    """Its words alone, for comparison: `" a red cat "`."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def with_article(phrase: str) -> str:
    """`a` or `an` before it."""
    return f"{'an' if _SOUNDS_LIKE_VOWEL.match(phrase) else 'a'} {phrase}"


_SOUNDS_LIKE_VOWEL = re.compile(
    r"(?!uni(?!n|m)|use|usu|euro|one\b|once\b)[aeiou]|hour|honest|8|11\b|18\b", re.IGNORECASE
)


def capital(text: str) -> str:
    """With its first letter large."""
    return text[:1].upper() + text[1:]
