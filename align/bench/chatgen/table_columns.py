"""What a file of columns may say: where in a row of somebody's table each field of ours stands.

A field of ours is given as a path into the row (`api.model`, `turns[-1].text`, `["name.with.dots"]`), as a list of
paths of which the first that the row has counts, or as `{constant: text}`, also at the end of such a list. A path on
its own must be there in one row at least, or it is taken for a typing error; those in a list need not. `$name` is what
the step `name` read in a text, and `$name.key` a part of that. `configs/chatgen/columns_*.yaml` are examples.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Split = Literal["train", "test"]
_TOKEN = re.compile(r'(?:^|\.)([^.\[\]]+)|\[(-?\d{1,6})\]|\["([^"]+)"\]')
_TESTED = ("test", "eval", "evaluation", "benchmark", "val", "validation")
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", "sft": "train", "rrhf": "train"}
_SPLITS |= dict.fromkeys(_TESTED, "test")


@dataclass
class Chats:
    """Where a chat is: a single `text`, or `turns`. What follows the last turn of the user is no part of it.

    Attributes:
        text, turns, images: Fields.
        role, content: Keys of a turn, of which the first that it has counts.
        users, assistants: Who they are.
        placeholder: What stands for a picture; where none stands, pictures come before the first message.
    """

    text: Any = None
    turns: Any = None
    role: list[str] = field(default_factory=lambda: ["role", "from"])
    content: list[str] = field(default_factory=lambda: ["content", "value"])
    users: list[str] = field(default_factory=lambda: ["user", "human"])
    assistants: list[str] = field(default_factory=lambda: ["assistant", "gpt"])
    images: Any = None
    placeholder: str = "<image>"


@dataclass
class TextStep:
    """A text to be read: an object (JSON or a Python literal), `key: value, ...`, or the named groups of a pattern."""

    text: Any
    parse: Literal["json", "infotext", "regex"]
    pattern: str | None = None


@dataclass
class Arguments:
    """Where arguments are: in an object or text with the usual names (`all`), or one by one, which counts first."""

    all: Any = None
    sampler: Any = None
    schedule: Any = None
    steps: Any = None
    cfg_scale: Any = None
    width: Any = None
    height: Any = None
    size: Any = None
    clip_skip: Any = None


@dataclass
class Columns:
    """What a file of columns may hold.

    Attributes:
        messages: A field, `Chats`, or a list of such, of which the first that a row has counts.
        arguments: A field (for `Arguments.all`) or `Arguments`.
        type, base_model, description, base_checkpoint: Of the model; the first two are needed to make a catalogue.
        source: An object like ours: demonstration, image_id, reference, turns.
        steps: `TextStep` by name; later ones may use earlier ones.
        splits: The table's names of splits -> train, test.
        few_shot_below: Demonstrations for training that make a model `supervised`, where `setting` does not say it.
        strict_arguments: Leave a row out for one bad argument, which becomes null otherwise.
    """

    messages: Any
    prompt: Any
    model: Any = None
    arguments: Any = None
    negative_prompt: Any = None
    id: Any = None
    version_id: Any = None
    model_id: Any = None
    type: Any = None
    base_model: Any = None
    description: Any = None
    base_checkpoint: Any = None
    split: Any = None
    setting: Any = None
    input_type: Any = None
    role: Any = None
    generator: Any = None
    source: Any = None
    steps: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=lambda: dict(_SPLITS))
    few_shot_below: int = 4
    strict_arguments: bool = False


NO_FIELDS = ("messages", "arguments", "steps", "splits", "few_shot_below", "strict_arguments")


class RowProblem(ValueError):
    """Why a row is left out, or a value of it null: a reason to count by, and what was there."""

    def __init__(self, reason: str, detail: Any = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, str(detail)


class Model(NamedTuple):
    """What a row says of its model."""

    name: str
    version_id: int | None
    model_id: int | None
    type: str | None = None
    base_model: str = ""
    description: str = ""
    base_checkpoint: str | None = None


class Field:
    """Where a value of ours is in their rows; `found` once a row had it."""

    def __init__(self, name: str, given: Any, steps: Iterable[str], optional: bool = False) -> None:
        self.name, self.found, self.constant = name, False, None
        self.required = isinstance(given, str) and not optional
        alternatives = given if isinstance(given, list) else [] if given is None else [given]
        if alternatives and isinstance(last := alternatives[-1], dict) and list(last) == ["constant"]:
            self.constant, alternatives = last["constant"], alternatives[:-1]
        self.paths: dict[str, list[str | int]] = {}
        for text in alternatives:
            if not isinstance(text, str) or not text or _TOKEN.sub("", text):
                raise ValueError(
                    f"`{name}` must be a path like a.b[0], a list of such or {{constant: x}}, not {text!r}."
                )
            tokens = [int(index) if index else key or quoted for key, index, quoted in _TOKEN.findall(text)]
            if (step := str(tokens[0])).startswith("$") and step[1:] not in steps:
                near = difflib.get_close_matches(step[1:], steps, n=1)
                hint = f" Did you mean `${near[0]}`?" if near else " Name it in `steps`, before it is used."
                raise ValueError(f"`{name}`: there is no step `{step}`.{hint}")
            self.paths[text] = tokens

    def values(self, row: Mapping[str, Any]) -> Iterator[Any]:
        """What the row has where the paths lead, in their order, and then the constant."""
        for tokens in self.paths.values():
            value: Any = row
            for token in tokens:
                if isinstance(token, int):
                    inside = isinstance(value, list) and -len(value) <= token < len(value)
                    value = value[token] if inside else None
                else:
                    value = value.get(token) if isinstance(value, dict) else None
            if value not in (None, "", [], {}) and value == value:  # NaN stands for nothing in some tables
                self.found = True
                yield value
        if self.constant is not None:
            yield self.constant

    def text(self, row: Mapping[str, Any]) -> str | None:
        """The first text or number, as text."""
        values = (str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in self.values(row))
        return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)
