"""Chats for demonstrations: written, checked, compared with each other, and written anew where they fail.

ChatGen Sec. 3.1.2: several chats of a demonstration that say nearly the same add nothing, so those whose BERTScore with
another one is above 0.8 are dropped.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from align.bench.chatgen.schema import Chat, ChatTask, RolePlayer
from align.evaluation.bert_score import BertScorer

MAX_EXAMPLES = 3

Retry = Callable[[ChatTask], ChatTask]


@dataclass
class RolePlayReport:
    """What became of the chats.

    Attributes:
        asked: Chats that were planned.
        written: By generator, those that were accepted.
        problems: Chats by the check that they broke, whatever became of them later.
        examples: The first few of each.
        given_up: Chats that failed at every attempt.
    """

    asked: int = 0
    written: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    given_up: int = 0

    def count_problem(self, chat: Chat) -> None:
        """Count a chat that was not accepted."""
        assert chat.problem is not None
        self.problems[chat.problem] += 1
        examples = self.examples.setdefault(chat.problem, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{chat.task.id} by {chat.generator}: {chat.detail}"[:200])

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the counts of another report, in its JSON form."""
        self.asked += other["asked"]
        self.given_up += other["given_up"]
        self.written.update(other["written"])
        self.problems.update(other["problems"])
        for name, examples in other["examples"].items():
            kept = self.examples.setdefault(name, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "asked": self.asked,
            "written": dict(self.written),
            "problems": dict(self.problems),
            "examples": self.examples,
            "given_up": self.given_up,
        }


def write_chats(
    tasks: Sequence[ChatTask],
    player: RolePlayer,
    scorer: BertScorer,
    retry: Retry,
    *,
    duplicate_f1: float = 0.8,
    max_attempts: int = 3,
) -> tuple[list[Chat], RolePlayReport]:
    """The chats that are good, in the order of their tasks, and what became of the others.

    Args:
        tasks: Those of a demonstration one after the other.
        player: Who writes.
        scorer: BERTScore; with rescaling, the threshold is one of rescaled values.
        retry: The task with which a chat is written anew.
        duplicate_f1: F1 to an earlier chat of the same demonstration above which a chat is dropped.
        max_attempts: How often a chat is written at most.
    """
    report = RolePlayReport(asked=len(tasks))
    order = {task.id: place for place, task in enumerate(tasks)}
    accepted: dict[str, list[Chat]] = {}
    pending = list(tasks)
    for attempt in range(max_attempts):
        fresh = drop_duplicates(list(player.play(pending)), accepted, scorer, duplicate_f1)
        failed = [chat for chat in fresh if chat.problem is not None]
        for chat in failed:
            report.count_problem(chat)
        if not failed or attempt == max_attempts - 1:
            report.given_up += len(failed)
            break
        pending = [retry(chat.task) for chat in failed]
    chats = sorted((chat for group in accepted.values() for chat in group), key=lambda chat: order[chat.task.id])
    report.written.update(chat.generator for chat in chats)
    return chats, report


def drop_duplicates(
    written: list[Chat], accepted: dict[str, list[Chat]], scorer: BertScorer, duplicate_f1: float
) -> list[Chat]:
    """Add good chats to those accepted of their demonstrations; duplicates become chats with that problem.

    Args:
        written: New chats, those of a demonstration in the order of their numbers.
        accepted: By demonstration; changed.
        scorer: BERTScore.
        duplicate_f1: See `write_chats`.

    Returns:
        The chats that were written, in the same order.
    """
    good = [chat for chat in written if chat.problem is None]
    groups: dict[str, list[Chat]] = {}
    for chat in good:
        name = chat.task.demonstration.id
        groups.setdefault(name, list(accepted.get(name, []))).append(chat)
    chats = [chat for group in groups.values() for chat in group]
    place = {id(chat): index for index, chat in enumerate(chats)}
    pairs = [(a, b) for group in groups.values() for j, b in enumerate(group) for a in group[:j]]
    first, second = ([place[id(pair[side])] for pair in pairs] for side in (0, 1))
    scores = {}
    if pairs:
        f1 = scorer.embed([chat_words(chat) for chat in chats]).score(torch.tensor(first), torch.tensor(second)).f1
        scores = dict(zip(zip(first, second, strict=True), f1.tolist(), strict=True))
    result = []
    for chat in written:
        if chat.problem is None:
            group = accepted.setdefault(chat.task.demonstration.id, [])
            near = [(scores[place[id(other)], place[id(chat)]], other) for other in group]
            nearest = max(near, key=lambda pair: pair[0], default=None)
            if nearest is not None and nearest[0] > duplicate_f1:
                detail = f"BERTScore {nearest[0]:.2f} to chat {nearest[1].task.id}"
                chat = replace(chat, problem="duplicate", detail=detail)
            else:
                group.append(chat)
        result.append(chat)
    return result


def chat_words(chat: Chat) -> str:
    """All that the user says, for comparison."""
    return "\n".join(chat.texts)
