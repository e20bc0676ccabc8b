"""Pictures of the prefixes that model tokens are trained on: where they are and what is in them, opened when needed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.chat_dialogue import EncodedChat
from align.chat_pictures import PictureError
from align.picture_dialogue import PictureDialogue
from align.trainers.model_token_config import ModelTokenError


@dataclass(frozen=True)
class PrefixPictures:
    """Of each example, in order.

    Attributes:
        dialogue: That the prefixes were encoded with.
        sources: Where they are, as chats name them.
        digests: See `picture_digest`.
    """

    dialogue: PictureDialogue
    sources: Sequence[Sequence[Any]]
    digests: Sequence[bytes]

    def inputs(self, numbers: Sequence[int], input_ids: Tensor) -> Mapping[str, Any]:
        """What the policy is given beside the ids of some examples.

        Args:
            numbers: Of the examples.
            input_ids: Padded. Shape (examples, tokens).

        Raises:
            ModelTokenError: A picture can't be opened any more.
        """
        try:
            opened = [[self.dialogue.pictures.open(source) for source in self.sources[number]] for number in numbers]
        except PictureError as error:
            raise ModelTokenError(f"{error} It could be opened when the prefixes were encoded.") from error
        return self.dialogue.picture_inputs(input_ids, opened)

    def __add__(self, other: "PrefixPictures") -> "PrefixPictures":
        """These, then the others."""
        return PrefixPictures(
            self.dialogue, [*self.sources, *other.sources], [*self.digests, *other.digests]
        )  # fmt: skip


def picture_digest(dialogue: PictureDialogue, encoded: EncodedChat) -> bytes:
    """What tells a chat's pictures from others: their pixels, and what the processor does with them. Empty: none."""
    if not encoded.pictures:
        return b""
    digest = hashlib.sha256(dialogue.processing_key().encode())
    for picture in encoded.pictures:
        digest.update(f"{picture.image.size}".encode())
        digest.update(picture.image.tobytes())
    return digest.digest()
