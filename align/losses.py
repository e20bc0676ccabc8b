"""Losses on ranked candidates: RRHF (DiffAgent Eq. 7-10) and, on the same lists, SimPO, Bradley-Terry and DPO.

Pure functions of tensors. Shapes: P prompts, n candidates (as many for every prompt), T tokens of the longest response.
Absent candidates, which fill up a shorter list, have a reward of NaN or no tokens; they take part in nothing.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairReduction = Literal["sum", "mean"]


class PreferenceLoss(NamedTuple):
    """A loss on ranked candidates and its parts, all means over prompts; gradients flow through all three."""

    loss: Tensor
    """Scalar, what to call backward on."""
    rank: Tensor
    """Scalar, the part that orders candidates, unweighted."""
    ce: Tensor
    """Scalar, the negative log-likelihood of the best candidate, unweighted."""


def rrhf_loss(
    token_logps: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    rank_weight: float = 1.0,
    ce_weight: float = 1.0,
    length_exponent: float = 1.0,
    margin: float = 0.0,
    min_gap: Tensor | float = 0.0,
    pair_reduction: PairReduction = "sum",
    ce_per_token: bool = False,
) -> PreferenceLoss:
    """RRHF: make the likelihood rank candidates as the reward does (DiffAgent Eq. 7-10; Yuan et al. 2023).

    With p_i the length-normalised log-probability of candidate i and s_i its reward,
    `L_rank = sum over pairs s_i < s_j of max(0, p_i - p_j)`, `L_ce` is the negative log-likelihood of the candidate
    with the highest reward (of equal ones the first), summed over its tokens, and `L = L_rank + L_ce`.

    The authors' released code divides every p_i by the padded length, averages the cross-entropy over padding, and
    gets batches of several prompts wrong; this follows the equations. Beyond them, off by default: `margin`, `min_gap`,
    `pair_reduction="mean"`, `ce_per_token`.

    Args:
        token_logps: Log-probability of each response token (nats), with the end token. Shape (P, n, T).
        mask: True on response tokens. Shape (P, n, T).
        rewards: Higher is better; only their order within a prompt matters. Shape (P, n).
        rank_weight, ce_weight: Weights of the two parts.
        length_exponent: p_i is the sum of log-probabilities divided by length ** this; 1 is the paper, 0 the plain sum.
        margin: A pair is in order only if p_j exceeds p_i by this (nats per token).
        min_gap: Rewards that differ by no more are tied; a number, or one for each pair, shape (P, n, n).
        pair_reduction: Over the pairs of a prompt, "sum" as in the paper; "mean" makes the part independent of n.
        ce_per_token: Divide the cross-entropy by the length of the best candidate.

    Raises:
        ValueError: Shapes that don't fit together.
    """
    present = _present(token_logps, mask, rewards)
    logps = sequence_logps(token_logps, mask, length_exponent)
    pairs = ranked_pairs(rewards, present, min_gap)
    excess = logps.unsqueeze(2) - logps.unsqueeze(1) + margin  # (P, i, j): p_i - p_j
    rank = _over_pairs(excess.clamp(min=0), pairs, pair_reduction)
    ce = _best_nll(token_logps, mask, rewards, present, ce_per_token)
    return PreferenceLoss(rank_weight * rank + ce_weight * ce, rank, ce)


def simpo_loss(
    token_logps: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    beta: float = 2.0,
    margin: float = 0.0,
    rank_weight: float = 1.0,
    ce_weight: float = 0.0,
    length_exponent: float = 1.0,
    min_gap: Tensor | float = 0.0,
    pair_reduction: PairReduction = "mean",
    ce_per_token: bool = False,
) -> PreferenceLoss:
    """SimPO over all pairs of a ranked list: `-log sigmoid(beta * (p_j - p_i) - margin)` (Meng et al. 2024, Eq. 6).

    p is the mean log-probability per token, so no reference model is needed. With `margin` 0 this is the Bradley-Terry
    likelihood of the ranking's pairs. Arguments as in `rrhf_loss`, except:

    Args:
        beta: Scale of the difference.
        margin: The target margin gamma.
    """
    present = _present(token_logps, mask, rewards)
    logps = sequence_logps(token_logps, mask, length_exponent)
    pairs = ranked_pairs(rewards, present, min_gap)
    rank = _over_pairs(_logistic(logps, pairs, beta, margin), pairs, pair_reduction)
    ce = _best_nll(token_logps, mask, rewards, present, ce_per_token)
    return PreferenceLoss(rank_weight * rank + ce_weight * ce, rank, ce)


def dpo_loss(
    token_logps: Tensor,
    mask: Tensor,
    rewards: Tensor,
    ref_token_logps: Tensor,
    *,
    beta: float = 0.1,
    margin: float = 0.0,
    rank_weight: float = 1.0,
    ce_weight: float = 0.0,
    min_gap: Tensor | float = 0.0,
    pair_reduction: PairReduction = "mean",
    ce_per_token: bool = False,
) -> PreferenceLoss:
    """DPO over all pairs of a ranked list: `-log sigmoid(beta * (h_j - h_i))` (Rafailov et al. 2023, Eq. 7).

    h is the log-ratio of a whole response under policy and reference. Arguments as in `rrhf_loss`, except:

    Args:
        ref_token_logps: `token_logps` under the reference policy, without gradient. Shape (P, n, T).
        beta: Strength of the tie to the reference.
        margin: Subtracted inside the sigmoid.
    """
    present = _present(token_logps, mask, rewards)
    if ref_token_logps.shape != token_logps.shape:
        raise ValueError(
            f"`ref_token_logps` must have the shape of `token_logps`, {tuple(token_logps.shape)}, but has "
            f"{tuple(ref_token_logps.shape)}."
        )
    ratios = sequence_logps(token_logps - ref_token_logps.detach(), mask, 0.0)
    pairs = ranked_pairs(rewards, present, min_gap)
    rank = _over_pairs(_logistic(ratios, pairs, beta, margin), pairs, pair_reduction)
    ce = _best_nll(token_logps, mask, rewards, present, ce_per_token)
    return PreferenceLoss(rank_weight * rank + ce_weight * ce, rank, ce)


def reference_kl(token_logps: Tensor, mask: Tensor, ref_token_logps: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) on the candidates' tokens, a mean over tokens, candidates and prompts (nats).

    Per token `r - log r - 1` with r the ratio of reference to policy: never negative, and unbiased for tokens that the
    policy itself has sampled (Schulman's k3, as GRPO uses it); on others' candidates it is a penalty of the same kind.

    Args:
        token_logps, mask, ref_token_logps: As in `dpo_loss`. Candidates without tokens are left out.
    """
    log_ratio = (ref_token_logps.detach() - token_logps).masked_fill(~mask, 0.0)
    estimate = (log_ratio.exp() - log_ratio - 1).sum(-1) / mask.sum(-1).clamp(min=1)  # (P, n)
    present = mask.any(-1)
    return (estimate.sum(-1) / present.sum(-1).clamp(min=1)).mean()


