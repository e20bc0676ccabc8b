"""Losses on ranked candidates: the oracle's numbers, arithmetic by hand, and what must change nothing."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from align.losses import (
    best_candidate,
    dpo_loss,
    ranked_pairs,
    reference_kl,
    rrhf_loss,
    sequence_logps,
    simpo_loss,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "goldens" / "rrhf" / "loss_cases.json"
CASES = json.loads(GOLDEN.read_text())["cases"] if GOLDEN.is_file() else []
TOLERANCES = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}
NAN, INF = math.nan, math.inf


@pytest.fixture
def batch():
    """One prompt, three candidates of 1, 2 and 2 tokens; per-token means are -1, -2 and -3."""
    token_logps = torch.tensor([[[-1.0, -9.0], [-1.5, -2.5], [-3.0, -3.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, False], [True, True], [True, True]]])
    return token_logps, mask, torch.tensor([[0.1, 0.9, 0.5]], dtype=torch.float64)


def random_batch(seed=0):
    """Lists of different lengths, ties, missing rewards and missing candidates."""
    generator, (prompts, candidates, tokens) = torch.Generator().manual_seed(seed), (4, 5, 6)
    token_logps = -5 * torch.rand(prompts, candidates, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (prompts, candidates, 1), generator=generator)
    rewards = torch.randint(0, 4, (prompts, candidates), generator=generator).double()
    rewards[1, 2] = NAN
    mask = torch.arange(tokens) < lengths
    mask[2, 3:] = False
    return token_logps, mask, rewards


def reference_of(token_logps):
    return token_logps.flip(0, 1) - 0.5


LOSSES = {
    "rrhf": rrhf_loss,
    "rrhf with all options": partial(
        rrhf_loss, margin=0.3, min_gap=1.0, pair_reduction="mean", ce_per_token=True, length_exponent=0.5
    ),
    "simpo": partial(simpo_loss, margin=0.5, ce_weight=0.7),
    "dpo": lambda logps, mask, rewards: dpo_loss(logps, mask, rewards, reference_of(logps), ce_weight=0.7),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def softplus(x):
    return math.log1p(math.exp(x))


def close(found, expected):
    assert float(torch.as_tensor(found).detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.skipif(not CASES, reason=f"the oracle's answers are not at {GOLDEN}")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_oracle(case, dtype):
    """Values and gradients of the paper's equations, computed elsewhere in float64."""
    tolerance, expected = TOLERANCES[dtype], {k: torch.tensor(v, dtype=dtype) for k, v in case["paper"].items()}
    logps = torch.tensor([case["logp"]], dtype=dtype, requires_grad=True)
    mask, rewards = torch.tensor([case["mask"]]), torch.tensor([case["rewards"]], dtype=dtype)
    out = rrhf_loss(logps, mask, rewards, length_exponent=case["length_exponent"])
    close_to = partial(torch.testing.assert_close, **tolerance)
    close_to(sequence_logps(logps, mask, case["length_exponent"])[0], expected["p"])
    close_to(sequence_logps(logps, mask, 0.0)[0], expected["sum_logp"])
    for part in ("rank", "ce", "loss"):
        found = getattr(out, part)
        close_to(found, expected[part])
        (gradient,) = torch.autograd.grad(found, logps, retain_graph=True)
        close_to(gradient[0], expected[f"grad_{part}"])
    present = mask.any(-1) & ~rewards.isnan()
    assert best_candidate(rewards, present).tolist() == [case["paper"]["best"]]
    p = sequence_logps(logps, mask, case["length_exponent"])[0]
    violated = ranked_pairs(rewards, present)[0] & (p[:, None] > p[None, :])
    assert violated.nonzero().tolist() == sorted(case["paper"]["violated_pairs"])


