"""Which calls may be made for a request: hard constraints, which decoding then keeps to."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollouts.api import ARCHITECTURES, MAX_STEPS
from rollouts.call_grammar import CallLimits, Seconds
from rollouts.catalog import CatalogEntry
from rollouts.costs import CostModel, Line, evaluations
from rollouts.samplers import KNOWN_SAMPLERS
from rollouts.schedulers import SamplerError


class FilterError(ValueError):
    """A filter that can't be used, or that leaves nothing to call; the message names the part."""


@dataclass(frozen=True)
class CallFilter:
    """What may be called. Every part that is set must hold; the default allows everything but adult models.

    Attributes:
        base_model: Architecture, e.g. `SD 1.5`.
        type: `Checkpoint` or `LoRA`.
        license: Terms that a model's licence must have, by the catalogue's keys, each with the values that will do,
            e.g. `{"allow_commercial_use": ["Image", "Rent", "Sell"]}`. A model that does not say is left out.
        allow: Only these models.
        deny: Not these.
        nsfw: Adult models as well.
        samplers: Canonical sampler names that may be used.
        max_steps: Sampling steps.
        max_seconds: Longest estimated drawing of one picture, with everything loaded.
    """

    base_model: str | None = None
    type: str | None = None
    license: Mapping[str, Collection[str]] = field(default_factory=dict, hash=False)
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    nsfw: bool = False
    samplers: frozenset[str] | None = None
    max_steps: int = MAX_STEPS
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.base_model is not None and self.base_model not in ARCHITECTURES:
            raise FilterError(f"`base_model` must be one of {list(ARCHITECTURES)}, but is {self.base_model!r}.")
        if self.type not in (None, "Checkpoint", "LoRA"):
            raise FilterError(f"`type` must be Checkpoint or LoRA, but is {self.type!r}.")
        if self.samplers is not None and (unknown := sorted(self.samplers - KNOWN_SAMPLERS)):
            raise FilterError(f"`samplers` holds {unknown}, which are no canonical names; see docs/samplers.md.")
        if self.samplers is not None and not self.samplers:
            raise FilterError("`samplers` is empty; leave it out to allow all of them.")
        if not 1 <= self.max_steps <= MAX_STEPS:
            raise FilterError(f"`max_steps` must be 1 to {MAX_STEPS}, but is {self.max_steps}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise FilterError(f"`max_seconds` must be above 0, but is {self.max_seconds}.")

    @classmethod
    def from_dict(cls, value: Any) -> "CallFilter":
        """Of a JSON object with any of the attributes' names.

        Raises:
            FilterError: No object, an unknown name, or a value of the wrong type.
        """
        if not isinstance(value, dict):
            raise FilterError(f"`filter` must be an object, but is {type(value).__name__}.")
        if unknown := sorted(value.keys() - _READERS.keys()):
            raise FilterError(f"`filter` has no {unknown}; it may hold {', '.join(_READERS)}.")
        given = {name: item for name, item in value.items() if item is not None}
        return cls(**{name: _READERS[name](name, item) for name, item in given.items()})

    def admits(self, entry: CatalogEntry) -> bool:
        """Whether a model may be called."""
        return (
            self.base_model in (None, entry.base_model)
            and self.type in (None, entry.type)
            and (self.allow is None or entry.name in self.allow)
            and entry.name not in self.deny
            and (self.nsfw or not entry.nsfw)
            and all(_terms(entry.license.get(key)) & set(values) for key, values in self.license.items())
        )

    def check_names(self, known: Iterable[str]) -> None:
        """Raise FilterError if `allow` or `deny` name a model that the catalogue does not have."""
        names = set(known)
        for part, given in (("allow", self.allow or ()), ("deny", self.deny)):
            if missing := sorted(set(given) - names):
                raise FilterError(f"`{part}` names {missing[:5]}, which the catalogue does not have.")

    def limits(self, costs: CostModel | None) -> CallLimits:
        """The limits of parameters.

        Raises:
            FilterError: `max_seconds` without costs.
        """
        samplers = KNOWN_SAMPLERS if self.samplers is None else self.samplers
        if self.max_seconds is None:
            return CallLimits(samplers, self.max_steps)
        if costs is None:
            raise FilterError("`max_seconds` needs an estimate of what drawing costs: give the agent `costs`.")
        return CallLimits(samplers, self.max_steps, self.max_seconds, drawing_seconds(costs))


def drawing_seconds(costs: CostModel) -> Seconds:
    """What a picture costs, drawn alone with guidance, for `CallLimits`; infinite for what diffusers can't draw."""
    lines: dict[str, Line] = {}

    def seconds(entry: CatalogEntry, width: int, height: int, sampler: str, steps: int) -> float:
        line = lines.get(entry.base_model)
        if line is None:
            line = lines[entry.base_model] = costs.draw_line(entry.base_model)
        try:
            return line(evaluations(width, height, sampler, steps, guidance=True))
        except SamplerError:
            return float("inf")

    return seconds


def _terms(text: str | None) -> set[str]:
    """The values of a licence's term, which is JSON text: one value or a list of them."""
    if text is None:
        return set()
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    values = value if isinstance(value, list) else [value]
    return {item if isinstance(item, str) else json.dumps(item) for item in values}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FilterError(f"`{name}` must be text, but is {value!r:.80}.")
    return value


def _names(name: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FilterError(f"`{name}` must be a list of names, but is {value!r:.80}.")
    return frozenset(value)


def _license(name: str, value: Any) -> dict[str, frozenset[str]]:
    if not isinstance(value, dict):
        raise FilterError(f"`{name}` must be an object of terms, each with a list of values, but is {value!r:.80}.")
    return {_text(name, key): _names(f"{name}.{key}", values) for key, values in value.items()}


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FilterError(f"`{name}` must be true or false, but is {value!r:.80}.")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FilterError(f"`{name}` must be a whole number, but is {value!r:.80}.")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FilterError(f"`{name}` must be a number, but is {value!r:.80}.")
    return float(value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "base_model": _text, "type": _text, "license": _license, "allow": _names, "deny": _names, "nsfw": _flag,
    "samplers": _names, "max_steps": _count, "max_seconds": _number,
}  # fmt: skip
