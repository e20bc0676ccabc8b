"""Diverse beam search (Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424) for many prompts at once.

    found = diverse_beam_search(model, input_ids, attention_mask, num_beams=6, num_beam_groups=6,
                                diversity_penalty=1.0, max_new_tokens=64, eos_token_id=2, pad_token_id=0,
                                num_return_sequences=6)

Scores and order are those of transformers 4.52, the last release that had it. Each prompt is read once, and its KV
cache is shared by its beams (`rollouts.beam_forward`); a prompt or group that has ended costs nothing more.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rollouts.beam_forward import beam_forward
from rollouts.beam_groups import Choices, EarlyStopping, GroupRules, Hypothesis, PromptGroups, choose


class LogitsError(ArithmeticError):
    """A model's logits that mean nothing: NaN, +inf, or nothing but -inf."""


class BeamSearchOutput(NamedTuple):
    """What a search found, prompt by prompt, best first.

    Attributes:
        sequences: New tokens up to and including EOS, right-padded. Shape (prompts * returned, tokens).
        scores: Penalised log-probabilities over length to the power `length_penalty`. Shape (prompts * returned,).
    """

    sequences: Tensor
    scores: Tensor


class Diversity(Protocol):
    """Where the groups of beams have to differ."""

    def places(self, generated: Tensor) -> Tensor:
        """Where each beam stands; groups avoid each other's tokens only in the same place, and never in place -1.

        Args:
            generated: Tokens after the prompt. Shape (rows, tokens); may have no columns.

        Returns:
            Shape (rows,), int64.
        """
        ...

    def constrain(self, generated: Tensor, logps: Tensor) -> Tensor:
        """The log-probabilities, -inf where a token is not allowed. Shapes (rows, tokens), (rows, vocabulary)."""
        ...


class HammingDiversity:
    """The usual kind: every token counts, whatever stands before it."""

    def places(self, generated: Tensor) -> Tensor:
        """The same place for all."""
        return torch.zeros(len(generated), dtype=torch.long, device=generated.device)

    def constrain(self, generated: Tensor, logps: Tensor) -> Tensor:
        """Allows everything."""
        return logps