@pytest.mark.skipif(not CASES, reason=f"the oracle's answers are not at {GOLDEN}")
def test_oracle_all_cases_as_one_batch():
    """Different numbers of candidates and tokens; the batch's loss is the mean over prompts."""
    candidates = max(len(case["logp"]) for case in CASES)
    tokens = max(len(case["logp"][0]) for case in CASES)
    logps = torch.full((len(CASES), candidates, tokens), -INF, dtype=torch.float64)
    mask = torch.zeros(logps.shape, dtype=torch.bool)
    rewards = torch.full(logps.shape[:2], NAN, dtype=torch.float64)
    for number, case in enumerate(CASES):
        n, t = len(case["logp"]), len(case["logp"][0])
        logps[number, :n, :t] = torch.tensor(case["logp"], dtype=torch.float64)
        mask[number, :n, :t] = torch.tensor(case["mask"])
        rewards[number, :n] = torch.tensor(case["rewards"], dtype=torch.float64)
    out = rrhf_loss(logps, mask, rewards)
    for part in ("rank", "ce", "loss"):
        close(getattr(out, part), sum(case["paper"][part] for case in CASES) / len(CASES))


# By hand. Pairs (worse, better) and p_worse - p_better: (0, 1) 1, (0, 2) 2, (2, 1) -1; best is candidate 1, NLL 4.


@pytest.mark.parametrize(
    ("options", "rank", "ce"),
    [
        ({}, 1 + 2, 4),
        ({"margin": 0.5}, 1.5 + 2.5, 4),
        ({"margin": 2.0}, 3 + 4 + 1, 4),
        ({"min_gap": 0.45}, 1, 4),  # rewards differ by 0.8, 0.4 and 0.4
        ({"min_gap": 1.0}, 0, 4),
        ({"min_gap": torch.tensor([[[0, 0, 0.5], [0, 0, 0], [0.5, 0, 0]]])}, 1, 4),
        ({"min_gap": torch.tensor([[[0, 0.9, 0], [0.9, 0, 0], [0, 0, 0]]])}, 2, 4),
        ({"pair_reduction": "mean"}, 3 / 3, 4),  # the pair in order counts, too
        ({"pair_reduction": "mean", "min_gap": 0.45}, 1, 4),
        ({"ce_per_token": True}, 3, 4 / 2),
        ({"length_exponent": 0.0}, 3 + 5, 4),  # sums -1, -4, -6
        ({"length_exponent": 0.5}, 2 * -1 + 4 / 2**0.5 + 6 / 2**0.5, 4),
        ({"length_exponent": 2.0}, 0.5, 4),  # -1, -1, -1.5
    ],
)
def test_rrhf_options_by_hand(batch, options, rank, ce):
    out = rrhf_loss(*batch, rank_weight=10.0, ce_weight=0.25, **options)
    close(out.rank, rank)
    close(out.ce, ce)
    close(out.loss, 10 * rank + 0.25 * ce)


def test_a_gap_equal_to_the_threshold_is_a_tie():
    rewards = torch.tensor([[0.0, 0.25, 0.75]])
    assert ranked_pairs(rewards, torch.ones(1, 3, dtype=torch.bool), 0.5).nonzero().tolist() == [[0, 0, 2]]


def test_simpo_and_bradley_terry_by_hand(batch):
    # -log sigmoid(beta * d - margin) = softplus(margin - beta * d), with d = p_better - p_worse = -1, -2, 1.
    out = simpo_loss(*batch, beta=2.0, margin=0.5)
    close(out.rank, (softplus(2.5) + softplus(4.5) + softplus(-1.5)) / 3)
    close(out.loss, float(out.rank))
    out = simpo_loss(*batch, beta=1.0, pair_reduction="sum", ce_weight=0.5)
    close(out.rank, softplus(1) + softplus(2) + softplus(-1))
    close(out.loss, float(out.rank) + 0.5 * 4)
    close(simpo_loss(*batch, beta=1.0, min_gap=0.45).rank, softplus(1))
    close(simpo_loss(*batch, beta=1.0, length_exponent=0.0, min_gap=0.45).rank, softplus(3))


