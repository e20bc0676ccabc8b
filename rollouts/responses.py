"""Batched generation: what a policy answers to instructions, by greedy decoding or sampling."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rollouts.dialogue import Dialogue

# Greedy decoding and sampling mean just that, whatever a published model's generation_config.json adds to them.
_NOTHING_ELSE: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_p": None,
    "typical_p": 1.0,
}


MoreInputs = Callable[[Sequence[int], torch.Tensor], Mapping[str, Any]]
"""Of the numbers of a batch's prompts and their padded ids (prompts, tokens): further inputs of the policy, by name."""


class Response(NamedTuple):
    """One answer.

    Attributes:
        index: Which instruction it answers.
        text: As the policy wrote it, without control tokens.
        num_tokens: Tokens written, including the end token.
        finished: Whether it ended by itself rather than at the token limit.
        seconds: Wall time of its batch divided by the batch's size.
    """

    index: int
    text: str
    num_tokens: int
    finished: bool
    seconds: float


def generate_responses(
    policy: PreTrainedModel,
    dialogue: Dialogue,
    instructions: Sequence[Mapping[str, str] | str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_prompt_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    skip: frozenset[int] = frozenset(),
    progress: bool = True,
) -> Iterator[Response]:
    """Answer every instruction; yields in an order of its own (long prompts first), so look at `index`.

    Batches are fixed by the instructions and `batch_size`, and each is seeded by `seed` and its first index, so a run
    that was interrupted gives the same answers when it is resumed with `skip`.

    Args:
        policy: In evaluation mode, on its device.
        dialogue: Format and tokenizer of the policy.
        instructions: Prompts or DABench instruction objects.
        max_new_tokens: Upper bound of a response, in tokens.
        batch_size: Prompts per forward pass.
        max_prompt_tokens: Longer prompts are cut (in the user's text).
        do_sample: Multinomial sampling instead of greedy decoding; `temperature` and `top_p` as usual.
        seed: Of sampling.
        skip: Indices answered already; batches of which nothing is left are not computed.
        progress: Show a progress bar.
    """
    prompts = [dialogue.encode_prompt(instruction, max_prompt_tokens) for instruction in instructions]
    yield from answer_prompts(
        policy, dialogue, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, do_sample=do_sample,
        temperature=temperature, top_p=top_p, seed=seed, skip=skip, progress=progress,
    )  # fmt: skip


def answer_prompts(
    policy: PreTrainedModel,
    dialogue: Dialogue,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    skip: frozenset[int] = frozenset(),
    progress: bool = True,
    more_inputs: MoreInputs | None = None,
    no_repeat_ngram_size: int = 0,
) -> Iterator[Response]:
    """Answer prompts that are token ids already; everything else is as in `generate_responses`.

    `more_inputs` gives what the policy needs beside the ids of a batch, such as pixels. No sequence of
    `no_repeat_ngram_size` tokens is written that was there before, in the prompt or the answer; 0: any.
    """
    batches = batches_by_length(prompts, batch_size)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if do_sample:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    sampling["no_repeat_ngram_size"] = no_repeat_ngram_size
    with tqdm(total=len(prompts), desc="answering", unit=" prompts", disable=not progress, mininterval=1.0) as bar:
        for batch in batches:
            if not skip.issuperset(batch):
                yield from (
                    response
                    for response in _answer_batch(
                        policy, dialogue, prompts, batch, max_new_tokens, sampling, seed, more_inputs
                    )
                    if response.index not in skip
                )
            bar.update(len(batch))


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of prompts, `batch_size` at a time: similar lengths share a batch, which means less padding.

    The longest come first, so that running out of memory shows at once.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch: every prompt ends where its response begins. Shape (prompts, tokens)."""
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@torch.inference_mode()
def _answer_batch(
    policy: PreTrainedModel,
    dialogue: Dialogue,
    prompts: Sequence[Sequence[int]],
    batch: list[int],
    max_new_tokens: int,
    sampling: dict[str, Any],
    seed: int,
    more_inputs: MoreInputs | None,
) -> list[Response]:
    tokenizer = dialogue.tokenizer
    end = cast(int, tokenizer.eos_token_id)  # Dialogue refuses tokenizers without one
    pad = end if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id)
    device = policy.device
    input_ids, attention_mask = left_padded([prompts[i] for i in batch], pad, device)
    width = input_ids.shape[1]
    started = time.perf_counter()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + batch[0]) % 2**63)
        output = cast(Any, policy).generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=end,
            **(_NOTHING_ELSE | sampling),
            **(more_inputs(batch, input_ids) if more_inputs else {}),
        )
    seconds = (time.perf_counter() - started) / len(batch)
    responses = []
    for i, row in zip(batch, output[:, width:].tolist(), strict=True):
        finished = end in row
        tokens = row[: row.index(end)] if finished else row
        responses.append(Response(i, dialogue.decode(tokens), len(tokens) + finished, finished, seconds))
    return responses
