"""How freestyle chats and what is wanted for them are written for a policy: the one place that ChatGen's stages share.

    dialogue = ChatDialogue(tokenizer, ChatFormat.load(folder))
    dialogue.encode_chat(messages, dialogue.form.writing_task, response)  # stage 1: c' -> p (ChatGen Eq. 2)
    dialogue.encode_selection(messages, prompt)  # stage 2: c, p -> a model token comes next (Eq. 3)
    dialogue.encode_chat(messages, dialogue.form.planning_task, plan.to_json())  # Base: c -> p, m, r (Eq. 1)

A chat keeps its turns; the task stands before the first message. Pictures are named where they stand, for policies that
read text only. What does not fit into the window goes from the oldest turns first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rewards.files import write_atomically
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat

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
    """

    writing_task: str = WRITING_TASK
    planning_task: str = PLANNING_TASK
    plain: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("writing_task", str), ("planning_task", str), ("plain", bool)):
            if not isinstance(getattr(self, name), kind):
                raise DialogueError(f"`{name}` must be {kind.__name__}, but is {getattr(self, name)!r}.")

    def save(self, folder: str | Path) -> None:
        """Write `chat_dialogue.json` into a model folder."""
        write_atomically(Path(folder) / FILE_NAME, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "ChatFormat":
        """Read it; the defaults if the model was not trained by this toolkit."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DialogueError(f"{path} is not a chat format: {error}") from error


class EncodedChat(NamedTuple):
    """A chat as tokens.

    Attributes:
        input_ids: All of it.
        labels: The ids of the response with its end token, -100 elsewhere.
        dropped: Messages at the beginning that were left out to fit.
        shortened: Whether the text of the last message was cut to fit.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int
    shortened: bool


class Turn(NamedTuple):
    """A message as text: `user` or `assistant`, and what it says."""

    role: str
    text: str


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
            max_tokens: Older messages are dropped, in the end the last one is cut, to have no more than this.

        Raises:
            DialogueError: No message of the user, the response alone does not fit, or the template does not suit.
        """
        turns = read_turns(messages)
        for first in _beginnings(turns):
            prompt_ids, response_ids = self._parts(turns[first:], task, response)
            if max_tokens is None or len(prompt_ids) + len(response_ids) <= max_tokens:
                return _encoded(prompt_ids, response_ids, first, False)
        last = turns[-1]
        words = self._ids(self._defuse(last.text))
        while words:
            surplus = len(prompt_ids) + len(response_ids) - int(max_tokens or 0)
            if surplus <= 0:
                return _encoded(prompt_ids, response_ids, len(turns) - 1, True)
            words = words[:-surplus] if surplus < len(words) else []
            text = str(self.tokenizer.decode(words, clean_up_tokenization_spaces=False)).rstrip("\ufffd")
            prompt_ids, response_ids = self._parts([last._replace(text=text)], task, response)
        needed = len(prompt_ids) + len(response_ids)
        if max_tokens is not None and needed > max_tokens:
            raise DialogueError(
                f"A chat needs {needed} tokens without any of the user's text, but only {max_tokens} are allowed. "
                "Raise the limit or shorten the task."
            )
        return _encoded(prompt_ids, response_ids, len(turns) - 1, True)

    def encode_selection(self, messages: Messages, prompt: str, max_tokens: int | None = None) -> EncodedChat:
        """Chat and prompt, up to where the model token comes next (Eq. 3): what stage 1 has read and written.

        Raises:
            DialogueError: As `encode_chat` does.
        """
        found = self.encode_chat(messages, self.chat_form.writing_task, prompt, max_tokens)
        # In the place of the end of the response.
        return found._replace(input_ids=found.input_ids[:-1], labels=found.labels[:-1])

    def _parts(self, turns: Sequence[Turn], task: str, response: str | None) -> tuple[list[int], list[int]]:
        prompt = self._render_turns(turns, task, None)
        if response is None:
            return self._ids(prompt), []
        return self._ids(prompt), self._response_ids(prompt, self._render_turns(turns, task, response), response)

    def _render_turns(self, turns: Sequence[Turn], task: str, response: str | None) -> str:
        said = [turn._replace(text=self._defuse(turn.text)) for turn in turns]
        if task:
            said[0] = said[0]._replace(text=f"{task}\n\n{said[0].text}")
        if response is not None:
            said.append(Turn("assistant", self._defuse(response)))
        if self.uses_template:
            return self._apply_template([{"role": t.role, "content": t.text} for t in said], response is None)
        names = {"user": "User", "assistant": "Agent"}
        text = "\n".join(f"{names[turn.role]}: {turn.text}" for turn in said)
        return (self.tokenizer.bos_token or "") + text + ("\nAgent:" if response is None else "")


def read_turns(messages: Messages) -> list[Turn]:
    """Messages as text, beginning and ending with the user; several of one side in a row become one.

    Raises:
        DialogueError: No message of the user, or one that is none.
    """
    turns: list[Turn] = []
    for number, entry in enumerate(messages):
        role, content = entry.get("role"), entry.get("content")
        if role not in ("user", "assistant"):
            raise DialogueError(f"messages[{number}].role must be user or assistant, but is {role!r}.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise DialogueError(f"messages[{number}].content must be text or a list of parts, but is {content!r}.")
        text = "\n".join(filter(None, (PICTURE if p.get("type") == "image" else p.get("text") for p in parts)))
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n{text}")
        elif turns or role == "user":
            turns.append(Turn(role, text))
    if not turns or turns[-1].role != "user":
        raise DialogueError("A chat needs a message of the user at its end.")
    return turns


def _beginnings(turns: Sequence[Turn]) -> list[int]:
    """Where a chat may begin: at messages of the user, from the first to the last."""
    return [i for i, turn in enumerate(turns) if turn.role == "user"]


def _encoded(prompt_ids: list[int], response_ids: list[int], dropped: int, shortened: bool) -> EncodedChat:
    return EncodedChat(prompt_ids + response_ids, [-100] * len(prompt_ids) + response_ids, dropped, shortened)