def test_dpo_by_hand(batch):
    token_logps, mask, rewards = batch
    reference = torch.tensor([[[-2.0, 5.0], [-1.0, -1.0], [-3.0, -2.5]]], dtype=torch.float64, requires_grad=True)
    token_logps.requires_grad_()
    # Log-ratios of whole responses: -1 + 2 = 1, -4 + 2 = -2, -6 + 5.5 = -0.5; better - worse: -3, -1.5, -1.5.
    out = dpo_loss(token_logps, mask, rewards, reference, beta=0.1)
    close(out.rank, (softplus(0.3) + 2 * softplus(0.15)) / 3)
    close(dpo_loss(token_logps, mask, rewards, reference, beta=0.1, margin=0.2).rank,
          (softplus(0.5) + 2 * softplus(0.35)) / 3)  # fmt: skip
    out.loss.backward()
    assert reference.grad is None
    # d/dh of candidate 0, the worse one of two pairs: beta * sigmoid(-beta * d) / 3, at its one token.
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    close(token_logps.grad[0, 0, 0], 0.1 * (sigmoid(0.3) + sigmoid(0.15)) / 3)
    assert token_logps.grad[0, 0, 1] == 0


def test_dpo_starts_at_log_2(batch):
    token_logps, mask, rewards = batch
    close(dpo_loss(token_logps, mask, rewards, token_logps.clone()).rank, math.log(2))


def test_kl_estimate_by_hand():
    # r = reference / policy = 2 and 1/2 and 1: r - log r - 1.
    token_logps = torch.tensor([[[math.log(0.2), math.log(0.4)], [math.log(0.5), -9.0], [-1.0, -1.0]]])
    reference = torch.tensor([[[math.log(0.4), math.log(0.2)], [math.log(0.5), 7.0], [-9.0, -9.0]]])
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    of_first = ((2 - math.log(2) - 1) + (0.5 + math.log(2) - 1)) / 2
    found = reference_kl(token_logps.double(), mask, reference.double())
    assert float(found) == pytest.approx((of_first + 0) / 2, rel=1e-6)


def test_kl_estimate_is_unbiased_for_the_policys_own_tokens():
    policy, reference = torch.tensor([0.1, 0.2, 0.7]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = float(F.kl_div(reference, policy, log_target=True, reduction="sum"))
    # The expectation over the policy's tokens, by enumeration.
    each = [
        reference_kl(policy[t].view(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool), reference[t].view(1, 1, 1))
        for t in range(3)
    ]
    assert float((policy.exp() * torch.stack(each)).sum()) == pytest.approx(exact, rel=1e-5)


@every_loss
@pytest.mark.parametrize("value", [-INF, NAN, 0.0])
def test_padding_changes_nothing(loss, value):
    token_logps, mask, rewards = random_batch()
    expected = loss(token_logps, mask, rewards)
    # Tokens after the responses, and before them.
    for pad in ((0, 3), (2, 0)):
        padded = F.pad(token_logps, pad, value=value).requires_grad_()
        found = loss(padded, F.pad(mask, pad), rewards)
        torch.testing.assert_close(found, expected)
        found.loss.backward()
        assert padded.grad.isfinite().all()
        assert (padded.grad[~F.pad(mask, pad)] == 0).all()


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_order_of_candidates_changes_nothing(loss, seed):
    token_logps, mask, rewards = random_batch(seed=seed)
    # Without ties at the top, of which the first one counts.
    rewards = rewards + torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed)) / 4
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    reference = reference_of(token_logps)
    given = (token_logps, mask, rewards)
    shuffled = tuple(part[:, order] for part in given)
    if loss is LOSSES["dpo"]:
        loss = dpo_loss
        given, shuffled = (*given, reference), (*shuffled, reference[:, order])
    torch.testing.assert_close(loss(*shuffled), loss(*given))


@pytest.mark.parametrize("loss", [rrhf_loss, LOSSES["rrhf with all options"], LOSSES["simpo"]])
def test_absent_candidates_are_a_shorter_list(loss):
    token_logps, mask, rewards = (part[:1] for part in random_batch())
    expected = loss(token_logps, mask, rewards)
    more, reward = F.pad(token_logps, (0, 0, 1, 1), value=-0.01), F.pad(rewards, (1, 1), value=9.0)
    without_tokens = F.pad(mask, (0, 0, 1, 1), value=False)
    torch.testing.assert_close(loss(more, without_tokens, reward), expected)
    without_reward = F.pad(rewards, (1, 1), value=NAN)
    torch.testing.assert_close(loss(more, F.pad(mask, (0, 0, 1, 1), value=True), without_reward), expected)