def sequence_logps(token_logps: Tensor, mask: Tensor, length_exponent: float = 1.0) -> Tensor:
    """p of Eq. 7: the sum of a response's log-probabilities over its length ** `length_exponent`. Shape (P, n).

    A response without tokens has 0.
    """
    # masked_fill rather than a product: 0 * -inf is NaN.
    total = token_logps.masked_fill(~mask, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1).to(total.dtype) ** length_exponent


def ranked_pairs(rewards: Tensor, present: Tensor, min_gap: Tensor | float = 0.0) -> Tensor:
    """Which candidate is worse than which: True at (prompt, i, j) if `s_j - s_i > min_gap`. Shape (P, n, n).

    Args:
        rewards: Shape (P, n).
        present: False for candidates that take no part. Shape (P, n).
        min_gap: A number, or one for each pair, shape (P, n, n), symmetric.
    """
    # NaN compares as False, and so does nothing here.
    worse = rewards.unsqueeze(1) - rewards.unsqueeze(2) > min_gap
    return worse & present.unsqueeze(1) & present.unsqueeze(2)


def best_candidate(rewards: Tensor, present: Tensor) -> Tensor:
    """i' of Eq. 9: index of the highest reward, of equal ones the first; 0 where nothing is present. Shape (P,)."""
    filled = rewards.masked_fill(~present, float("-inf"))
    # argmax leaves open which of equal values it takes.
    return (filled == filled.max(1, keepdim=True).values).int().argmax(1)


def _present(token_logps: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    if token_logps.dim() != 3 or mask.shape != token_logps.shape or rewards.shape != token_logps.shape[:2]:
        raise ValueError(
            "`token_logps` and `mask` must be (prompts, candidates, tokens) and `rewards` (prompts, candidates), but "
            f"are {tuple(token_logps.shape)}, {tuple(mask.shape)} and {tuple(rewards.shape)}."
        )
    return mask.any(-1) & ~rewards.isnan()


def _over_pairs(values: Tensor, pairs: Tensor, reduction: PairReduction) -> Tensor:
    """Sum or mean over each prompt's pairs, then the mean over prompts."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"`pair_reduction` must be sum or mean, but is {reduction!r}.")
    per_prompt = torch.where(pairs, values, 0.0).sum((1, 2))
    if reduction == "mean":
        per_prompt = per_prompt / pairs.sum((1, 2)).clamp(min=1)
    return per_prompt.mean()


def _best_nll(token_logps: Tensor, mask: Tensor, rewards: Tensor, present: Tensor, per_token: bool) -> Tensor:
    logps = sequence_logps(token_logps, mask, 1.0 if per_token else 0.0)
    best = logps.gather(1, best_candidate(rewards, present).unsqueeze(1)).squeeze(1)
    return -torch.where(present.any(1), best, 0.0).mean()


def _logistic(scores: Tensor, pairs: Tensor, beta: float, margin: float) -> Tensor:
    """`-log sigmoid(beta * (score_j - score_i) - margin)` of every pair. Shape (P, n, n)."""
    ahead = scores.unsqueeze(1) - scores.unsqueeze(2)  # (P, i, j): how much j is ahead of i
    # Also before the sigmoid: a NaN (-inf less -inf) would give NaN gradients although it is not used.
    return -F.logsigmoid(beta * torch.where(pairs, ahead, 0.0) - margin)
