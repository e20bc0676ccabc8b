"""Rows of candidates: tokens, what is left out and counted, ties, and errors that name the row and the field."""

import logging
import math

import numpy as np
import pytest
from datasets import Dataset

from align.trainers.ranked_data import RankedDataError, prepare_ranked

NAN, INF = math.nan, math.inf


def row(**changes):
    return {"prompt": "a fox", "responses": ["[1]", "[2]", "[3]"], "rewards": [0.1, 0.9, 0.5]} | changes


def test_texts_get_the_end_token(tokenizer):
    data = prepare_ranked([row()], tokenizer)
    (one,) = data.rows
    assert tokenizer.decode(one["prompt_ids"]) == "a fox"
    assert [tokenizer.decode(r) for r in one["responses"]] == [f"[{i}]{tokenizer.eos_token}" for i in (1, 2, 3)]
    assert one["rewards"] == [0.1, 0.9, 0.5]
    assert (data.num_candidates, data.skipped) == (3, {})
    assert data.longest == len(one["prompt_ids"]) + max(map(len, one["responses"]))
    assert "min_gap" not in one


def test_token_ids_are_taken_as_they_are(tokenizer):
    given = {"prompt_ids": (5, 6), "responses": [[7, 8, 3], (9, 3), list(np.array([7, 3]))], "rewards": [1, 2, 3]}
    (one,) = prepare_ranked([given], tokenizer).rows
    assert one["prompt_ids"] == [5, 6]
    assert one["responses"] == [[7, 8, 3], [9, 3], [7, 3]]
    assert all(type(token) is int for response in one["responses"] for token in response)


def test_messages_are_rendered_with_the_template(tokenizer):
    messages = [{"role": "system", "content": "call"}, {"role": "user", "content": "a fox"}]
    (one,) = prepare_ranked([row(prompt=messages)], tokenizer).rows
    expected = "<|im_start|>system\ncall<|im_end|>\n<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(one["prompt_ids"]) == expected
    assert one["prompt_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_dataset_gives_the_same_as_a_list(tokenizer):
    rows = [row(choices=["a", "b", "c"]), row(rewards=[None, 0.1, 0.2], choices=["a", "c", "b"])]
    assert prepare_ranked(Dataset.from_list(rows), tokenizer) == prepare_ranked(rows, tokenizer)


@pytest.mark.parametrize("missing", [None, NAN, np.float32("nan")])
def test_candidates_without_a_reward_are_left_out(tokenizer, missing):
    data = prepare_ranked([row(rewards=[0.1, missing, 0.5], choices=["a", "b", "c"])], tokenizer)
    (one,) = data.rows
    assert [tokenizer.decode(r)[1] for r in one["responses"]] == ["1", "3"]
    assert (one["rewards"], one["choices"]) == ([0.1, 0.5], ["a", "c"])
    assert data.skipped == {"no_reward": 1}


@pytest.mark.parametrize("empty", ["", " \n", [], "end"])
def test_empty_responses_are_left_out(tokenizer, empty):
    empty = [tokenizer.eos_token_id] if empty == "end" else empty
    data = prepare_ranked([row(responses=["[1]", empty, "[3]"])], tokenizer)
    assert data.rows[0]["rewards"] == [0.1, 0.5]
    assert data.skipped == {"empty_response": 1}


def test_responses_that_do_not_fit_are_left_out(tokenizer):
    given = {"prompt_ids": [5] * 6, "responses": [[7] * 4, [7] * 5, [7, 8]], "rewards": [1.0, 2.0, 3.0]}
    data = prepare_ranked([given], tokenizer, max_length=10)
    assert data.rows[0]["rewards"] == [1.0, 3.0]
    assert data.skipped == {"response_too_long": 1}
    assert data.longest == 10
    assert prepare_ranked([given], tokenizer, max_length=11).skipped == {}


def test_prompts_that_rank_nothing_stay_and_are_counted(tokenizer):
    data = prepare_ranked([row(rewards=[0.5] * 3), row(responses=["[1]"], rewards=[0.2]), row()], tokenizer)
    assert [one["rewards"] for one in data.rows] == [[0.5] * 3, [0.2], [0.1, 0.9, 0.5]]
    assert data.skipped == {"prompt_without_ranking": 2}
    assert data.num_candidates == 3


def test_prompts_without_a_candidate_are_left_out_and_everything_is_reported(tokenizer, caplog):
    rows = [row(rewards=[None] * 3), row(), row(responses=["", "[2]", "[3]"], rewards=[1, None, NAN])]
    with caplog.at_level(logging.INFO, logger="align.trainers.ranked_data"):
        data = prepare_ranked(rows, tokenizer, what="eval_dataset")
    assert len(data.rows) == 1
    assert data.skipped == {"no_reward": 5, "empty_response": 1, "prompt_without_candidate": 2}
    assert "eval_dataset: no_reward 5, prompt_without_candidate 2, empty_response 1" in caplog.text


def test_nothing_left_says_why(tokenizer):
    with pytest.raises(RankedDataError, match=r"train_dataset has no candidate.*no_reward: 3, prompt_without_.*: 1"):
        prepare_ranked([row(rewards=[None] * 3)], tokenizer)
    with pytest.raises(RankedDataError, match="eval_dataset has no candidate to learn from .it has no rows"):
        prepare_ranked([], tokenizer, what="eval_dataset")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [0.1, 0.2]}, "`rewards` has 2 entries, but there are 3 responses"),
        ({"choices": ["a"]}, "`choices` has 1 entries, but there are 3 responses"),
        ({"rewards": [0.1, INF, 0.2]}, "`rewards` must be finite numbers, .* not inf"),
        ({"rewards": [0.1, -INF, 0.2]}, "`rewards` must be finite numbers, .* not -inf"),
        ({"rewards": [0.1, "0.2", 0.2]}, "`rewards` must be finite numbers, .* not '0.2'"),
        ({"rewards": [0.1, True, 0.2]}, "`rewards` must be finite numbers, .* not True"),
        ({"rewards": None}, "needs `rewards`, a list with an entry per candidate, but has None"),
        ({"responses": "[1]"}, r"needs `responses`, a list with an entry per candidate, but has '\[1\]'"),
        ({"responses": ["[1]", 2, "[3]"]}, "`responses` must be texts or token ids, but holds '2'"),
        ({"responses": ["[1]", [1.5], "[3]"]}, r"`responses` must be texts or token ids, but holds '\[1.5\]'"),
        ({"prompt": None}, r"needs `prompt` \(text or messages\) or `prompt_ids`, but has \['prompt', 'resp"),
        ({"prompt": ""}, "the prompt has no tokens, so nothing can predict a response"),
        ({"prompt_ids": []}, "the prompt has no tokens, so nothing can predict a response"),
    ],
)
def test_bad_rows_are_named(tokenizer, changes, message):
    with pytest.raises(RankedDataError, match=f"^train_dataset, row 1: {message}"):
        prepare_ranked([row(), row(**changes)], tokenizer)