@torch.no_grad()
def diverse_beam_search(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    num_return_sequences: int,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    synced_gpus: bool = False,
    diversity: Diversity | None = None,
) -> BeamSearchOutput:
    """Search for several different continuations of each prompt.

    Scores add up log_softmax(logits) in float32 (float64 for a float64 model) minus the penalties, which stay in the
    score. A sequence's order does not say its group, and sequences can be equal. With one group it is beam search.

    Args:
        model: A causal language model in evaluation mode, possibly wrapped (PEFT, DeepSpeed, FSDP).
        input_ids: Left-padded prompts. Shape (prompts, tokens).
        attention_mask: 1 on tokens, 0 on padding; `None`: no padding.
        num_beams: Beams of a prompt, over all groups.
        num_beam_groups: Groups; each in turn avoids what the earlier ones have just chosen.
        diversity_penalty: Nats taken off a token for each beam of an earlier group that has just chosen it.
        length_penalty: Above 0 favours longer sequences, since scores are negative.
        early_stopping: See `GroupRules`.
        max_new_tokens: Length limit, EOS included.
        eos_token_id: Token, or several tokens, that end a sequence. Whichever it was, the first is returned.
        pad_token_id: Fills the result; it has no influence on the search.
        num_return_sequences: The best of each prompt, at most `num_beams`.
        logits_processor: transformers' `LogitsProcessorList` or any such callable. Called once a step for all beams of
            all prompts, in their order, with prompt and tokens so far and their log-probabilities. It comes before the
            diversity penalty (in the library after it), so a factor such as a repetition penalty does not scale the
            penalty; masks and sums give the same in either order.
        synced_gpus: For a sharded model (ZeRO-3, FSDP): every process keeps calling the model until all of them are
            done. All processes must call this equally often; one without work passes `input_ids` of shape (0, n).
        diversity: Where groups have to differ; `None`: everywhere.

    Raises:
        ValueError: Naming the argument that can't be used.
        LogitsError: The model's logits or the processor's scores are no log-probabilities.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    _check_prompts(input_ids, attention_mask, allow_none=synced_gpus)
    _check_search(num_beams, num_beam_groups, diversity_penalty, num_return_sequences)
    _check_ending(max_new_tokens, early_stopping, length_penalty, eos)
    rules = GroupRules(
        num_groups=num_beam_groups,
        group_size=num_beams // num_beam_groups,
        diversity_penalty=diversity_penalty,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_new_tokens=max_new_tokens,
        eos_ids=torch.tensor(eos, device=input_ids.device),
    )
    search = _Search(rules, input_ids, pad_token_id, logits_processor, diversity or HammingDiversity())
    forward = beam_forward(model, input_ids.shape[1] + max_new_tokens)
    logits = forward.start(input_ids, attention_mask) if len(input_ids) else _dummy_forward(model, input_ids)
    while True:
        step = search.advance(logits) if len(search.going_on) else None
        if not _anyone(step is not None, synced_gpus, input_ids.device):
            break
        logits = forward.step(*step) if step is not None else _dummy_forward(model, input_ids)
    found = _collect(search.found, num_return_sequences, eos[0], pad_token_id, max_new_tokens, search.dtype)
    return BeamSearchOutput(found.sequences.to(input_ids.device), found.scores.to(input_ids.device))


class _Step(NamedTuple):
    """Arguments of `BeamForward.step`."""

    rows: Tensor
    parents: Tensor
    tokens: Tensor
    is_open: Tensor


class _Search:
    """The state of a search over all prompts.

    Attributes:
        going_on: Prompts with a group that has not ended, in order.
        found: Of every prompt that has ended, what was found, best first.
    """

    def __init__(
        self, rules: GroupRules, input_ids: Tensor, pad: int, processor: Callable | None, diversity: Diversity
    ) -> None:
        prompts, beams = len(input_ids), rules.num_groups * rules.group_size
        self._rules, self._pad, self._processor, self._diversity = rules, pad, processor, diversity
        self._groups = [PromptGroups(rules) for _ in range(prompts)]
        self._eos = set(rules.eos_ids.tolist())
        # What the processor sees; prompts that have ended keep their last tokens.
        self._seen = input_ids[:, None].expand(-1, beams, -1)  # (prompts, beams, prompt and new tokens)
        self.going_on = list(range(prompts))
        self.found: list[list[Hypothesis]] = [[] for _ in range(prompts)]
        self.dtype = torch.float32
        # Of the prompts that go on:
        self._scores = torch.zeros(prompts, beams, device=input_ids.device)
        # At first all beams of a group are the same; only one may be continued.
        self._scores[:, torch.arange(beams) % rules.group_size > 0] = -1e9
        self._generated = input_ids.new_empty(prompts, beams, 0)

    def advance(self, logits: Tensor) -> _Step | None:
        """Take one step; returns what to feed next, or None if no prompt goes on.

        Args:
            logits: Shape (prompts, vocabulary) after the prompt, then (prompts going on, beams, vocabulary).
        """
        rows, beams = self._scores.shape
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits[:, None].expand(-1, beams, -1) if logits.ndim == 2 else logits
        is_open = self._is_open()
        logps = self._process(torch.log_softmax(logits.to(self.dtype), dim=-1), is_open)
        places = self._diversity.places(self._generated.flatten(0, 1)).view(rows, beams)
        open_groups = is_open[:, :: self._rules.group_size]
        choices = choose(logps, self._scores.to(self.dtype), places, open_groups, self._rules)
        self._record(choices)
        parents = choices.next_parents[:, :, None].expand_as(self._generated)
        self._generated = torch.cat([self._generated.gather(1, parents), choices.next_tokens[:, :, None]], dim=2)
        self._scores = choices.next_scores
        return self._keep(choices)

    def _process(self, logps: Tensor, is_open: Tensor) -> Tensor:
        """Log-probabilities after the constraint and the processor."""
        # NaN, +inf, or nothing but -inf anywhere in a row makes all of its log-probabilities NaN.
        self._check(logps[:, :, :1], is_open, "The logits of `model`")
        rows, beams, vocabulary = logps.shape
        logps = self._diversity.constrain(self._generated.flatten(0, 1), logps.flatten(0, 1)).view_as(logps)
        if self._processor is None:
            return logps
        if new := self._generated.shape[2]:
            self._seen = torch.cat([self._seen, self._seen.new_full((*self._seen.shape[:2], 1), self._pad)], dim=2)
            self._seen[self.going_on, :, -new:] = self._generated
        every = logps
        if len(self.going_on) < len(self._seen):
            # Prompts that have ended stay in: processors may count rows (prefix_allowed_tokens_fn's batch_id).
            every = logps.new_zeros(len(self._seen), beams, vocabulary)
            every[self.going_on] = logps
        processed = self._processor(self._seen.flatten(0, 1), every.flatten(0, 1)).view_as(every)
        processed = processed if every is logps else processed[self.going_on]
        self._check(processed, is_open, "The scores of `logits_processor`")
        return processed

    def _check(self, logps: Tensor, is_open: Tensor, what: str) -> None:
        bad = logps.isnan().any(-1) & is_open
        if bad.any():
            prompt = self.going_on[int(bad.any(1).nonzero()[0])]
            raise LogitsError(
                f"{what} for prompt {prompt} at new token {self._generated.shape[2] + 1} are NaN, +inf, or nothing but "
                "-inf. A float16 model may overflow: load it as bfloat16 or float32."
            )

    def _is_open(self) -> Tensor:
        """Beams whose group has not ended. Shape (prompts going on, beams)."""
        groups = torch.tensor([[not ended for ended in self._groups[p].ended] for p in self.going_on])
        return groups.repeat_interleave(self._rules.group_size, dim=1).to(self._scores.device)

    def _record(self, choices: Choices) -> None:
        scores, tokens = choices.scores.tolist(), choices.tokens.tolist()
        for row, prompt in enumerate(self.going_on):
            ends = [
                (group, rank, self._generated[row, choices.parents[row, group, rank]].tolist())
                for group, of_group in enumerate(tokens[row])
                for rank, token in enumerate(of_group[: self._rules.group_size])
                if token in self._eos
            ]
            self._groups[prompt].update(self._generated.shape[2] + 1, scores[row], ends)

    def _keep(self, choices: Choices) -> _Step | None:
        """Let go of the prompts that have ended; what the others are fed next."""
        at_limit = self._generated.shape[2] == self._rules.max_new_tokens
        kept = []
        for row, prompt in enumerate(self.going_on):
            if at_limit or all(self._groups[prompt].ended):
                scores, tokens = self._scores[row].tolist(), self._generated[row].tolist()
                self.found[prompt] = self._groups[prompt].finish(scores, tokens)
            else:
                kept.append(row)
        self.going_on = [self.going_on[row] for row in kept]
        if not kept:
            return None
        rows = torch.tensor(kept, device=self._scores.device)
        self._scores, self._generated = self._scores[rows], self._generated[rows]
        return _Step(rows, choices.next_parents[rows], choices.next_tokens[rows], self._is_open())


def _collect(
    found: list[list[Hypothesis]], num_returned: int, eos: int, pad: int, max_new_tokens: int, dtype: torch.dtype
) -> BeamSearchOutput:
    best = [hypothesis for of_prompt in found for hypothesis in of_prompt[:num_returned]]
    # Only open beams are as long as the limit.
    rows = [h.tokens if len(h.tokens) == max_new_tokens else [*h.tokens, eos] for h in best]
    width = max(map(len, rows), default=0)
    sequences = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)
    return BeamSearchOutput(sequences.view(len(rows), width), torch.tensor([h.score for h in best], dtype=dtype))


def _anyone(goes_on: bool, synced: bool, device: torch.device) -> bool:
    """Whether this process, or with `synced` any process, still needs the model."""
    if not (synced and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return goes_on
    flag = torch.tensor(float(goes_on), device=device)
    torch.distributed.all_reduce(flag)
    return flag.item() > 0


def _dummy_forward(model: Any, input_ids: Tensor) -> Tensor:
    """A call that only gathers and frees the shards that other processes need."""
    return model(input_ids=input_ids.new_zeros(1, 1), use_cache=False).logits


def _check_prompts(input_ids: Tensor, attention_mask: Tensor, *, allow_none: bool) -> None:
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            "`input_ids` and `attention_mask` must both be (prompts, tokens), but are "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}."
        )
    if len(input_ids) == 0 and not allow_none:
        raise ValueError("`input_ids` holds no prompt; only with `synced_gpus` may a process have none.")
    mask = attention_mask.bool()
    if (empty := ~mask.any(1)).any():
        raise ValueError(f"Prompt {int(empty.nonzero()[0])} of `input_ids` has no token; give it a BOS token at least.")
    if ((mask[:, :-1] & ~mask[:, 1:]).any(1)).any():
        raise ValueError(
            "`attention_mask` has padding right of a token; pad prompts on the left (padding_side='left')."
        )


def _check_search(num_beams: int, num_beam_groups: int, diversity_penalty: float, num_returned: int) -> None:
    if num_beams < 1 or num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(
            f"`num_beams` must be a multiple of `num_beam_groups`, both at least 1, but they are {num_beams} and "
            f"{num_beam_groups}."
        )
    if not math.isfinite(diversity_penalty) or (num_beam_groups > 1 and diversity_penalty <= 0):
        raise ValueError(
            f"`diversity_penalty` must be above 0 with several groups, but is {diversity_penalty}: they would all "
            "find the same. Raise it, or set `num_beam_groups` to 1."
        )
    if not 1 <= num_returned <= num_beams:
        raise ValueError(f"`num_return_sequences` must be 1 to `num_beams` ({num_beams}), but is {num_returned}.")


def _check_ending(max_new_tokens: int, early_stopping: EarlyStopping, length_penalty: float, eos: list[int]) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but is {max_new_tokens}.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"`early_stopping` must be True, False or 'never', but is {early_stopping!r}.")
    if not math.isfinite(length_penalty):
        raise ValueError(f"`length_penalty` must be a finite number, but is {length_penalty}; 1.0 is the mean.")
    if not eos or min(eos) < 0:
        raise ValueError(f"`eos_token_id` must be one or more token ids, but is {eos}; take the tokenizer's.")
