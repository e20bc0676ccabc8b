"""What ChatGenBench is made of: demonstrations, chats, and rows of the data set (ChatGen Sec. 3.1; DESIGN 3)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from align.bench.chatgen.roles import Role

InputType = Literal["single", "multimodal", "history"]
INPUT_TYPES: tuple[InputType, ...] = get_args(InputType)
SHARES: Mapping[InputType, float] = {"single": 0.576, "multimodal": 0.271, "history": 0.153}
"""Of the input types: those of ChatGenBench's training set (ChatGen, Table 3)."""
TURNS: Mapping[int, float] = {2: 0.4, 3: 0.35, 4: 0.15, 5: 0.1}
"""How often a history has so many messages of the user; ours, the paper gives no numbers."""

ARGUMENTS = ("sampler", "steps", "cfg_scale", "width", "height", "clip_skip")
"""What a demonstration says about how its picture was made; `clip_skip` is None where its author does not say."""


@dataclass(frozen=True)
class Demonstration:
    """A picture that somebody made, and how (ChatGen Sec. 3.1.1).

    Attributes:
        id: Unique.
        prompt: The professional one.
        negative_prompt: Likewise; can be empty.
        model: Name in the catalogue.
        arguments: Values of `ARGUMENTS`.
        base_model: Architecture of the model.
        description: Of the model.
        image: Path or address of the picture, if there is one.
        source: Model, version and image ids.
    """

    id: str
    prompt: str
    negative_prompt: str
    model: str
    arguments: Mapping[str, Any]
    base_model: str = ""
    description: str = ""
    image: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """A picture that a chat points to.

    Attributes:
        image: Path or address, as it stands in the chat's image part.
        prompt: What it shows, in the words of its own prompt.
    """

    image: str
    prompt: str


@dataclass(frozen=True)
class ChatTask:
    """A chat that is to be written.

    Attributes:
        demonstration: What is wanted in the end.
        number: Of this demonstration's chats, from 0.
        role: Who asks.
        input_type: Kind of chat.
        targets: The professional prompt that is wanted after each message of the user; the last one is the
            demonstration's, and there is only that one unless the chat is a history.
        reference: The picture that a multimodal chat points to.
        attempt: How often this chat was written before and dropped.
    """

    demonstration: Demonstration
    number: int
    role: Role
    input_type: InputType
    targets: tuple[str, ...]
    reference: Reference | None = None
    attempt: int = 0

    @property
    def id(self) -> str:
        """Of the chat, whatever the attempt."""
        return f"{self.demonstration.id}/{self.number}"


@dataclass(frozen=True)
class Chat:
    """A chat that was written.

    Attributes:
        task: What was asked for.
        texts: The messages of the user, one for each target; empty if none could be had.
        generator: Who wrote it: `template`, or the name of a language model.
        problem: The name of the first check that it broke (`align.bench.chatgen.checks`), if any.
        detail: What the check saw, in one line.
    """

    task: ChatTask
    texts: tuple[str, ...]
    generator: str
    problem: str | None = None
    detail: str = ""


class RolePlayer(Protocol):
    """Writes chats as somebody who is no professional would."""

    def play(self, tasks: Iterable[ChatTask]) -> Iterator[Chat]:
        """A chat for each task, in order."""
        ...


def text_part(text: str) -> dict[str, Any]:
    """A piece of a message's content."""
    return {"type": "text", "text": text, "image": None}


def image_part(image: str) -> dict[str, Any]:
    """A picture in a message's content."""
    return {"type": "image", "text": None, "image": image}


def message(role: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """A message; its content is always a list of parts, so that every row has the same Arrow type."""
    return {"role": role, "content": [dict(part) for part in parts]}


def chat_text(messages: Sequence[Mapping[str, Any]], role: str | None = "user") -> str:
    """The text of a chat's messages, one a line; of one role, or of all with `None`."""
    return "\n".join(
        part["text"]
        for entry in messages
        if role is None or entry["role"] == role
        for part in entry["content"]
        if part["type"] == "text"
    )


def row_features() -> Any:
    """The Arrow schema of a ChatGenBench row."""
    from datasets import Features, List, Value

    text, integer, number = Value("string"), Value("int64"), Value("float64")
    return Features(
        {
            "id": text,
            "messages": List({"role": text, "content": List({"type": text, "text": text, "image": text})}),
            "input_type": text,
            "prompt": text,
            "negative_prompt": text,
            "model": text,
            "arguments": {
                "sampler": text,
                "steps": integer,
                "cfg_scale": number,
                "width": integer,
                "height": integer,
                "clip_skip": integer,
            },
            "base_model": text,
            "setting": text,
            "split": text,
            "role": text,
            "generator": text,
            "source": {
                "demonstration": text,
                "model_id": integer,
                "version_id": integer,
                "image_id": text,
                "reference": {"image": text, "prompt": text},
                "turns": List(text),
            },
        }
    )
