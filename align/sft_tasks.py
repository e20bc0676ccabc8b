"""What supervised fine-tuning can teach: calls for instructions (DiffAgent), plans or prompts for chats (ChatGen)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from align.bench.chatgen.schema import chat_text
from align.chat_dialogue import ChatDialogue, ChatFormat
from align.chats import Target, Unreadable, encode_chats, load_chats, pictures_folder, plan_text, split_validation
from align.pairs import encode_pairs, load_pairs, response_text
from align.picture_dialogue import PictureDialogue
from rollouts.dialogue import Dialogue, DialogueFormat

Learned = Literal["call", "plan", "prompt", "joint"]
Reader = PreTrainedTokenizerBase | ProcessorMixin
"""What comes with a policy: a tokenizer, or the processor of one that sees pictures."""


class Task(ABC):
    """Data and how it is written.

    Attributes:
        title: Of the model card.
        rows, eval_rows: Data set rows to train on and to watch the loss on.
        samples_calls: Whether sample answers are calls of the catalogue.
    """

    title: str
    rows: Any
    eval_rows: Any
    samples_calls: bool

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """What a tokenizer for this task is trained on."""

    @abstractmethod
    def dialogue(self, reader: Reader) -> Dialogue:
        """How rows are written with a tokenizer or processor."""

    @abstractmethod
    def encode(self, rows: Any, dialogue: Any, max_length: int, what: str) -> Any:
        """`input_ids` and completion-only `labels` of rows.

        Raises:
            DataError: Naming the row that can't be encoded.
        """

    def prepare(self, policy: PreTrainedModel) -> None:
        """Change the policy before rows are encoded for it."""
        return

    def finish(self, output: Path) -> None:
        """Change what was saved, on one process."""
        return


class CallTask(Task):
    """DiffAgent-SFT: instruction -> call (Eq. 1)."""

    samples_calls = True

    def __init__(self, folder: str, architecture: str, form: DialogueFormat) -> None:
        data = load_pairs(folder, architecture)
        self.rows, self.eval_rows, self._form = data["sft"], data["eval"], form
        self.title = f"DiffAgent-SFT for {architecture}"

    def texts(self) -> Iterator[str]:
        return (text for row in self.rows for text in (row["instruction"]["prompt"], response_text(row["api"])))

    def dialogue(self, reader: Reader) -> Dialogue:
        return Dialogue(cast(PreTrainedTokenizerBase, reader), self._form)

    def encode(self, rows: Any, dialogue: Any, max_length: int, what: str) -> Any:
        return encode_pairs(rows, dialogue, max_length, what=what)


class ChatTask(Task):
    """ChatGen: chat -> plan (Base, Eq. 1), or chat -> prompt (stage 1 of Evo, Eq. 2)."""

    samples_calls = False

    def __init__(self, folder: str, target: Target, form: ChatFormat, unreadable: Unreadable = "error") -> None:
        self.rows, self.eval_rows = split_validation(load_chats(folder)["train"])
        self._pictures, self._unreadable = pictures_folder(folder), unreadable
        self._target: Target = target
        self._form = form
        self.title = "ChatGen-Base" if target == "plan" else "ChatGen-Evo, stage 1 (prompt writing)"

    def texts(self) -> Iterator[str]:
        for row in self.rows:
            yield chat_text(row["messages"], None)
            yield plan_text(row)  # whatever is learned: later stages write arguments with the same tokens

    def dialogue(self, reader: Reader) -> Dialogue:
        if isinstance(reader, ProcessorMixin):
            return PictureDialogue(reader, self._form, self._pictures)
        return ChatDialogue(reader, self._form)

    def encode(self, rows: Any, dialogue: Any, max_length: int, what: str) -> Any:
        return encode_chats(rows, dialogue, self._target, max_length, what=what, unreadable=self._unreadable)
