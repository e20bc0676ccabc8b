"""Batches of chats with pictures for training: files are opened when their batch is made, and never all at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from align.chat_pictures import SHORTEST_SIDE, PictureError
from align.pairs import DataError
from align.picture_dialogue import PictureDialogue


class PictureCollator:
    """Rows of `encode_chats` -> `input_ids`, `labels`, `attention_mask`, padded on the right, and what pictures give.

    Args:
        dialogue: That the rows were encoded with.
        always_pixels: Put a blank picture into the padding of a batch that has none. It is masked and changes no loss,
            but processes that train together must all use the same parts of a model in every step: where only some do,
            DeepSpeed and FSDP wait for each other forever.
    """

    def __init__(self, dialogue: PictureDialogue, *, always_pixels: bool = False) -> None:
        self.dialogue, self.always_pixels = dialogue, always_pixels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch.

        Raises:
            DataError: A picture can't be opened any more.
            DialogueError: A picture has another size than when its row was encoded.
        """
        ids = [list(row["input_ids"]) for row in rows]
        lengths = torch.tensor([len(own) for own in ids])
        try:
            pictures = [[self.dialogue.pictures.open(source) for source in row["pictures"]] for row in rows]
        except PictureError as error:
            raise DataError(f"{error} It could be opened when training began.") from error
        if self.always_pixels and not any(pictures):
            shortest = int(lengths.argmin())
            pictures[shortest] = [Image.new("RGB", (SHORTEST_SIDE, SHORTEST_SIDE))]
            ids[shortest] += self.dialogue.picture_ids(pictures[shortest][0].size)
        width = max(map(len, ids))
        pad = self.dialogue.tokenizer.pad_token_id
        input_ids = torch.tensor([[*own, *[pad] * (width - len(own))] for own in ids])
        labels = torch.tensor([[*row["labels"], *[-100] * (width - len(row["labels"]))] for row in rows])
        mask = (torch.arange(width) < lengths[:, None]).long()
        more = self.dialogue.picture_inputs(input_ids, pictures)
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask} | more
