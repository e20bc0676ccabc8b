"""The bookkeeping of diverse beam search: what each group of beams chooses, keeps and ends with.

Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424, with the rules of transformers 4.52's group beam search: its
scores, its order and its conditions for stopping. One rule differs on purpose: a group that has ended penalises
nothing, whereas there it went on "choosing" the pad token, and where that is EOS kept the other groups from ending.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EarlyStopping = bool | Literal["never"]


class GroupRules(NamedTuple):
    """What holds for every group of a search.

    Attributes:
        num_groups: Groups of a prompt.
        group_size: Beams of a group.
        diversity_penalty: Taken off a token's score for each beam of an earlier group that chose it in the same place.
        length_penalty: A finished sequence's score is its sum divided by its length to this power.
        early_stopping: True: a group ends when it has `group_size` finished sequences. False: when in addition no open
            beam promises better at its present length. "never": the same at the greatest length.
        max_new_tokens: Length at which open beams are taken as they are.
        eos_ids: Tokens that finish a sequence, on the search's device.
    """

    num_groups: int
    group_size: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: EarlyStopping
    max_new_tokens: int
    eos_ids: Tensor

    @property
    def num_candidates(self) -> int:
        """How many of a group's best continuations are looked at: enough that `group_size` of them are not EOS."""
        return max(2, 1 + self.eos_ids.numel()) * self.group_size


class Choices(NamedTuple):
    """What the groups chose at one step; `parents` are beams of the prompt, whatever their group.

    Attributes:
        scores, tokens, parents: The best candidates of each group, best first. Shape (prompts, groups, candidates).
        next_scores, next_tokens, next_parents: The beams that go on. Shape (prompts, beams).
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    next_scores: Tensor
    next_tokens: Tensor
    next_parents: Tensor


def choose(logps: Tensor, beam_scores: Tensor, places: Tensor, open_groups: Tensor, rules: GroupRules) -> Choices:
    """One step of all groups, in their order: later ones avoid what earlier ones have just chosen.

    Args:
        logps: Log-probabilities of the next token. Shape (prompts, beams, vocabulary).
        beam_scores: Sums so far. Shape (prompts, beams).
        places: Beams avoid each other's tokens only in the same place; those in place -1 are neither penalised nor
            counted. Shape (prompts, beams).
        open_groups: Groups that have not ended. Shape (prompts, groups).
        rules: Of the search.

    Raises:
        ValueError: The vocabulary has hardly more than the EOS tokens.
    """
    prompts, _, vocabulary = logps.shape
    size = rules.group_size
    if rules.num_candidates > size * vocabulary:
        raise ValueError(
            f"{rules.eos_ids.numel()} EOS tokens need a vocabulary of {rules.num_candidates // size} tokens, but it "
            f"has {vocabulary}. Check `eos_token_id`."
        )
    scores, tokens, parents, taken = [], [], [], []
    next_scores, next_tokens, next_parents = (
        torch.empty_like(places, dtype=t) for t in (logps.dtype, *[places.dtype] * 2)
    )
    for group in range(rules.num_groups):
        own = slice(group * size, (group + 1) * size)
        totals = logps[:, own] + beam_scores[:, own, None]
        if taken and rules.diversity_penalty:
            _penalise(totals, places[:, own], taken, rules.diversity_penalty)
        best = totals.view(prompts, size * vocabulary).topk(rules.num_candidates, dim=1)
        token, parent = best.indices % vocabulary, best.indices // vocabulary + own.start
        # A stable sort by "is EOS" puts the beams that go on first without changing their order.
        going_on = torch.isin(token, rules.eos_ids).byte().argsort(dim=1, stable=True)[:, :size]
        for result, value in ((next_scores, best.values), (next_tokens, token), (next_parents, parent)):
            result[:, own] = value.gather(1, going_on)
        stood = places.gather(1, next_parents[:, own])
        taken.append((next_tokens[:, own], stood.masked_fill(~open_groups[:, group, None], -1)))
        scores.append(best.values)
        tokens.append(token)
        parents.append(parent)
    stacked = (torch.stack(parts, dim=1) for parts in (scores, tokens, parents))
    return Choices(*stacked, next_scores, next_tokens, next_parents)


def _penalise(totals: Tensor, places: Tensor, taken: Sequence[tuple[Tensor, Tensor]], penalty: float) -> None:
    """Take `penalty` off each token as often as an earlier group has chosen it in the same place; in place."""
    tokens, stood = (torch.cat(parts, dim=1) for parts in zip(*taken, strict=True))  # (prompts, chosen so far)
    counts = (stood[:, None] == places[:, :, None]) & (stood[:, None] >= 0)  # (prompts, size, chosen so far)
    totals.scatter_add_(2, tokens[:, None].expand_as(counts), counts.to(totals.dtype) * -penalty)


class Hypothesis(NamedTuple):
    """A finished sequence: its final score and its tokens without EOS."""

    score: float
    tokens: list[int]


class Pool:
    """The best finished sequences of one group of one prompt, oldest first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.hypotheses: list[Hypothesis] = []

    @property
    def is_full(self) -> bool:
        """Whether it has as many as the group has beams."""
        return len(self.hypotheses) >= self._size

    @property
    def worst(self) -> float:
        """The lowest score in it."""
        return min(hypothesis.score for hypothesis in self.hypotheses)

    def add(self, hypothesis: Hypothesis) -> None:
        """Take it in; a full pool does so only for a strictly better score, and drops its (oldest) worst."""
        if self.is_full:
            worst = self.worst
            if hypothesis.score <= worst:
                return
            del self.hypotheses[next(i for i, known in enumerate(self.hypotheses) if known.score == worst)]
        self.hypotheses.append(hypothesis)


