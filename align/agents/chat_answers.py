"""What the agents of ChatGen share: chats with open pictures, and what a policy writes after a task."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.chat_dialogue import PICTURE, ChatDialogue, EncodedChat, Messages, read_turns
from align.picture_dialogue import PictureDialogue
from rollouts.responses import MoreInputs, answer_prompts


class OpenChat(NamedTuple):
    """A chat that is read without touching a file again.

    Attributes:
        messages: With pictures for a policy that sees.
        said: The text of the last message, without pictures.
        notes: What became of pictures that are not seen.
    """

    messages: Messages
    said: str
    notes: tuple[str, ...]


class ChatAnswer(NamedTuple):
    """What a policy wrote.

    Attributes:
        text: Without control tokens.
        notes: What was left out of the chat.
        finished: Whether it ended by itself rather than at the token limit.
        seconds: Wall time, its share of the batch's.
    """

    text: str
    notes: tuple[str, ...]
    finished: bool
    seconds: float


def open_chats(dialogue: ChatDialogue, chats: Sequence[Messages]) -> list[OpenChat]:
    """Read chats; a picture that can't be opened is noted.

    Raises:
        DialogueError: A chat that is none.
    """
    opened = [dialogue.open_chat(chat) for chat in chats]
    said = [read_turns(messages)[-1].text.replace(PICTURE, "").strip() for messages, _ in opened]
    return [OpenChat(messages, text, notes) for text, (messages, notes) in zip(said, opened, strict=True)]


def more_inputs(dialogue: ChatDialogue, encoded: Sequence[EncodedChat]) -> MoreInputs | None:
    """The pictures of encoded chats, as generation asks for them; `None` if the policy sees none."""
    if not isinstance(dialogue, PictureDialogue):
        return None

    def inputs(numbers: Sequence[int], input_ids: Any) -> Mapping[str, Any]:
        return dialogue.picture_inputs(input_ids, [encoded[number].pictures for number in numbers])

    return inputs


def answer_chats(
    policy: Any,
    dialogue: ChatDialogue,
    chats: Sequence[OpenChat],
    task: str,
    *,
    max_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    no_repeat_ngram_size: int = 0,
) -> list[ChatAnswer]:
    """What a policy writes after each chat and a task, in order.

    Args:
        policy: In evaluation mode.
        dialogue: Its format.
        chats: Opened.
        task: See `ChatDialogue.encode_chat`.
        max_tokens: Of a chat; older messages are left out.
        max_new_tokens: Of an answer.
        batch_size: Chats that are answered together.
        no_repeat_ngram_size: See `answer_prompts`.

    Raises:
        DialogueError: A chat that doesn't fit.
    """
    encoded = [dialogue.encode_chat(chat.messages, task, None, max_tokens) for chat in chats]
    responses = answer_prompts(
        policy, dialogue, [chat.input_ids for chat in encoded], max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=False, more_inputs=more_inputs(dialogue, encoded), no_repeat_ngram_size=no_repeat_ngram_size,
    )  # fmt: skip
    answers: dict[int, ChatAnswer] = {}
    for response in responses:
        chat = encoded[response.index]
        notes = (*chats[response.index].notes, *chat.notes)
        notes += (f"dropped_messages: {chat.dropped}",) if chat.dropped else ()
        notes += ("shortened_message",) if chat.shortened else ()
        answers[response.index] = ChatAnswer(response.text, notes, response.finished, response.seconds)
    return [answers[i] for i in range(len(chats))]
