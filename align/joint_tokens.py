"""Stages 1 and 2 of ChatGen-Evo in one run, to compare the stages with: nothing is frozen, and prompts and models are
learned side by side (Eq. 2 and 3 as one loss over tokens).

    accelerate launch align/sft.py --config configs/chatgen/evo_writing.yaml --learn joint --dataset data/chatgenbench \
        --output_dir runs/joint

leaves a policy of stage 1 and its model tokens in the same folder.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.chat_dialogue import ChatFormat
from align.chats import Unreadable
from align.pairs import DataError
from align.sft_tasks import ChatTask
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_rows import ModelTokens
from rollouts.dialogue import DialogueError
from rollouts.policy import load_policy

logger = logging.getLogger(__name__)


class JointTask(ChatTask):
    """Each chat twice: with the prompt that is to be written, and with it, followed by the token of the model.

    Attributes:
        names: Of the models; the token of the i-th has the i-th row after those of the words.
    """

    def __init__(self, folder: str, form: ChatFormat, unreadable: Unreadable = "error") -> None:
        super().__init__(folder, "prompt", form, unreadable)
        self.title = "ChatGen-Evo, stages 1 and 2 jointly"
        self.names = sorted(set(self.rows["model"]))
        self._words = 0

    def prepare(self, policy: PreTrainedModel) -> None:
        """Give the policy a row for each model, after all that there are."""
        head: Any = policy.get_output_embeddings()
        self._words = len(head.weight)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy.resize_token_embeddings(self._words + len(self.names))

    def encode(self, rows: Any, dialogue: Any, max_length: int, what: str) -> Any:
        """Rows to write prompts, then rows to choose models; models that training doesn't know are left out there."""
        from datasets import concatenate_datasets

        number = {name: index for index, name in enumerate(self.names)}
        prompts = super().encode(rows, dialogue, max_length, what)

        def choose(row: dict[str, Any]) -> dict[str, Any]:
            try:
                chat = dialogue.encode_selection(row["messages"], row["prompt"], max_length - 1)
            except DialogueError as error:
                raise DataError(f"{what} row {row['id']!r}: {error}") from error
            token = self._words + number[row["model"]]
            found = {"input_ids": [*chat.input_ids, token], "labels": [-100] * len(chat.input_ids) + [token]}
            return found | {"pictures": [picture.source for picture in chat.pictures]}

        known = rows.select([i for i, name in enumerate(rows["model"]) if name in number], keep_in_memory=True)
        chosen = known.map(choose, remove_columns=known.column_names, keep_in_memory=True, desc=f"tokenizing {what}")
        chosen = chosen.select_columns(prompts.column_names).cast(prompts.features)
        return concatenate_datasets([prompts, chosen])

    def finish(self, output: Path) -> None:
        """Divide what was saved into the policy, with the rows of words only, and the model tokens."""
        policy = load_policy(str(output), dtype="auto")
        head: Any = policy.get_output_embeddings()
        rows = head.weight[self._words :].detach().float().clone()
        policy.resize_token_embeddings(self._words)
        policy.save_pretrained(output)
        backbone = Backbone(policy)
        ModelTokens(tuple(self.names), rows, backbone.transform, backbone.digest()).save(output)