class PromptGroups:
    """The groups of one prompt: their finished sequences, and which of them have ended."""

    def __init__(self, rules: GroupRules) -> None:
        self._rules = rules
        self._pools = [Pool(rules.group_size) for _ in range(rules.num_groups)]
        self.ended = [False] * rules.num_groups

    def update(
        self, length: int, scores: Sequence[Sequence[float]], finished: Iterable[tuple[int, int, list[int]]]
    ) -> None:
        """Take in one step.

        Args:
            length: Tokens generated, this step's included.
            scores: Of every group, its candidates' sums. Shape (groups, candidates).
            finished: (group, rank among its candidates, tokens before EOS) of every candidate that is an EOS.
        """
        for group, rank, tokens in finished:
            # An EOS below that rank is a worse ending than going on with any of the group's beams.
            if not self.ended[group] and rank < self._rules.group_size:
                score = scores[group][rank] / length**self._rules.length_penalty
                self._pools[group].add(Hypothesis(score, tokens))
        for group, of_group in enumerate(scores):
            self.ended[group] = self.ended[group] or self._can_end(self._pools[group], max(of_group), length)

    def finish(self, scores: Sequence[float], tokens: Sequence[list[int]]) -> list[Hypothesis]:
        """All finished sequences in the library's order; groups that have not ended add their open beams.

        Args:
            scores: Sums of the beams. Shape (beams,).
            tokens: Of the beams.
        """
        size = self._rules.group_size
        for beam, (score, of_beam) in enumerate(zip(scores, tokens, strict=True)):
            if not self.ended[beam // size]:
                final = score / len(of_beam) ** self._rules.length_penalty
                self._pools[beam // size].add(Hypothesis(final, of_beam))
        found = [hypothesis for pool in self._pools for hypothesis in pool.hypotheses]
        # Of equal scores the library returns the later one first.
        return sorted(found, key=lambda hypothesis: hypothesis.score)[::-1]

    def _can_end(self, pool: Pool, best_sum: float, length: int) -> bool:
        if not pool.is_full:
            return False
        if self._rules.early_stopping is True:
            return True
        if self._rules.early_stopping == "never" and self._rules.length_penalty > 0:
            length = self._rules.max_new_tokens
        return pool.worst >= best_sum / length**self._rules.length_penalty