# Ties. By hand: pictures of the same seeds, rewards 0.5, 1.5 and 1.0 on average.
PICTURES = [[0.0, 1.0], [1.0, 2.0], [1.5, 0.5]]


def test_ties_by_paired_standard_errors(tokenizer):
    given = row(rewards=[0.5, 1.5, 1.0], image_rewards=PICTURES)
    (one,) = prepare_ranked([given], tokenizer, tie_standard_errors=2.0).rows
    # Candidate 1 is better than 0 by 1 on every seed: no error at all. 2 less 0 is (1.5, -0.5), with a standard
    # deviation of sqrt(2) and so a standard error of 1; 2 less 1 is (0.5, -1.5), the same.
    assert np.allclose(one["min_gap"], [[0, 0, 2], [0, 0, 2], [2, 2, 0]])


def test_ties_by_independent_standard_errors(tokenizer):
    given = row(standard_errors=[0.3, 0.4, None])
    (one,) = prepare_ranked([given], tokenizer, tie_standard_errors=2.0).rows
    root2 = math.sqrt(2)
    assert np.allclose(one["min_gap"], [[0.6 * root2, 1.0, 0.6], [1.0, 0.8 * root2, 0.8], [0.6, 0.8, 0.0]])


@pytest.mark.parametrize("missing", [None, NAN])
def test_gaps_know_missing_pictures_and_left_out_candidates(tokenizer, missing):
    pictures = [[0.0, 1.0, missing], None, [1.5, 0.5, 7.0]]
    given = row(rewards=[0.5, None, 1.0], image_rewards=pictures)
    (one,) = prepare_ranked([given], tokenizer, tie_standard_errors=1.0).rows
    assert np.allclose(one["min_gap"], [[0, 1], [1, 0]])
    one_each = row(rewards=[0.5, None, 1.0], image_rewards=[[0.5, missing], None, [1.0, 2.0]])
    assert prepare_ranked([one_each], tokenizer, tie_standard_errors=1.0).rows[0]["min_gap"] == [[0, 0], [0, 0]]
    errors = row(standard_errors=[0.5, missing, 0.0])
    gap = prepare_ranked([errors], tokenizer, tie_standard_errors=1.0).rows[0]["min_gap"]
    assert gap[0][1] == gap[1][0] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "`tie_standard_errors` needs `image_rewards` or `standard_errors`, but the row has neither. Set it to 0"),
        ({"standard_errors": [0.1]}, "`standard_errors` has 1 entries, but there are 3 responses"),
        ({"image_rewards": PICTURES[:2]}, "`image_rewards` has 2 entries, but there are 3 responses"),
        (
            {"image_rewards": [*PICTURES[:2], [1.0]]},
            "`image_rewards` must have a list for every candidate .* one length",
        ),
        ({"image_rewards": [*PICTURES[:2], None]}, "`image_rewards` must have a list for every candidate .*None"),
    ],
)
def test_bad_errors_are_named(tokenizer, changes, message):
    with pytest.raises(RankedDataError, match=f"^train_dataset, row 0: {message}"):
        prepare_ranked([row(**changes)], tokenizer, tie_standard_errors=1.0)


def test_rows_are_not_modified(tokenizer):
    given = row(rewards=[0.1, None, 0.5], choices=["a", "b", "c"], standard_errors=[0.1, 0.2, 0.3])
    before = {name: list(value) for name, value in given.items()}
    prepare_ranked([given], tokenizer, tie_standard_errors=1.0)
    assert {name: list(value) for name, value in given.items()} == before
