"""Calls written under a constraint, with a forward pass only where there is something to decide.

    found = generate_calls(policy, prompts, constraint)
    found[0].call, found[0].logp

Between two decisions the text of a call is fixed. Its tokens are appended and read together with the token that was
decided last (jump-forward), and what follows the last decision, the description, is not read at all. Other kinds of
decoding, such as beams, take `rollouts.call_constraint.CallProcessor`, with a forward pass for every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rollouts.api import APICall
from rollouts.beam_forward import logits_option, other_state, unwrapped, why_not_shared
from rollouts.call_constraint import CallConstraint
from rollouts.call_grammar import State
from rollouts.responses import left_padded

# More than any call has: for models with a window.
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class Sampling:
    """How to draw a token from those that are allowed.

    Attributes:
        temperature: Divides the logits.
        top_p: Keep the likeliest tokens that have this probability together.
        seed: Of the draws; a batch has one sequence of random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be above 0, but is {self.temperature}; leave sampling out for greedy."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, but is {self.top_p}.")


@dataclass
class WrittenCall:
    """A call and how it was written.

    Attributes:
        call: What it says.
        text: As it was written, without the white space around it.
        token_ids: All tokens of the text, without an end token.
        token_logps: The policy's own log-probability of each, in nats, as if nothing were constrained. Tokens that were
            not read (the description, unless asked for) have none, so this can be shorter than `token_ids`.
        decisions: Positions of the tokens that were chosen; all others had to be.
        choice_logps: Log-probability of each decision among the tokens that were allowed, in nats.
        model_decisions: How many decisions it took to choose the model; the first ones.
        num_passes: Forward passes in which this call took part, the one over the prompt included.
    """

    call: APICall
    text: str
    token_ids: list[int]
    token_logps: list[float]
    decisions: list[int]
    choice_logps: list[float]
    model_decisions: int
    num_passes: int

    @property
    def model_logp(self) -> float:
        """Log-probability of choosing this model among those that were allowed, in nats."""
        return sum(self.choice_logps[: self.model_decisions])

    @property
    def logp(self) -> float:
        """Log-probability of what was read, in nats."""
        return sum(self.token_logps)


@torch.inference_mode()
def generate_calls(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    constraint: CallConstraint | Sequence[CallConstraint],
    *,
    sampling: Sampling | None = None,
    jump_forward: bool = True,
    read_description: bool = False,
) -> list[WrittenCall]:
    """One call for each prompt, all at once.

    Args:
        policy: A causal language model in evaluation mode, on its device.
        prompts: Token ids.
        constraint: Of the policy's dialogue; one for all prompts, or one for each.
        sampling: How to draw tokens; `None`: the likeliest one that is allowed.
        jump_forward: Append what has to follow without asking. Off, every token is asked for, as in `generate`.
        read_description: Read the description as well, for its log-probability.

    Raises:
        TokenizerError: See `CallConstraint.allowed`.
        ValueError: The model keeps other state than keys and values, or another number of constraints than of prompts.
    """
    if reason := other_state(policy):
        raise ValueError(
            f"`policy` ({type(unwrapped(policy)).__name__}) can't read several tokens at once, because {reason}. "
            "Use generate() with rollouts.call_constraint.CallProcessor."
        )
    constraints = [constraint] * len(prompts) if isinstance(constraint, CallConstraint) else list(constraint)
    if len(constraints) != len(prompts):
        raise ValueError(f"`constraint` has {len(constraints)} constraints for {len(prompts)} prompts.")
    rows = [_Row(list(prompt), own, own.grammar.start) for prompt, own in zip(prompts, constraints, strict=True)]
    if not rows:
        return []
    generator = None if sampling is None else torch.Generator().manual_seed(sampling.seed)
    # The rows of a batch go on by different numbers of tokens, so there are gaps between them. Where a model can't be
    # told to overlook gaps, every prompt is read by itself, and there are none.
    longest = max(map(len, prompts), default=0) + _MOST_TOKENS
    together = len(rows) < 2 or why_not_shared(policy, longest) is None
    for batch in [rows] if together else [[row] for row in rows]:
        _Batch(policy, batch, sampling, generator, jump_forward, read_description).run()
    return [row.written() for row in rows]


@dataclass
class _Row:
    """A call that is being written."""

    prompt: list[int]
    constraint: CallConstraint
    state: State
    text: bytes = b""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    choice_logps: list[float] = field(default_factory=list)
    model_decisions: int = 0
    num_passes: int = 0

    @property
    def is_finished(self) -> bool:
        return self.constraint.grammar.is_finished(self.state)

    def decide(self, token: int, logp: float, choice_logp: float) -> None:
        self.model_decisions += self.constraint.grammar.chosen_model(self.state) is None
        self.decisions.append(len(self.ids))
        self.logps.append(logp)
        self.choice_logps.append(choice_logp)
        self.append(token)

    def append(self, token: int) -> None:
        state = self.constraint.advance(self.state, token)
        assert state is not None, f"token {token} is not allowed"
        self.state = state
        self.ids.append(token)
        self.text += self.constraint.tokens.of_id[token] or b""

    def follow(self) -> list[int]:
        """Append what has to come next, and return it."""
        found: list[int] = []
        while not self.is_finished:
            ids, _ = self.constraint.forced(self.state, self.text)
            if not ids:
                allowed = self.constraint.allowed(self.state)
                if len(allowed) > 1:
                    break
                ids = allowed.tolist()
            for token in ids:
                self.append(token)
            found += ids
        return found

    def written(self) -> WrittenCall:
        return WrittenCall(
            call=self.constraint.grammar.call(self.state),
            text=self.text.decode().strip(),
            token_ids=self.ids,
            token_logps=self.logps,
            decisions=self.decisions,
            choice_logps=self.choice_logps,
            model_decisions=self.model_decisions,
            num_passes=self.num_passes,
        )


