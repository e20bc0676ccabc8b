"""How well a policy's likelihoods order candidates, prompt by prompt."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.losses import best_candidate, ranked_pairs


def ranking_metrics(
    logps: Tensor, rewards: Tensor, present: Tensor, min_gap: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """One number per prompt of each metric; NaN where it does not exist. Shape (P,) each.

    Args:
        logps: p of each candidate. Shape (P, n).
        rewards: Shape (P, n).
        present: False for candidates that take no part. Shape (P, n).
        min_gap: Rewards that differ by no more are tied; see `align.losses.ranked_pairs`.

    Returns:
        `accuracy`: share of ranked pairs whose better candidate is likelier; `violations`: pairs whose worse one is
        (the terms of Eq. 8); `kendall_tau`: tau-b between p and reward; `margin`: p of the best candidate less the mean
        of the others; `chosen_reward`, `best_reward`, `mean_reward`: of the likeliest candidate, of the best one, and
        of all; `regret`: best less chosen.
    """
    pairs = ranked_pairs(rewards, present, min_gap)
    ahead = logps.unsqueeze(1) - logps.unsqueeze(2)  # (P, i, j): p_j - p_i
    number = pairs.sum((1, 2))
    known = rewards.masked_fill(~present, 0.0)
    count = present.sum(1)
    best = best_candidate(rewards, present).unsqueeze(1)
    likeliest = logps.masked_fill(~present, float("-inf")).argmax(1, keepdim=True)
    logp_of_best = logps.gather(1, best).squeeze(1)
    others = (logps.masked_fill(~present, 0.0).sum(1) - logp_of_best) / (count - 1)
    chosen, highest = known.gather(1, likeliest).squeeze(1), known.gather(1, best).squeeze(1)
    metrics = {
        "accuracy": ((ahead > 0) & pairs).sum((1, 2)) / number,
        "violations": ((ahead < 0) & pairs).sum((1, 2)).float(),
        "kendall_tau": _kendall_tau(logps, rewards, present),
        "margin": torch.where(count > 1, logp_of_best - others, torch.nan),
        "chosen_reward": chosen,
        "best_reward": highest,
        "mean_reward": known.sum(1) / count,
        "regret": highest - chosen,
    }
    return {name: torch.where(count > 0, value.float(), torch.nan) for name, value in metrics.items()}


def selection_entropy(choices: Sequence[int | str]) -> tuple[float, float]:
    """Entropy (nats) of what was chosen, and its exponential: how many equally frequent choices that amounts to.

    A policy that gives everybody the same model has 0 and 1: collapse.

    Raises:
        ValueError: If nothing was chosen.
    """
    if not choices:
        raise ValueError("The entropy of no choices does not exist.")
    shares = np.array(list(Counter(choices).values()), dtype=float) / len(choices)
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0  # no -0
    return entropy, math.exp(entropy)


def _kendall_tau(logps: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
    """tau-b: concordant less discordant pairs over the geometric mean of the pairs untied in each."""
    both = present.unsqueeze(1) & present.unsqueeze(2)
    of_rewards = torch.where(both, (rewards.unsqueeze(1) - rewards.unsqueeze(2)).sign(), 0.0)
    of_logps = torch.where(both, (logps.unsqueeze(1) - logps.unsqueeze(2)).sign(), 0.0)
    untied = (of_rewards.abs().sum((1, 2)) * of_logps.abs().sum((1, 2))).sqrt()
    return (of_rewards * of_logps).sum((1, 2)) / untied
