"""How freestyle chats and what is wanted for them are written for a policy: the one place that ChatGen's stages share.

    dialogue = ChatDialogue(tokenizer, ChatFormat.load(folder))
    dialogue.encode_chat(messages, dialogue.form.writing_task, response)  # stage 1: c' -> p (ChatGen Eq. 2)
    dialogue.encode_selection(messages, prompt)  # stage 2: c, p -> a model token comes next (Eq. 3)
    dialogue.encode_chat(messages, dialogue.form.planning_task, plan.to_json())  # Base: c -> p, m, r (Eq. 1)

A chat keeps its turns; the task stands before the first message. Pictures are named where they stand, for policies that
read text only; those that see read `align.picture_dialogue`. What does not fit into the window goes from the oldest
turns first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from align.chat_pictures import LONGEST_SIDE, SHORTEST_SIDE
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat, read_form, write_form

FILE_NAME = "chat_dialogue.json"
PICTURE = "[picture]"
WRITING_TASK = "Write the prompt for a text-to-image model that draws what the user asks for."
PLANNING_TASK = (
    "Choose a text-to-image model for what the user asks for, write its prompt and set its arguments. Answer in JSON."
)

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatFormat:
    """What a policy was trained to read; saved beside its weights.

    Attributes:
        writing_task: Says what stage 1 is to do: the prefix of Eq. 2. Empty: no prefix, as in the ablation.
        planning_task: The same for Base.
        plain: Use the plain form although the tokenizer has a chat template.
        max_pictures: The newest so many pictures of a chat are seen, by policies that see; older ones are `[picture]`.
        picture_side: Larger pictures are made smaller, to so many pixels on their longest side.
        picture_options: For the policy's image processor, e.g. `max_patches` (InternVL) or `max_pixels` (Qwen-VL): what
            decides how many tokens a picture takes. Its own settings where it says nothing.
    """

    writing_task: str = WRITING_TASK
    planning_task: str = PLANNING_TASK
    plain: bool = False
    max_pictures: int = 5
    picture_side: int = LONGEST_SIDE
    picture_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"writing_task": str, "planning_task": str, "plain": bool, "max_pictures": int, "picture_side": int}
        for name, kind in (kinds | {"picture_options": Mapping}).items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
                raise DialogueError(f"`{name}` must be {kind.__name__}, but is {value!r}.")
        for name, least in (("max_pictures", 0), ("picture_side", SHORTEST_SIDE)):
            if getattr(self, name) < least:
                raise DialogueError(f"`{name}` must be at least {least}, but is {getattr(self, name)}.")

    def save(self, folder: str | Path) -> None:
        """Write `chat_dialogue.json` into a model folder."""
        write_form(Path(folder) / FILE_NAME, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "ChatFormat":
        """Read it; the defaults if the model was not trained by this toolkit."""
        return read_form(cls, Path(folder) / FILE_NAME, "a chat format")


class Picture(NamedTuple):
    """A picture in a chat.

    Attributes:
        source: As it stands in the message.
        image: RGB, of bounded size.
    """

    source: Any
    image: Image


Part = str | Picture


class EncodedChat(NamedTuple):
    """A chat as tokens.

    Attributes:
        input_ids: All of it.
        labels: The ids of the response with its end token, -100 elsewhere.
        dropped: Messages at the beginning that were left out to fit.
        shortened: Whether the text of the last message was cut to fit.
        pictures: Those that `input_ids` has places for, in order.
        notes: What became of the others.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int
    shortened: bool
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()


class Turn(NamedTuple):
    """A message as text: `user` or `assistant`, and what it says."""

    role: str
    text: str