class _Batch:
    """Rows that share their forward passes."""

    def __init__(
        self,
        policy: Any,
        rows: list[_Row],
        sampling: Sampling | None,
        generator: torch.Generator | None,
        jump_forward: bool,
        read_description: bool,
    ) -> None:
        self._policy = policy
        self._rows = rows
        self._sampling = sampling
        self._generator = generator
        self._jump_forward = jump_forward
        self._read_description = read_description
        self._options = logits_option(policy)
        # Without a configuration, layers with a sliding window keep everything too, and the mask decides.
        self._cache = DynamicCache() if len(rows) > 1 else DynamicCache(config=unwrapped(policy).config)
        self._mask = torch.zeros(len(rows), 0, dtype=torch.long, device=policy.device)

    def run(self) -> None:
        followed = [row.follow() if self._jump_forward else [] for row in self._rows]
        logits = self._read([row.prompt + ids for row, ids in zip(self._rows, followed, strict=True)], followed)
        while True:
            kept = self._drop_finished()  # those whose description has been read
            if not kept:
                return
            chosen = self._decide(logits[kept])
            followed = [row.follow() if self._jump_forward else [] for row in self._rows]
            if not self._read_description:
                kept = self._drop_finished()
                chosen, followed = [chosen[i] for i in kept], [followed[i] for i in kept]
                if not self._rows:
                    return
            logits = self._read([[token, *ids] for token, ids in zip(chosen, followed, strict=True)], followed)

    def _read(self, pieces: list[list[int]], followed: list[list[int]]) -> Tensor:
        """Feed a piece to each row, note the log-probabilities of its last tokens, which followed, and return the
        logits after it. Shape (rows, vocabulary)."""
        keep = max(map(len, followed)) + 1
        input_ids, mask = left_padded(pieces, 0, self._mask.device)
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        output = self._policy(
            input_ids=input_ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({self._options: keep} if self._options else {}),
        )
        if self._cache.get_seq_length() != self._mask.shape[1]:
            raise ValueError(
                f"`policy` kept {self._cache.get_seq_length()} of {self._mask.shape[1]} tokens in its cache. Call "
                "policy.eval(): with gradient checkpointing a model in training mode keeps no cache."
            )
        logits = output.logits[:, -keep:].float()
        if keep > 1:
            # Position j predicts the token after it.
            logps = logits[:, :-1].gather(2, input_ids[:, 1 - keep :, None])[:, :, 0] - logits[:, :-1].logsumexp(2)
            for row, ids, own in zip(self._rows, followed, logps.tolist(), strict=True):
                row.logps += own[len(own) - len(ids) :]
        for row in self._rows:
            row.num_passes += 1
        return logits[:, -1]

    def _decide(self, logits: Tensor) -> list[int]:
        """Choose a token for each row."""
        allowed = [torch.from_numpy(row.constraint.allowed(row.state)) for row in self._rows]
        columns = torch.nn.utils.rnn.pad_sequence(allowed, batch_first=True, padding_value=-1).to(logits.device)
        values = logits.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -torch.inf)
        if self._sampling is None:
            picked = values.argmax(1, keepdim=True)
        else:
            picked = _draw(values, self._sampling, self._generator)
        value = values.gather(1, picked)
        logps = torch.cat([value - logits.logsumexp(1, keepdim=True), value - values.logsumexp(1, keepdim=True)], dim=1)
        chosen = columns.gather(1, picked)[:, 0].tolist()
        for row, token, (logp, choice_logp) in zip(self._rows, chosen, logps.tolist(), strict=True):
            row.decide(token, logp, choice_logp)
        return chosen

    def _drop_finished(self) -> list[int]:
        """Leave out rows that are done; the indices of the others."""
        kept = [i for i, row in enumerate(self._rows) if not row.is_finished]
        if len(kept) < len(self._rows):
            self._rows = [self._rows[i] for i in kept]
            index = torch.tensor(kept, dtype=torch.long, device=self._mask.device)
            self._mask = self._mask[index]
            if kept:
                self._cache.batch_select_indices(index)
        return kept


def _draw(values: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Indices drawn from softmax(values / temperature), of the likeliest `top_p`. Shape (rows, 1)."""
    probabilities = (values / sampling.temperature).softmax(1).cpu()
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(1, descending=True)
        ordered[ordered.cumsum(1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    # Drawn on the CPU: the same on every device.
    return torch.multinomial(probabilities, 1, generator=generator).to(values.device)
