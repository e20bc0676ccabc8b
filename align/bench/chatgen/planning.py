"""Which chats are to be written of which demonstrations: roles, input types, and what each turn wants.

What is planned for a demonstration depends on the seed and its id only, not on the others or their order.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from align.bench.chatgen.roles import ROLES, Role
from align.bench.chatgen.schema import (
    INPUT_TYPES,
    SHARES,
    TURNS,
    ChatTask,
    Demonstration,
    InputType,
    Reference,
)
from align.bench.chatgen.template_player import Wording

References = Callable[[Demonstration, random.Random], Reference | None]
"""A picture that a chat about the demonstration can point to, if there is one."""


def plan_chats(
    demonstrations: Iterable[Demonstration],
    *,
    seed: int,
    per_demonstration: int,
    shares: Mapping[InputType, float] = SHARES,
    turns: Mapping[int, float] = TURNS,
    wording: Wording,
    references: References,
) -> Iterator[ChatTask]:
    """Chats for demonstrations, each of one demonstration by another role.

    The input type is drawn by share. Where it is not possible, because `references` has nothing or `wording` can't take
    the prompt apart, it is drawn again among the others, which is to give them its share. A demonstration for which no
    input type is possible gets no chat.

    Args:
        demonstrations: With unique ids.
        seed: Same seed, same chats.
        per_demonstration: Chats of each, at most as many as there are roles.
        shares: Of the input types; need not sum to 1.
        turns: How often a history has so many messages, 2 or more. It has fewer where the prompt has too few pieces.
        wording: Says what is wanted after each message of a history.
        references: Asked for each multimodal chat.

    Raises:
        ValueError: Unknown input type, no or a negative share, histories of fewer than 2 messages, or more chats than
            roles. Raised at once, before the first chat is asked for.
    """
    _check(shares, turns, per_demonstration)

    def tasks() -> Iterator[ChatTask]:
        for demonstration in demonstrations:
            roles = random.Random(f"roles/{seed}/{demonstration.id}").sample(ROLES, per_demonstration)
            for number, role in enumerate(roles):
                rng = random.Random(f"chat/{seed}/{demonstration.id}/{number}")
                plan = _Plan(demonstration, number, role, rng)
                if task := plan.draw(shares, turns, wording, references):
                    yield task

    return tasks()


def retry_task(task: ChatTask, *, seed: int, wording: Wording) -> ChatTask:
    """The same chat to be written again, because it was dropped.

    Role, input type and reference stay: so none of them is rarer in the data set for being harder to write, and no role
    comes twice for a demonstration. A history takes other steps where the prompt allows it. Role-players take other
    words for another attempt.
    """
    attempt = task.attempt + 1
    if task.input_type != "history":
        return replace(task, attempt=attempt)
    rng = random.Random(f"chat/{seed}/{task.id}/{attempt}")
    targets = wording.turns(task.demonstration.prompt, len(task.targets), rng)
    return replace(task, attempt=attempt, targets=targets if len(targets) > 1 else task.targets)


def _check(shares: Mapping[InputType, float], turns: Mapping[int, float], per_demonstration: int) -> None:
    if unknown := sorted(set(shares) - set(INPUT_TYPES)):
        raise ValueError(f"`shares` may hold {', '.join(INPUT_TYPES)}, but has {', '.join(unknown)}.")
    for name, weights in (("shares", shares), ("turns", turns)):
        wrong = [weight for weight in weights.values() if not (weight >= 0 and math.isfinite(weight))]
        if wrong or not sum(weights.values()) > 0:
            raise ValueError(f"`{name}` must be 0 or more and not all 0, but are {dict(weights)}.")
    if few := [number for number in turns if number < 2]:
        raise ValueError(f"A history has 2 messages or more, but `turns` has {few}.")
    if not 1 <= per_demonstration <= len(ROLES):
        raise ValueError(f"`per_demonstration` must be 1 to {len(ROLES)} roles, but is {per_demonstration}.")


class _Plan:
    """One chat before its input type is known."""

    def __init__(self, demonstration: Demonstration, number: int, role: Role, rng: random.Random):
        self.demonstration, self.number, self.role, self.rng = demonstration, number, role, rng

    def draw(
        self,
        shares: Mapping[InputType, float],
        turns: Mapping[int, float],
        wording: Wording,
        references: References,
    ) -> ChatTask | None:
        """Of the first input type drawn that is possible."""
        prompt, rng = self.demonstration.prompt, self.rng
        left = {kind: share for kind, share in shares.items() if share > 0}
        while left:
            kind = rng.choices(list(left), list(left.values()))[0]
            del left[kind]
            if kind == "single":
                return self._task(kind, (prompt,))
            if kind == "multimodal" and (reference := references(self.demonstration, rng)):
                return self._task(kind, (prompt,), reference)
            if kind == "history":
                number = rng.choices(list(turns), list(turns.values()))[0]
                if len(targets := wording.turns(prompt, number, rng)) > 1:
                    return self._task(kind, targets)
        return None

    def _task(self, kind: InputType, targets: tuple[str, ...], reference: Reference | None = None) -> ChatTask:
        return ChatTask(self.demonstration, self.number, self.role, kind, targets, reference)