class PartedTurn(NamedTuple):
    """A message with its pictures; between two texts there is always one."""

    role: str
    parts: tuple[Part, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """In order."""
        return tuple(part for part in self.parts if isinstance(part, Picture))

    def with_text(self, index: int, text: str) -> "PartedTurn":
        """The same with another text in the place of a part."""
        return parted(self.role, [*self.parts[:index], text, *self.parts[index + 1 :]])

    def without_oldest_picture(self) -> "PartedTurn":
        """The same with `[picture]` in the place of the first picture."""
        return self.with_text(next(i for i, part in enumerate(self.parts) if isinstance(part, Picture)), PICTURE)


class ChatDialogue(Dialogue):
    """Writes chats for one tokenizer; text of users is never trusted (see `rollouts.dialogue.Dialogue`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: ChatFormat | None = None) -> None:
        self.chat_form = form or ChatFormat()
        super().__init__(tokenizer, DialogueFormat(plain=self.chat_form.plain))

    def save_form(self, folder: str | Path) -> None:
        """Keep the format with a policy's weights."""
        self.chat_form.save(folder)

    def encode_chat(
        self, messages: Messages, task: str, response: str | None = None, max_tokens: int | None = None
    ) -> EncodedChat:
        """A chat with its task, and the response that is to be learned.

        Args:
            messages: Of ChatGenBench; the last one is the user's.
            task: Stands before the first message; can be empty.
            response: Always kept whole; `None`: the tokens up to where it begins.
            max_tokens: To have no more than this, messages are dropped from the oldest on, with their pictures; then
                all pictures of the last message but the newest; then the end of its text; then its last picture.

        Raises:
            DialogueError: No message of the user, the response alone does not fit, or the template does not suit.
        """
        turns, notes = self.read(messages)
        limit = float("inf") if max_tokens is None else max_tokens
        for first in _beginnings(turns):
            found = self._written(turns[first:], task, response, notes)._replace(dropped=first)
            if len(found.input_ids) <= limit:
                return found
        last = turns[-1]
        while len(last.pictures) > 1:
            last = last.without_oldest_picture()
            found = self._written([last], task, response, notes)
            if len(found.input_ids) <= limit:
                return self._noted(found, turns[-1])._replace(dropped=len(turns) - 1)
        for whole in [last, last.without_oldest_picture()] if last.pictures else [last]:
            found = self._cut_to_fit(whole, task, response, limit, notes)
            if len(found.input_ids) <= limit:
                return self._noted(found, turns[-1])._replace(dropped=len(turns) - 1)
        raise DialogueError(
            f"A chat needs {len(found.input_ids)} tokens without any of the user's text, but only {max_tokens} are "
            "allowed. Raise the limit or shorten the task."
        )

    def encode_selection(self, messages: Messages, prompt: str, max_tokens: int | None = None) -> EncodedChat:
        """Chat and prompt, up to where the model token comes next (Eq. 3): what stage 1 has read and written.

        Raises:
            DialogueError: As `encode_chat` does.
        """
        found = self.encode_chat(messages, self.chat_form.writing_task, prompt, max_tokens)
        # In the place of the end of the response.
        return found._replace(input_ids=found.input_ids[:-1], labels=found.labels[:-1])

    def open_chat(self, messages: Messages) -> tuple[Messages, tuple[str, ...]]:
        """A chat that can be read again without opening files, and what was put right; see `PictureDialogue`."""
        return messages, ()

    def read(self, messages: Messages) -> tuple[list[PartedTurn], tuple[str, ...]]:
        """The turns of a chat as the policy will see them, and what was put right.

        Raises:
            DialogueError: See `read_turns`.
        """
        return [parted(role, [text]) for role, text in read_turns(messages)], ()

    def _cut_to_fit(
        self, last: PartedTurn, task: str, response: str | None, limit: float, notes: tuple[str, ...]
    ) -> EncodedChat:
        """The last message with as much of its text as fits, cut at its end; with none, if that is not enough."""
        found = self._written([last], task, response, notes)
        shortened = False
        for index in reversed(range(len(last.parts))):
            part = last.parts[index]
            words = self._ids(self._defuse(part)) if isinstance(part, str) else []
            while words and len(found.input_ids) > limit:
                surplus = int(len(found.input_ids) - limit)
                words = words[:-surplus] if surplus < len(words) else []
                text = str(self.tokenizer.decode(words, clean_up_tokenization_spaces=False)).rstrip("\ufffd")
                shorter = PartedTurn(last.role, (*last.parts[:index], text, *last.parts[index + 1 :]))
                found, shortened = self._written([shorter], task, response, notes), True
                kept = shorter
            if shortened:
                last = kept
        return found._replace(shortened=shortened)

    def _noted(self, found: EncodedChat, turn: PartedTurn) -> EncodedChat:
        """With a note of how many pictures of the last message had no room."""
        missing = len(turn.pictures) - len(found.pictures)
        return found._replace(notes=(*found.notes, f"pictures_as_text: {missing}")) if missing else found

    def _written(
        self, turns: Sequence[PartedTurn], task: str, response: str | None, notes: tuple[str, ...]
    ) -> EncodedChat:
        """Turns as tokens, all of them."""
        prompt = self._render_turns(turns, task, None)
        response_ids = []
        if response is not None:
            response_ids = self._response_ids(prompt, self._render_turns(turns, task, response), response)
        pictures = tuple(picture for turn in turns for picture in turn.pictures)
        prompt_ids = self._prompt_ids(prompt, pictures)
        labels = [-100] * len(prompt_ids) + response_ids
        return EncodedChat(prompt_ids + response_ids, labels, 0, False, pictures, notes)

    def _prompt_ids(self, prompt: str, pictures: Sequence[Picture]) -> list[int]:
        return self._ids(prompt)

    def _render_turns(self, turns: Sequence[PartedTurn], task: str, response: str | None) -> str:
        said = [PartedTurn(turn.role, tuple(self._defused(part) for part in turn.parts)) for turn in turns]
        if task:
            first, *rest = said[0].parts or ("",)
            beginning = (f"{task}\n\n{first}",) if isinstance(first, str) else (f"{task}\n\n", first)
            said[0] = PartedTurn(said[0].role, (*beginning, *rest))
        if response is not None:
            said.append(PartedTurn("assistant", (self._defuse(response),)))
        if self.uses_template:
            messages = [{"role": turn.role, "content": self._content(turn.parts)} for turn in said]
            return self._apply_template(messages, response is None)
        names = {"user": "User", "assistant": "Agent"}
        text = "\n".join(f"{names[turn.role]}: {self._plain_text(turn.parts)}" for turn in said)
        return (self.tokenizer.bos_token or "") + text + ("\nAgent:" if response is None else "")

    def _defused(self, part: Part) -> Part:
        return self._defuse(part) if isinstance(part, str) else part

    def _content(self, parts: Sequence[Part]) -> Any:
        """A message as the template takes it."""
        return self._plain_text(parts)

    def _plain_text(self, parts: Sequence[Part]) -> str:
        return "\n".join(part for part in parts if isinstance(part, str))


def read_turns(messages: Messages) -> list[Turn]:
    """Messages as text, beginning and ending with the user; several of one side in a row become one.

    Raises:
        DialogueError: No message of the user, or one that is none.
    """
    turns = read_parts(messages)
    return [
        Turn(role, "\n".join(part if isinstance(part, str) else PICTURE for part in parts)) for role, parts in turns
    ]


def read_parts(messages: Messages) -> list[tuple[str, list[Any]]]:
    """Roles and what they say, beginning and ending with the user; several messages of one side in a row become one.

    Returns:
        For each turn its role, and its parts: text, or `{"image": source}`.

    Raises:
        DialogueError: No message of the user, or one that is none.
    """
    turns: list[tuple[str, list[Any]]] = []
    for number, entry in enumerate(messages):
        role, content = entry.get("role"), entry.get("content")
        if role not in ("user", "assistant"):
            raise DialogueError(f"messages[{number}].role must be user or assistant, but is {role!r}.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise DialogueError(f"messages[{number}].content must be text or a list of parts, but is {content!r}.")
        said = [_part(part, f"messages[{number}].content[{index}]") for index, part in enumerate(parts)]
        said = [part for part in said if part] or [""]
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(said)
        elif turns or role == "user":
            turns.append((role, said))
    if not turns or turns[-1][0] != "user":
        raise DialogueError("A chat needs a message of the user at its end.")
    return turns


def parted(role: str, parts: Sequence[Part]) -> PartedTurn:
    """A turn in which texts that follow each other have become one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]}\n{part}"
        else:
            joined.append(part)
    return PartedTurn(role, tuple(joined))


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"image": part.get("image")}
    if kind == "text" and isinstance(part.get("text"), str | None):
        return part.get("text") or ""
    raise DialogueError(f"{where} must be a part of the type text or image, but is {str(part)[:200]}.")


def _beginnings(turns: Sequence[PartedTurn]) -> list[int]:
    """Where a chat may begin: at messages of the user, from the first to the last."""
    return [i for i, turn in enumerate(turns) if turn.role == "user"]
