"""The texts of all calls that may be made, as a grammar over bytes: what a policy can be held to while it writes.

    grammar = CallGrammar(catalog.of_architecture("SD 1.5"))
    state = grammar.advance(grammar.start, b'{"model": "Pixel')  # None: no call begins like this
    grammar.forced(state)  # what has to come next, up to where calls differ

In its canonical text (`APICall.to_json`) a call is a chain of slots: its beginning with the model, whose type and base
model follow from the name; width, height, sampler, steps and cfg scale; and the description, which again follows from
the name. Each slot offers a finite list of texts, none of which begins another, in the order of their bytes. So
everything that begins like this is a range of the list, and neither a catalogue nor one that is filtered for a request
needs a trie in memory. What a slot offers may depend on what was chosen before it.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rollouts.api import ARCHITECTURES, MAX_CFG, MAX_STEPS, MIN_CFG, SIZE_MULTIPLE, APICall
from rollouts.catalog import CatalogEntry
from rollouts.samplers import KNOWN_SAMPLERS

# The slots in their order, and the text between a slot and the one before it.
_MODEL, _WIDTH, _HEIGHT, _SAMPLER, _STEPS, _CFG, _DESCRIPTION, _END = range(8)
_AFTER_MODEL = '"width": '
_AFTER_WIDTH = ', "height": '
_AFTER_HEIGHT = ', "sampling method": "'
_AFTER_SAMPLER = '", "sampling steps": '
_AFTER_STEPS = ', "cfg scale": '
_AFTER_CFG = ', "model description": '

_CFG_PER_UNIT = 100  # cfg scales have two decimals at most

Seconds = Callable[[CatalogEntry, int, int, str, int], float]
"""What a picture costs: model, width and height in pixels, sampler, steps. More pixels or steps never cost less."""


class GrammarError(ValueError):
    """No call is left that could be made."""


@dataclass(frozen=True)
class CallLimits:
    """What the parameters of a call may be, within the bounds of its architecture.

    Attributes:
        samplers: Canonical names.
        max_steps: Sampling steps.
        max_seconds: Longest drawing of one picture; needs `seconds`.
        seconds: What a picture costs.
    """

    samplers: frozenset[str] = KNOWN_SAMPLERS
    max_steps: int = MAX_STEPS
    max_seconds: float | None = None
    seconds: Seconds | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.samplers) - KNOWN_SAMPLERS):
            raise ValueError(f"`samplers` holds {unknown}, which are no canonical names (rollouts.samplers).")
        if not self.samplers:
            raise ValueError("`samplers` is empty; a call needs one.")
        if not 1 <= self.max_steps <= MAX_STEPS:
            raise ValueError(f"`max_steps` must be 1 to {MAX_STEPS}, but is {self.max_steps}.")
        if self.max_seconds is not None and self.seconds is None:
            raise ValueError("`max_seconds` needs `seconds`, which says what a picture costs.")

    def affordable(self, entry: CatalogEntry, width: int, height: int, sampler: str | None, steps: int) -> bool:
        """Whether a picture can be had in time; with no sampler, by the cheapest one."""
        if self.max_seconds is None or self.seconds is None:
            return True
        samplers = self.samplers if sampler is None else (sampler,)
        return any(self.seconds(entry, width, height, name, steps) <= self.max_seconds for name in samplers)


class State(NamedTuple):
    """Where in a call a text has come to. Hashable; of one grammar, equal states allow the same continuations.

    Attributes:
        chosen: The values of the slots that are done.
        low, high: Which of the next slot's texts still fit.
        depth: How many of their bytes are written.
    """

    chosen: tuple[Any, ...]
    low: int
    high: int
    depth: int


class _Slot(NamedTuple):
    texts: list[bytes]
    values: list[Any]


class CallGrammar:
    """The canonical texts of the calls of some models.

    Args:
        entries: Models that may be called; their names are unique.
        limits: Of the parameters.
        lead: What stands before a call: white space that belongs to a dialogue's response.

    Raises:
        GrammarError: No models, or none that can be called within the limits.
    """

    def __init__(self, entries: Iterable[CatalogEntry], limits: CallLimits | None = None, lead: str = "") -> None:
        self.limits = limits or CallLimits()
        self.lead = lead
        self.entries: Mapping[str, CatalogEntry] = {entry.name: entry for entry in entries}
        if not self.entries:
            raise GrammarError("No model is left that may be called.")
        possible = [e for e in self.entries.values() if self._widths(e)]
        if not possible:
            raise GrammarError(
                f"None of {len(self.entries)} models draws a picture within {self.limits.max_seconds:g} seconds, "
                "whatever its size and steps. Allow more."
            )
        self._slots: dict[Any, _Slot] = {}
        self._slots[()] = _sorted((lead + _head(entry), entry.name) for entry in possible)

    @cached_property
    def start(self) -> State:
        """Nothing is written yet."""
        return self._enter(())

    def is_finished(self, state: State) -> bool:
        """Whether the call is complete."""
        return len(state.chosen) == _END

    def call(self, state: State) -> APICall:
        """The call that a finished state has come to."""
        name, width, height, sampler, steps, cfg = state.chosen[:_DESCRIPTION]
        call = self.entries[name].default_call().to_dict()
        return APICall.from_dict(
            call
            | {"width": width, "height": height, "sampling method": sampler, "sampling steps": steps, "cfg scale": cfg}
        )

    def chosen_model(self, state: State) -> str | None:
        """The name of the model, once it is decided."""
        if state.chosen:
            return state.chosen[_MODEL]
        return self._slots[()].values[state.low] if state.high - state.low == 1 else None

    def advance(self, state: State, data: bytes) -> State | None:
        """The state after some more bytes, or `None` if no call goes on like that."""
        while data:
            if self.is_finished(state):
                return None
            texts = self._slot(state.chosen).texts
            wanted = texts[state.low][: state.depth] + data
            # No text holds the byte FF: UTF-8 has none.
            first = bisect_left(texts, wanted, state.low, state.high)
            last = bisect_left(texts, wanted + b"\xff", first, state.high)
            if first < last:
                return self._normal(State(state.chosen, first, last, len(wanted)))
            # A text that ends within `data` comes right before it, as none begins another.
            if first == state.low or not wanted.startswith(texts[first - 1]):
                return None
            data = wanted[len(texts[first - 1]) :]
            state = self._normal(State(state.chosen, first - 1, first, len(texts[first - 1])))
        return state

    def forced(self, state: State) -> tuple[bytes, State]:
        """The bytes that every continuation has in common, and the state after them."""
        found = b""
        while not self.is_finished(state):
            texts = self._slot(state.chosen).texts
            common = _common_length(texts[state.low], texts[state.high - 1], state.depth)
            if common == state.depth:
                break
            found += texts[state.low][state.depth : common]
            state = self._normal(state._replace(depth=common))
        return found, state

    def branches(self, state: State) -> list[tuple[int, State]]:
        """The bytes that may come next, each with the state after it."""
        if self.is_finished(state):
            return []
        texts, found, low = self._slot(state.chosen).texts, [], state.low
        while low < state.high:
            begin = texts[low][: state.depth + 1]
            high = bisect_left(texts, begin + b"\xff", low, state.high)
            found.append((begin[-1], self._normal(State(state.chosen, low, high, state.depth + 1))))
            low = high
        return found

    def _enter(self, chosen: tuple[Any, ...]) -> State:
        return State(chosen, 0, 0 if len(chosen) == _END else len(self._slot(chosen).texts), 0)

    def _normal(self, state: State) -> State:
        """A state at the end of a text is the one at the beginning of the next slot."""
        slot = self._slot(state.chosen)
        if state.high - state.low == 1 and len(slot.texts[state.low]) == state.depth:
            return self._enter((*state.chosen, slot.values[state.low]))
        return state

    def _slot(self, chosen: tuple[Any, ...]) -> _Slot:
        # What a slot depends on; only with a price that is everything so far.
        key = chosen if self.limits.max_seconds is not None else self._dependence(chosen)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._make_slot(chosen)
        return slot

    def _dependence(self, chosen: tuple[Any, ...]) -> Any:
        if len(chosen) == _DESCRIPTION:
            return _DESCRIPTION, chosen[_MODEL]
        if len(chosen) in (_WIDTH, _HEIGHT):
            return len(chosen), self.entries[chosen[_MODEL]].base_model, *chosen[1:]
        return chosen if not chosen else len(chosen)

    def _make_slot(self, chosen: tuple[Any, ...]) -> _Slot:
        entry, limits = self.entries[chosen[_MODEL]], self.limits
        match len(chosen):
            case 1:
                return _sorted((f"{width}{_AFTER_WIDTH}", width) for width in self._widths(entry))
            case 2:
                sides = _SIDES[entry.base_model][chosen[_WIDTH]]
                heights = [h for h in sides if limits.affordable(entry, chosen[_WIDTH], h, None, 1)]
                return _sorted((f"{height}{_AFTER_HEIGHT}", height) for height in heights)
            case 3:
                names = [n for n in limits.samplers if limits.affordable(entry, *chosen[1:3], n, 1)]
                return _sorted((f"{name}{_AFTER_SAMPLER}", name) for name in names)
            case 4:
                steps = [n for n in range(1, limits.max_steps + 1) if limits.affordable(entry, *chosen[1:4], n)]
                return _sorted((f"{n}{_AFTER_STEPS}", n) for n in steps)
            case 5:
                return _CFG_SCALES
            case _:
                return _sorted([(f"{_json(entry.description)}}}", None)])

    def _widths(self, entry: CatalogEntry) -> list[int]:
        """The widths with which a picture can be had in time, if it is as low as possible."""
        sides = _SIDES[entry.base_model]
        return [w for w, heights in sides.items() if self.limits.affordable(entry, w, heights[0], None, 1)]


def _head(entry: CatalogEntry) -> str:
    return entry.default_call().to_json().split(_AFTER_MODEL, 1)[0] + _AFTER_MODEL


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _sorted(options: Iterable[tuple[str, Any]]) -> _Slot:
    pairs = sorted(((text.encode(), value) for text, value in options), key=lambda pair: pair[0])
    return _Slot([text for text, _ in pairs], [value for _, value in pairs])


def _common_length(first: bytes, second: bytes, start: int) -> int:
    """Up to where two texts agree that agree up to `start`."""
    if first is second:
        return len(first)
    end = min(len(first), len(second))
    return next((i for i in range(start, end) if first[i] != second[i]), end)


def _heights_by_width(name: str) -> dict[int, list[int]]:
    bounds = ARCHITECTURES[name]
    sides = range(-(-bounds.min_side // SIZE_MULTIPLE) * SIZE_MULTIPLE, bounds.max_side + 1, SIZE_MULTIPLE)
    return {width: [height for height in sides if width * height <= bounds.max_pixels] for width in sides}


_SIDES = {name: _heights_by_width(name) for name in ARCHITECTURES}
_CFG_SCALES = _sorted(
    (f"{n / _CFG_PER_UNIT:g}{_AFTER_CFG}", n / _CFG_PER_UNIT)
    for n in range(round(MIN_CFG * _CFG_PER_UNIT), round(MAX_CFG * _CFG_PER_UNIT) + 1)
)
