"""Batched diverse beam search over instructions: several different answers of a policy to each."""

from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedModel

from rollouts.decoding import Diversity, diverse_beam_search
from rollouts.dialogue import Dialogue
from rollouts.responses import batches_by_length, left_padded


def beam_responses(
    policy: PreTrainedModel,
    dialogue: Dialogue,
    instructions: Sequence[Mapping[str, str] | str],
    *,
    num_beams: int,
    diversity_penalty: float,
    max_new_tokens: int,
    diversity: Diversity | None = None,
    batch_size: int = 16,
    max_prompt_tokens: int | None = None,
) -> list[list[str]]:
    """`num_beams` answers to each instruction, best first: as many groups of one beam each.

    A group of one beam is greedy, so a smaller `max_new_tokens` only cuts its answer off.

    Args:
        policy: In evaluation mode, on its device.
        dialogue: Format and tokenizer of the policy.
        instructions: Prompts or DABench instruction objects.
        num_beams: Answers.
        diversity_penalty: See `diverse_beam_search`.
        max_new_tokens: Upper bound of an answer, in tokens.
        diversity: Where the answers have to differ; `None`: everywhere.
        batch_size: Prompts per forward pass.
        max_prompt_tokens: Longer prompts are cut (in the user's text).
    """
    prompts = [dialogue.encode_prompt(instruction, max_prompt_tokens) for instruction in instructions]
    end = cast(int, dialogue.tokenizer.eos_token_id)
    pad = end if dialogue.tokenizer.pad_token_id is None else cast(int, dialogue.tokenizer.pad_token_id)
    answers: list[list[str]] = [[] for _ in prompts]
    for batch in batches_by_length(prompts, batch_size):
        input_ids, attention_mask = left_padded([prompts[i] for i in batch], pad, policy.device)
        found = diverse_beam_search(
            policy,
            input_ids,
            attention_mask,
            num_beams=num_beams,
            num_beam_groups=num_beams,
            diversity_penalty=diversity_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            num_return_sequences=num_beams,
            diversity=diversity,
        )
        for row, tokens in enumerate(found.sequences.tolist()):
            text = dialogue.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
            answers[batch[row // num_beams]].append(text)
    return answers
