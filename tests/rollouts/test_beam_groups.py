"""What groups choose and when they end, on numbers worked out by hand."""

import pytest
import torch

from rollouts.beam_groups import GroupRules, Hypothesis, Pool, PromptGroups, choose

A, B, C, EOS = range(4)


def rules(**changes):
    options = {"num_groups": 3, "group_size": 1, "diversity_penalty": 1.0, "length_penalty": 1.0}
    options |= {"early_stopping": False, "max_new_tokens": 10, "eos_ids": torch.tensor([EOS])}
    return GroupRules(**options | changes)


def step(scores, places=(0, 0, 0), open_groups=(True, True, True), **changes):
    """Tokens that go on when every group of one beam sees these log-probabilities of A, B, C, EOS."""
    logps = torch.tensor([[scores] * 3])
    choices = choose(logps, torch.zeros(1, 3), torch.tensor([places]), torch.tensor([open_groups]), rules(**changes))
    return choices.next_tokens[0].tolist(), choices.next_scores[0].tolist()


def test_later_groups_are_penalised_for_each_earlier_choice():
    # Group 1: A -0.1. Group 2: A -1.1, so B -0.5. Group 3: A -1.1, B -1.5, C -2.0: A again.
    assert step([-0.1, -0.5, -2.0, -9.0]) == ([A, B, A], pytest.approx([-0.1, -0.5, -1.1]))
    # A twice: -2.1 for the third, so C.
    assert step([-0.1, -5.0, -2.0, -9.0]) == ([A, A, C], pytest.approx([-0.1, -1.1, -2.0]))


@pytest.mark.parametrize(
    ("places", "tokens"),
    [((0, 0, 0), [A, B, A]), ((-1, -1, -1), [A, A, A]), ((7, 0, 7), [A, A, B]), ((-1, 0, 0), [A, A, B])],
)
def test_only_beams_in_the_same_place_avoid_each_other(places, tokens):
    assert step([-0.1, -0.5, -2.0, -9.0], places=places)[0] == tokens


def test_group_that_has_ended_penalises_nothing():
    assert step([-0.1, -0.5, -2.0, -9.0], open_groups=(False, True, True))[0] == [A, A, B]


def test_eos_never_goes_on_and_is_never_penalised():
    choices = choose(
        torch.tensor([[[-1.0, -2.0, -3.0, -0.1]] * 3]), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long),
        torch.ones(1, 3, dtype=torch.bool), rules(),
    )  # fmt: skip
    assert choices.tokens[0, :, 0].tolist() == [EOS] * 3
    assert choices.scores[0, :, 0].tolist() == pytest.approx([-0.1] * 3)
    # Each goes on with its best other token: A, then A at -2 and B at -2 are level, then whichever is left.
    assert choices.next_tokens[0, 0] == A and EOS not in choices.next_tokens[0].tolist()


def test_log_probabilities_are_left_as_they_were():
    logps = torch.tensor([[[-0.1, -0.5, -2.0, -9.0]] * 3])
    before = logps.clone()
    choose(logps, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), rules())
    assert torch.equal(logps, before)


def test_full_pool_takes_only_what_is_better_and_drops_its_oldest_worst():
    pool = Pool(2)
    for score, tokens in ((-1.0, [1]), (-1.0, [2])):
        pool.add(Hypothesis(score, tokens))
    pool.add(Hypothesis(-1.0, [3]))
    assert [h.tokens for h in pool.hypotheses] == [[1], [2]]
    pool.add(Hypothesis(-0.5, [4]))
    assert [h.tokens for h in pool.hypotheses] == [[2], [4]] and pool.worst == -1.0


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "best_sum", "ended"),
    [
        # Two finished sequences of score -1: an open beam of length 3 promises best_sum / 3, or by "never" / 10.
        (False, 1.0, -2.9, False),
        (False, 1.0, -3.1, True),
        ("never", 1.0, -3.1, False),
        ("never", 1.0, -10.1, True),
        (True, 1.0, -0.1, True),  # had ended as soon as there were two
        # Sums are compared as they are, the worse of -1 and -2 with best_sum.
        (False, 0.0, -1.95, False),
        ("never", 0.0, -2.1, True),
    ],
)
def test_when_a_group_ends(early_stopping, length_penalty, best_sum, ended):
    settings = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    groups = PromptGroups(rules(num_groups=1, group_size=2, **settings))
    groups.update(1, [[-1.0, -1.1]], [(0, 0, [])])
    assert groups.ended == [False]
    groups.update(2, [[-1.9, -2.0]], [(0, 1, [A])])
    assert groups.ended == [early_stopping is True]
    groups.update(3, [[best_sum, best_sum - 1]], [])
    assert groups.ended == [ended]


def test_end_that_is_worse_than_going_on_counts_for_nothing():
    groups = PromptGroups(rules(num_groups=1))
    groups.update(1, [[-1.0, -1.5]], [(0, 1, [])])  # EOS on the second rank of a group of one
    assert groups.finish([-4.0], [[A] * 10]) == [Hypothesis(-0.4, [A] * 10)]


def test_all_groups_are_ranked_together_and_later_ones_first_among_equals():
    groups = PromptGroups(rules(num_groups=3, early_stopping=True))
    groups.update(1, [[-3.0, -9.0], [-1.0, -9.0], [-5.0, -9.0]], [(0, 0, [A]), (1, 0, [B])])
    assert groups.ended == [True, True, False]
    # The open beam of the third group: -10 over 10 tokens is level with the second's -1.
    found = groups.finish([0.0, 0.0, -10.0], [[A] * 10] * 3)
    assert found == [Hypothesis(-1.0, [A] * 10), Hypothesis(-1.0, [B]), Hypothesis(-3.0, [A])]
