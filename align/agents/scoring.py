"""How likely a policy is to name each of several models, all of them in one forward pass (candidate packing)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.trainers.layouts import PackedLayout, PaddedLayout
from align.trainers.token_logps import Way, choose_way, token_logps
from rollouts.beam_forward import unwrapped
from rollouts.call_constraint import CallConstraint, CallProcessor
from rollouts.catalog import CatalogEntry
from rollouts.decoding import diverse_beam_search
from rollouts.responses import left_padded

_SLACK_TOKENS = 16  # a policy may write a name in more tokens than the tokenizer would


def name_tokens(constraint: CallConstraint, entries: Sequence[CatalogEntry]) -> list[list[int]]:
    """The beginnings of calls up to the end of the model's name, in the tokenizer's own tokens.

    The token with the closing quote belongs to them, also if it reaches beyond.

    Args:
        constraint: Of the policy's dialogue.
        entries: The models.
    """
    found = []
    for entry in entries:
        text = constraint.grammar.lead + entry.default_call().to_json()
        ids = constraint.tokens.encode(text)
        name = text[: text.index(', "type": ')].encode()
        length = len(text.encode()) - len(constraint.tokens.join(ids))  # below 0: a space that the tokenizer puts first
        for count, id in enumerate(ids, start=1):
            length += len(constraint.tokens.of_id[id] or b"")
            if length >= len(name):
                found.append(ids[:count])
                break
    return found


class NameScorer:
    """Scores names under one policy.

    Args:
        policy: A causal language model in evaluation mode, on its device.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._way: Way | None = None

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
        """Log-probability, in nats, of each name after its prompt.

        Args:
            prompts: Token ids.
            names: For each prompt, token ids of the names (`name_tokens`), at least one each.

        Returns:
            For each prompt, float32 on the CPU, shape (names,).
        """
        if self._way is None:
            self._way = choose_way(self._policy, longest=0)
        rows = [
            {"prompt_ids": list(prompt), "responses": [list(ids) for ids in own], "rewards": [0.0] * len(own)}
            for prompt, own in zip(prompts, names, strict=True)
        ]
        widest = max(len(own) for own in names)
        layout = (PackedLayout if self._way.packed else PaddedLayout)(0, widest)
        device = next(unwrapped(self._policy).parameters()).device
        batch = {key: value.to(device) for key, value in layout(rows).items()}
        logps = token_logps(self._policy, batch, self._way).masked_fill(~batch["mask"], 0.0).sum(-1).float().cpu()
        return [row[: len(own)] for row, own in zip(logps, names, strict=True)]


def likeliest_names(
    policy: Any, prompts: Sequence[Sequence[int]], constraint: CallConstraint, count: int
) -> list[list[str]]:
    """The names that a beam search under a constraint finds, best first; at most `count`.

    Args:
        policy: In evaluation mode, on its device.
        prompts: Token ids.
        constraint: Of the policy's dialogue.
        count: Beams.
    """
    tokenizer = constraint.tokens.tokenizer
    end = int(tokenizer.eos_token_id)
    input_ids, mask = left_padded(prompts, 0, next(unwrapped(policy).parameters()).device)
    entries = list(constraint.grammar.entries.values())
    longest = _SLACK_TOKENS + max(map(len, name_tokens(constraint, entries)))
    found = diverse_beam_search(
        policy, input_ids, mask, num_beams=count, num_beam_groups=1, diversity_penalty=0.0, max_new_tokens=longest,
        length_penalty=0.0, eos_token_id=end, pad_token_id=end, num_return_sequences=count,
        logits_processor=CallProcessor(constraint, input_ids.shape[1], end, model_only=True),
    )  # fmt: skip
    names = []
    for start in range(0, len(prompts) * count, count):
        own: dict[str, None] = {}
        for ids in found.sequences[start : start + count].tolist():
            written = ids[: ids.index(end)] if end in ids else ids
            state = constraint.grammar.advance(constraint.grammar.start, constraint.tokens.join(written))
            if state is not None and (name := constraint.grammar.chosen_model(state)):
                own[name] = None
        names.append(list(own))
    return names