@every_loss
def test_a_batch_is_the_mean_of_its_prompts(loss):
    token_logps, mask, rewards = random_batch()
    if loss is LOSSES["dpo"]:
        reference = reference_of(token_logps)
        parts = [dpo_loss(*(x[i : i + 1] for x in (token_logps, mask, rewards, reference))) for i in range(4)]
        loss = partial(dpo_loss, ref_token_logps=reference)
    else:
        parts = [loss(token_logps[i : i + 1], mask[i : i + 1], rewards[i : i + 1]) for i in range(4)]
    found = loss(token_logps, mask, rewards)
    for name in ("loss", "rank", "ce"):
        close(getattr(found, name), sum(float(getattr(part, name)) for part in parts) / 4)


@every_loss
def test_arguments_are_not_modified(loss):
    given = random_batch()
    before = [part.clone() for part in given]
    loss(*given)
    for part, was in zip(given, before, strict=True):
        torch.testing.assert_close(part, was, rtol=0, atol=0, equal_nan=True)


@every_loss
def test_an_impossible_token_of_a_worse_candidate_has_finite_gradients(loss):
    token_logps = torch.tensor([[[-1.0, -INF], [-1.5, -2.5], [-1.0, -3.0]]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[0.1, 0.9, 0.5]], dtype=torch.float64)
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    if loss is LOSSES["dpo"]:
        loss = partial(dpo_loss, ref_token_logps=torch.zeros(1, 3, 2, dtype=torch.float64))
    out = loss(token_logps, mask, rewards)
    out.loss.backward()
    assert out.loss.isfinite()
    assert token_logps.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("rewards", [[NAN, NAN], [0.5, NAN], [0.5, 0.5]])
def test_nothing_to_rank(loss, rewards):
    token_logps = torch.tensor([[[-1.0], [-2.0]]], dtype=torch.float64, requires_grad=True)
    out = loss(token_logps, torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([rewards], dtype=torch.float64))
    out.loss.backward()
    close(out.rank, 0)
    close(out.ce, 0 if math.isnan(rewards[0]) else 1)
    assert token_logps.grad[0, 1, 0] == 0


def test_best_of_equal_rewards_is_the_first():
    rewards = torch.tensor([[0.2, 0.9, 0.9], [NAN, 0.1, 0.1], [5.0, 1.0, 1.0], [NAN, NAN, NAN]])
    present = ~rewards.isnan()
    present[2, 0] = False
    assert best_candidate(rewards, present).tolist() == [1, 1, 1, 0]
    # On long lists of equal values argmax alone does not promise the first.
    assert best_candidate(torch.zeros(1, 1000), torch.ones(1, 1000, dtype=torch.bool)).tolist() == [0]


@every_loss
@pytest.mark.parametrize(
    ("logps", "mask", "rewards"), [((2, 3), (2, 3), (2,)), ((1, 2, 3), (1, 2), (1, 2)), ((1, 2, 3), (1, 2, 3), (1, 3))]
)
def test_shapes_that_do_not_fit(loss, logps, mask, rewards):
    given = (torch.zeros(logps), torch.ones(mask, dtype=torch.bool), torch.zeros(rewards))
    with pytest.raises(ValueError, match=r"must be \(prompts, candidates, tokens\).*\(prompts, candidates\)"):
        loss(*given)


def test_reference_of_another_shape(batch):
    with pytest.raises(ValueError, match=r"`ref_token_logps` must have the shape of `token_logps`, \(1, 3, 2\)"):
        dpo_loss(*batch, torch.zeros(1, 3, 1))


@pytest.mark.parametrize("loss", [rrhf_loss, simpo_loss])
def test_unknown_reduction(batch, loss):
    with pytest.raises(ValueError, match="`pair_reduction` must be sum or mean, but is 'max'"):
        loss(*batch, pair_reduction="max")
