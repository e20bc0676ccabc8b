"""How chats with pictures are written for policies that see: `ChatDialogue` on a processor of transformers.

    dialogue = load_dialogue("runs/base", folder="data/chatgenbench")
    chat = dialogue.encode_chat(messages, dialogue.chat_form.planning_task)
    inputs = dialogue.picture_inputs(torch.tensor([chat.input_ids]), [chat.pictures])  # pixel_values, ...

For processors that put an image token into the text and expand it to as many as a picture takes (InternVL, Qwen-VL).
The processor itself says how many; where they stand is for its chat template to say, or for the plain form. Nobody can
type such a token: it is broken up in what people write, and counted in what comes out.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from align.chat_dialogue import (
    PICTURE,
    ChatDialogue,
    ChatFormat,
    Messages,
    Part,
    PartedTurn,
    Picture,
    parted,
    read_parts,
)
from align.chat_pictures import SHORTEST_SIDE, ChatPictures, PictureError
from rollouts.dialogue import DialogueError
from rollouts.policy import load_processor, load_tokenizer, sees_pictures

logger = logging.getLogger(__name__)

# Attributes of processors and their tokenizers that name tokens of pictures and films.
_TOKEN_NAMES = (
    "image_token", "video_token", "audio_token", "start_image_token", "end_image_token", "context_image_token",
    "boi_token", "eoi_token", "fake_image_token", "global_image_token", "vision_start_token", "vision_end_token",
)  # fmt: skip
# What a processor returns besides pixels.
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
UNREADABLE = "unreadable_picture: "


def load_dialogue(
    policy: str | Path, form: ChatFormat | None = None, *, folder: str | Path | None = None, revision: str | None = None
) -> ChatDialogue:
    """How chats are written for a policy, as it can see pictures or not.

    Args:
        policy: A directory or a Hub id, with tokenizer or processor.
        form: What it is (to be) trained to read; `None`: as kept beside it.
        folder: Of the data set whose chats will be read; `None`: only the caller's own pictures are opened.
        revision: Git revision on the Hub.

    Raises:
        OSError, ValueError: See `load_tokenizer` and `load_processor`.
        DialogueError: The processor is of another kind than described above.
    """
    form = ChatFormat.load(policy) if form is None else form
    if not sees_pictures(str(policy), revision=revision):
        return ChatDialogue(load_tokenizer(str(policy), revision=revision), form)
    return PictureDialogue(load_processor(str(policy), revision=revision), form, folder)


class PictureDialogue(ChatDialogue):
    """Writes chats with pictures.

    The user's pictures are seen, the newest `max_pictures` of a chat; older ones, those of the assistant, and those
    that can't be opened stand as `[picture]`, with a note.

    Args:
        processor: With tokenizer and image processor.
        form: Format.
        folder: Of the data set; see `ChatPictures`.

    Raises:
        DialogueError: The processor has no image token, or the tokenizer no end token.
    """

    def __init__(self, processor: ProcessorMixin, form: ChatFormat | None = None, folder: str | Path | None = None):
        self.processor: Any = processor
        super().__init__(self.processor.tokenizer, form)
        self.pictures = ChatPictures(folder, self.chat_form.picture_side)
        template = self.processor.chat_template
        self._template = template.get("default") if isinstance(template, dict) else template
        self.uses_template = bool(self._template) and not self.chat_form.plain
        self.image_token: str | None = getattr(processor, "image_token", None)
        token_id: Any = getattr(processor, "image_token_id", None)
        if not isinstance(self.image_token, str) or self._ids(self.image_token) != [token_id]:
            raise DialogueError(
                f"{type(processor).__name__} has no image token of its own ({self.image_token!r}), so places of "
                "pictures can't be found in its text. Use a policy of the InternVL or Qwen-VL kind."
            )
        self.image_token_id: int = token_id
        named = {getattr(owner, name, None) for owner in (processor, self.tokenizer) for name in _TOKEN_NAMES}
        tokens = {token for token in named if isinstance(token, str) and len(token) > 1} | set(self._control_tokens)
        self._control_tokens = sorted(tokens, key=lambda token: (-len(token), token))
        self._expansion = lru_cache(maxsize=4096)(self._expanded)
        try:
            places = self.picture_ids((SHORTEST_SIDE, SHORTEST_SIDE)).count(token_id)
        # Of all that processors raise for options they don't take, nothing is documented.
        except Exception as error:
            raise DialogueError(
                f"{type(processor).__name__} can't make pixels with `picture_options` "
                f"{dict(self.chat_form.picture_options)}: {error}"
            ) from error
        if not places:
            raise DialogueError(f"{type(processor).__name__} makes no places for a picture; is it damaged?")

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which can't be sent to other processes."""
        return {name: value for name, value in self.__dict__.items() if name != "_expansion"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """With a new cache."""
        self.__dict__.update(state)
        self._expansion = lru_cache(maxsize=4096)(self._expanded)

    def save_form(self, folder: str | Path) -> None:
        """Keep the format and the processor with a policy's weights."""
        super().save_form(folder)
        self.processor.save_pretrained(folder)

    def open_chat(self, messages: Messages) -> tuple[Messages, tuple[str, ...]]:
        """A chat whose pictures are open, so that it can be read again without its files, and what became of others.

        Raises:
            DialogueError: See `read_turns`.
        """
        turns, notes = self.read(messages)
        opened = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                    for part in turn.parts
                ],
            }
            for turn in turns
        ]
        return opened, notes

    def read(self, messages: Messages) -> tuple[list[PartedTurn], tuple[str, ...]]:
        """See `ChatDialogue.read`; opens the pictures, the newest first."""
        turns = read_parts(messages)
        notes: list[str] = []
        seen = older = 0
        for role, parts in reversed(turns):
            for index in reversed(range(len(parts))):
                if isinstance(parts[index], str):
                    continue
                source, parts[index] = parts[index]["image"], PICTURE
                if isinstance(source, Picture):
                    parts[index] = source
                elif role != "user" or seen >= self.chat_form.max_pictures:
                    older += 1
                else:
                    try:
                        parts[index] = Picture(source, self.pictures.open(source))
                        seen += 1
                    except PictureError as error:
                        notes.insert(0, f"{UNREADABLE}{error}")
        if older:
            notes.append(f"pictures_as_text: {older}")
        return [parted(role, parts) for role, parts in turns], tuple(notes)

    def picture_inputs(self, input_ids: Tensor, pictures: Sequence[Sequence[Image.Image | Picture]]) -> dict[str, Any]:
        """What a policy is given beside token ids, on their device.

        Args:
            input_ids: Of a batch, padded on either side. Shape (chats, tokens).
            pictures: Of each chat, those that its ids have places for.

        Raises:
            DialogueError: The ids have other numbers of places than the pictures take.
        """
        found: dict[str, Any] = {}
        images = [[p.image if isinstance(p, Picture) else p for p in some] for some in pictures]
        if any(images):
            made = self._processed([some for some in images if some])
            ids = made["input_ids"]
            needed = iter([row.count(self.image_token_id) for row in ids])
            for number, (row, some) in enumerate(zip(input_ids, images, strict=True)):
                places, wanted = int((row == self.image_token_id).sum()), next(needed) if some else 0
                if places != wanted:
                    raise DialogueError(
                        f"Chat {number} of a batch has {places} places for what takes {wanted}; were its pictures "
                        "changed since it was encoded, or the processor?"
                    )
            found = {name: value for name, value in made.items() if name not in _OF_TEXT}
        if "mm_token_type_ids" in self.processor.model_input_names:
            kinds = self.processor.create_mm_token_type_ids(input_ids.tolist())
            found["mm_token_type_ids"] = torch.tensor(kinds)
        return {
            name: value.to(input_ids.device) if isinstance(value, Tensor) else value for name, value in found.items()
        }

    def processing_key(self) -> str:
        """What tells how pictures become pixels: two that are equal do the same."""
        settings = self.processor.image_processor.to_dict()
        given = [type(self.processor).__name__, settings, dict(self.chat_form.picture_options)]
        return json.dumps(given, sort_keys=True, default=str)

    def _processed(self, images: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """Image tokens and nothing else, expanded, and the pixels, as tensors."""
        assert self.image_token is not None  # see __init__
        made = self.processor(
            text=[self.image_token * len(some) for some in images],
            images=[list(some) for some in images],
            text_kwargs={"add_special_tokens": False, "padding": False},
            images_kwargs={**self.chat_form.picture_options, "return_tensors": "pt"},
        )
        return dict(made)

    def picture_ids(self, size: tuple[int, int]) -> list[int]:
        """Token ids of a picture of so many pixels (width, height); only its size matters."""
        return list(self._expansion(size))

    def _expanded(self, size: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self._processed([[Image.new("RGB", size)]])["input_ids"][0])

    def _prompt_ids(self, prompt: str, pictures: Sequence[Picture]) -> list[int]:
        ids = self._ids(prompt)
        if ids.count(self.image_token_id) != len(pictures):
            raise DialogueError(
                f"The chat template made {ids.count(self.image_token_id)} places for {len(pictures)} pictures. Set "
                "`plain: true`, or give the processor another template."
            )
        rest = iter(pictures)
        return [
            token
            for given in ids
            for token in (self._expansion(next(rest).image.size) if given == self.image_token_id else (given,))
        ]

    def _content(self, parts: Sequence[Part]) -> list[dict[str, str]]:
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts if part
        ]

    def _plain_text(self, parts: Sequence[Part]) -> str:
        return "\n".join(part if isinstance(part, str) else str(self.image_token) for part in parts)

    def _apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        said = [
            {"role": entry["role"], "content": self._content([c]) if isinstance(c := entry["content"], str) else c}
            for entry in messages
        ]
        return super()._apply_template(said, add_generation_prompt)
