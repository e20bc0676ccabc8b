"""Examples for in-context learning: D(m), what each model was used with in the training split (ChatGen Eq. 5)."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.bench.chatgen.schema import ARGUMENTS
from rollouts.samplers import KNOWN_SAMPLERS

Order = Literal["similar", "random"]


@dataclass(frozen=True)
class Shown:
    """A demonstration that a policy is shown.

    Attributes:
        id: Of the demonstration.
        prompt, negative_prompt: What was drawn.
        arguments: How.
    """

    id: str
    prompt: str
    negative_prompt: str
    arguments: Mapping[str, Any]


class ShownExamples:
    """Demonstrations by model; only of the training split, each once however many chats it has.

    Args:
        rows: ChatGenBench rows of the training split.
        order: `similar`: those whose prompts share most words with the new one come last, next to it. `random`: as in
            the paper.
        seed: Of the random order.

    Attributes:
        samplers: Canonical names that demonstrations of any model were drawn with.

    Raises:
        ValueError: A row of another split.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], order: Order = "similar", seed: int = 0) -> None:
        self._order, self._seed = order, seed
        self._by_model: defaultdict[str, dict[str, Shown]] = defaultdict(dict)
        for row in rows:
            if row["split"] != "train":
                raise ValueError(f"Row {row['id']!r} is of the split {row['split']!r}; only `train` may be shown.")
            name = row["source"]["demonstration"]
            shown = Shown(name, row["prompt"], row["negative_prompt"], row["arguments"])
            self._by_model[row["model"]].setdefault(name, shown)
        everything = [shown for of_model in self._by_model.values() for shown in of_model.values()]
        self.samplers = KNOWN_SAMPLERS & {shown.arguments.get("sampler") for shown in everything}

    def of(self, model: str, prompt: str, count: int, *, without: str | None = None) -> list[Shown]:
        """Up to `count` demonstrations of a model, the best one last.

        Args:
            model: Name in the catalogue.
            prompt: What is to be drawn.
            count: At most.
            without: A demonstration that must not be shown, because it is the one that is asked for.
        """
        known = [shown for shown in self._by_model.get(model, {}).values() if shown.id != without]
        if self._order == "random":
            random.Random(f"{self._seed}/{model}/{prompt}").shuffle(known)
            return known[:count]
        words = set(prompt.lower().split())
        known.sort(key=lambda shown: (-_overlap(words, set(shown.prompt.lower().split())), shown.id))
        return known[:count][::-1]


def usual_arguments(shown: Sequence[Shown]) -> dict[str, Any]:
    """Of each argument the most frequent value, of equally frequent ones the last; None where nobody gives one."""
    return {name: usual([item.arguments.get(name) for item in shown]) for name in ARGUMENTS}


def usual(values: Sequence[Any]) -> Any:
    """The most frequent value that is not None; of equally frequent ones the last."""
    counts = Counter(value for value in values if value is not None)
    return max(counts, key=lambda value: (counts[value], _last(values, value)), default=None)


def _last(values: Sequence[Any], value: Any) -> int:
    return max(i for i, other in enumerate(values) if other == value)


def _overlap(first: set[str], second: set[str]) -> float:
    return len(first & second) / max(1, len(first | second))
