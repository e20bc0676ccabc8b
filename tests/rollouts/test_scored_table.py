"""The table that a rollout ends in: rewards by hand, and what has none."""

import json
import math

import datasets
import pytest

from rewards.unified import UnifiedMetric
from rollouts.calls_table import Asked, Candidate, PromptCalls
from rollouts.requests import BatchKey, RenderFailure, RenderJob
from rollouts.scored_table import fit_on, scored_rows, write_scored

CALL = {"model": "M - v1", "type": "Checkpoint", "base Model": "SD 1.5", "width": 512, "height": 512,
        "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7, "model description": ""}  # fmt: skip
BATCH = BatchKey("SD 1.5", "M - v1", "", 1.0, "Euler a", 512, 512, 20, 7.0, 1)


def asked(column, *keys, failure=None):
    jobs = [RenderJob(key, BATCH, "a cat", "", seed) for seed, key in enumerate(keys)]
    return Asked(0, column, [0, 1], jobs, failure=failure)


PROMPTS = [PromptCalls("p1", "a cat", "", [Candidate(json.dumps(CALL), CALL, "default") for _ in range(4)])]
ASKED = [
    asked(0, "a", "b"),
    asked(1, "c", "d"),
    asked(2, "e", "f"),
    asked(3, failure=RenderFailure("invalid_call", "no width")),
]
SCORES = {"clip": {"a": 0.0, "b": 1.0, "c": 2.0, "d": 4.0}, "hps": {"a": 1.0, "b": 1.0, "c": 3.0, "d": 2.0}}
FAILURES = {"e": RenderFailure("black", "nothing there"), "f": RenderFailure("black", "nothing there")}


def rows(scores=SCORES, metric="fit", failures=FAILURES):
    metric = fit_on(ASKED, scores, "test") if metric == "fit" else metric
    images = {"a": "store/a.png", "c": "store/c.png"}
    return scored_rows(PROMPTS, ASKED, scores=scores, images=images, failures=failures, metric=metric)


def test_rewards_are_means_of_normalised_scores():
    first, second, *_ = rows()[0]["candidates"]
    # clip / 4 and (hps - 1) / 2, averaged: a 0, b 0.125, c 0.75, d 0.75.
    assert first["reward"] == pytest.approx(0.0625) and second["reward"] == pytest.approx(0.75)
    assert first["reward_standard_error"] == pytest.approx(0.0625)  # sd 0.125/sqrt(2), over sqrt(2)
    assert first["scores"] == {"clip": [0.0, 1.0], "hps": [1.0, 1.0]}
    assert first["images"] == ["store/a.png", None] and first["seeds"] == [0, 1]
    assert first["error"] is None


def test_what_could_not_be_drawn_has_no_reward_but_a_reason():
    *_, black, invalid = rows()[0]["candidates"]
    assert black["reward"] is None and black["error"] == "black: 2 of 2 pictures failed: nothing there"
    assert black["call"] == CALL and black["scores"] == {"clip": [None, None], "hps": [None, None]}
    assert invalid["reward"] is None and invalid["error"] == "invalid_call: no width" and invalid["call"] is None


def test_a_call_of_which_some_pictures_failed_is_judged_by_the_others():
    scores = {"clip": {"a": 0.0, "c": 2.0, "d": 4.0}}
    first = rows(scores, failures={"b": RenderFailure("not_finite", "NaN")})[0]["candidates"][0]
    assert first["reward"] == 0.0 and first["reward_standard_error"] is None
    assert first["error"] == "not_finite: 1 of 2 pictures failed: NaN"


def test_a_picture_that_one_scorer_could_not_score():
    scores = {"clip": {"a": 0.0, "b": 4.0}, "hps": {"a": 0.0, "c": 1.0}}
    first = rows(scores, failures={})[0]["candidates"][0]
    assert first["reward"] == 0.0 and first["error"] == "no_score: hps could not score every picture"


def test_a_given_metric_clips():
    metric = UnifiedMetric.fit({"clip": [0.0, 1.0], "hps": [0.0, 2.0]}, population="earlier")
    second = rows(metric=metric)[0]["candidates"][1]
    assert second["reward"] == 1.0


@pytest.mark.parametrize("scores", [{}, {"clip": {}}, {"clip": {"a": 1.0, "b": 1.0}}])
def test_scores_that_do_not_differ_make_no_metric(scores):
    assert fit_on(ASKED, scores, "test") is None
    assert all(candidate["reward"] is None for candidate in rows(scores)[0]["candidates"])


def test_datasets_reads_the_table(tmp_path):
    write_scored(tmp_path / "scored.parquet", rows(), list(SCORES))
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    [row] = table
    first = row["candidates"][0]
    assert row["instruction"] == {"prompt": "a cat", "negative prompt": ""}
    assert first["call"] == CALL and first["scores"]["clip"] == [0.0, 1.0]
    assert math.isclose(first["reward"], 0.0625)


def test_a_table_without_scorers(tmp_path):
    write_scored(tmp_path / "scored.parquet", rows({}), [])
    [row] = datasets.load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    assert "scores" not in row["candidates"][0] and row["candidates"][0]["seeds"] == [0, 1]
