"""Metrics of a ranking: numbers by hand, and Kendall's tau beside scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, kendalltau

from align.trainers.ranking_metrics import ranking_metrics, selection_entropy


def metrics(logps, rewards, present=None, min_gap=0.0):
    logps, rewards = torch.tensor([logps]), torch.tensor([rewards])
    present = ~rewards.isnan() if present is None else torch.tensor([present])
    found = ranking_metrics(logps, rewards, present, min_gap)
    assert all(value.shape == (1,) for value in found.values())
    return {name: value.item() for name, value in found.items()}


def test_by_hand():
    # By reward: 1 > 2 > 0; by likelihood: 0 > 1 > 2. Only the pair (2, 1) is in order.
    found = metrics([-1.0, -2.0, -3.0], [0.1, 0.9, 0.5])
    assert found == pytest.approx(
        {
            "accuracy": 1 / 3,
            "violations": 2,
            "kendall_tau": (1 - 2) / 3,
            "margin": -2 - (-1 - 3) / 2,
            "chosen_reward": 0.1,
            "best_reward": 0.9,
            "mean_reward": 0.5,
            "regret": 0.8,
        },
        rel=1e-6,
    )


def test_ties_and_absent_candidates():
    # 0 and 1 tie in reward, 2 and 3 in likelihood, 4 takes no part: five ranked pairs, of which (2, 3) is no violation.
    found = metrics([-1.0, -2.0, -3.0, -3.0, 0.0], [0.5, 0.5, 0.2, 0.7, math.nan])
    # Pairs (worse, better): (2, 0), (2, 1) in order; (0, 3), (1, 3) not; (2, 3) neither.
    assert (found["accuracy"], found["violations"]) == (pytest.approx(2 / 5), 2)
    assert found["chosen_reward"] == 0.5
    assert found["kendall_tau"] == pytest.approx(kendalltau([-1, -2, -3, -3], [0.5, 0.5, 0.2, 0.7]).statistic, abs=1e-6)
    # With a gap of 0.25 only (2, 0), (2, 1) and (2, 3) are ranked.
    assert metrics([-1.0, -2.0, -3.0, -3.0, 0.0], [0.5, 0.5, 0.2, 0.7, math.nan], min_gap=0.25)["accuracy"] == (
        pytest.approx(2 / 3)
    )


@pytest.mark.parametrize("seed", range(5))
def test_kendall_tau_is_scipys(seed):
    generator = np.random.default_rng(seed)
    logps = torch.tensor(generator.integers(-6, 0, (20, 7)), dtype=torch.float32)
    rewards = torch.tensor(generator.integers(0, 5, (20, 7)), dtype=torch.float32)
    present = torch.tensor(generator.random((20, 7)) < 0.8)
    found = ranking_metrics(logps, rewards, present)["kendall_tau"]
    for row in range(20):
        expected = kendalltau(logps[row][present[row]], rewards[row][present[row]]).statistic
        assert found[row].item() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_what_does_not_exist_is_nan():
    equal = metrics([-1.0, -2.0], [0.5, 0.5])
    assert math.isnan(equal["accuracy"])
    assert math.isnan(equal["kendall_tau"])
    assert (equal["violations"], equal["regret"], equal["margin"]) == (0, 0, 1)
    single = metrics([-1.0, -2.0], [0.5, math.nan])
    assert math.isnan(single["margin"])
    assert (single["chosen_reward"], single["mean_reward"]) == (0.5, 0.5)
    assert all(math.isnan(value) for value in metrics([-1.0, -2.0], [math.nan, math.nan]).values())
    assert all(math.isnan(value) for value in metrics([-1.0, -2.0], [1.0, 2.0], present=[False, False]).values())


def test_absent_candidates_never_win():
    found = metrics([-5.0, -0.1, -7.0], [0.1, 99.0, 0.3], present=[True, False, True])
    assert (found["best_reward"], found["chosen_reward"]) == (pytest.approx(0.3), pytest.approx(0.1))
    assert found["margin"] == -7 + 5


def test_selection_entropy_by_hand():
    # Shares 1/2, 1/4, 1/4: 1.5 bits.
    found, effective = selection_entropy(["a", "b", "a", "c"])
    assert found == pytest.approx(1.5 * math.log(2))
    assert effective == pytest.approx(2**1.5)
    assert found == pytest.approx(entropy([2, 1, 1]))
    collapsed = selection_entropy([7] * 5)
    assert collapsed == (0.0, 1.0)
    assert math.copysign(1, collapsed[0]) == 1
    assert selection_entropy(range(8)) == (pytest.approx(math.log(8)), pytest.approx(8))


def test_no_choices():
    with pytest.raises(ValueError, match="The entropy of no choices does not exist"):
        selection_entropy([])
