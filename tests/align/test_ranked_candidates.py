"""Scored tables as training rows."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.pairs import DataError
from align.ranked_candidates import describe, read_scored, replay_rows, training_rows
from align.trainers.ranked_data import prepare_ranked
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.scored_table import write_scored

CALL = {
    "model": "A", "type": "Checkpoint", "base Model": "SD 1.5", "width": 512, "height": 512,
    "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0, "model description": "",
}  # fmt: skip


def candidate(model, reward, origin="multinomial", images=(), error=None, **more):
    return {
        "response": f'{{"model": "{model}"}}',
        "call": None if model is None else CALL | {"model": model},
        "origin": origin,
        "seeds": [1, 2, 3, 4],
        "images": [None] * 4,
        "image_rewards": list(images),
        "reward": reward,
        "reward_standard_error": 0.1 if reward is not None else None,
        "error": error,
    } | more


@pytest.fixture
def rows():
    """Two prompts: one with four candidates of which one has no reward and one is no call; one with none at all."""
    first = [
        candidate("A", 0.5, images=[0.4, 0.6, 0.5, 0.5]),
        candidate("B", 0.52, "diverse_beam", images=[0.6, 0.4, 0.5, 0.58]),
        candidate("C", None, "diverse_beam", images=[None] * 4, error="missing_file: gone"),
        candidate(None, None, error="not_json: no call"),
        candidate("D", 0.9, "default", images=[0.9, 0.9, 0.9, 0.9]),
    ]
    lines = [{"prompt_id": "p0", "candidates": first}, {"prompt_id": "p1", "candidates": [candidate("A", None)]}]
    return [line | {"instruction": {"prompt": "a red fox", "negative prompt": ""}, "policy": "abc"} for line in lines]


@pytest.fixture
def dialogue(tokenizer):
    return Dialogue(tokenizer, DialogueFormat())


def test_rows_hold_what_the_trainer_needs(rows, dialogue, tokenizer):
    first, second = training_rows(rows, dialogue, None)
    assert tokenizer.decode(first["prompt_ids"]) == dialogue.prompt_text("a red fox")
    # What can't be called is not there; what could not be drawn is left for the trainer to count.
    assert [tokenizer.decode(r, skip_special_tokens=True) for r in first["responses"]] == [
        '{"model": "A"}', '{"model": "B"}', '{"model": "C"}', '{"model": "D"}',
    ]  # fmt: skip
    assert all(r[-1] == tokenizer.eos_token_id for r in first["responses"])
    assert first["rewards"] == [0.5, 0.52, None, 0.9] and first["choices"] == ["A", "B", "C", "D"]
    data = prepare_ranked([first, second], tokenizer)
    assert data.skipped == {"no_reward": 2, "prompt_without_candidate": 1}
    assert data.rows[0]["rewards"] == [0.5, 0.52, 0.9]


def test_ties_come_from_the_differences_of_single_pictures(rows, dialogue, tokenizer):
    (row,) = prepare_ranked(training_rows(rows[:1], dialogue, None), tokenizer, tie_standard_errors=2.0).rows
    # B - A over the pictures: 0.2, -0.2, 0, 0.08; mean 0.02, sample deviation sqrt(0.0848 / 3), error half of that.
    expected = 2 * math.sqrt((0.18**2 + 0.22**2 + 0.02**2 + 0.06**2) / 3) / 2
    assert row["min_gap"][0][1] == row["min_gap"][1][0] == pytest.approx(expected)
    assert row["min_gap"][0][0] == 0
    # Without them (a table of an earlier version), errors of the two rewards are taken for independent.
    for one in rows[0]["candidates"]:
        one["image_rewards"] = None
    (row,) = prepare_ranked(training_rows(rows[:1], dialogue, None), tokenizer, tie_standard_errors=2.0).rows
    assert row["min_gap"][0][1] == pytest.approx(2 * math.hypot(0.1, 0.1))


def test_a_long_prompt_is_cut_and_a_response_never(rows, dialogue, tokenizer):
    rows[0]["instruction"]["prompt"] = "a red fox, watercolour, " * 40
    (whole,) = training_rows(rows[:1], dialogue, None)
    longest = max(map(len, whole["responses"]))
    (cut,) = training_rows(rows[:1], dialogue, 80)
    assert cut["responses"] == whole["responses"]
    assert 80 - 8 < len(cut["prompt_ids"]) + longest <= 80 < len(whole["prompt_ids"])
    assert len(prepare_ranked([cut], tokenizer, max_length=80).rows[0]["responses"]) == 3
    (hopeless,) = training_rows(rows[:1], dialogue, 8)
    with pytest.raises(ValueError, match="no candidate to learn from .*response_too_long: 3"):
        prepare_ranked([hopeless], tokenizer, max_length=8)


def test_describe_says_what_a_table_is_like(rows):
    numbers = describe(rows)
    assert numbers["reward/multinomial"] == 0.5 and numbers["reward/default"] == 0.9
    assert numbers["reward/best"] == 0.9 and numbers["reward/mean"] == pytest.approx((0.5 + 0.52 + 0.9) / 3)
    assert numbers["reward/noise_floor"] == pytest.approx(0.1)
    # Only A and B are closer than the error of their difference.
    assert numbers["reward/pairs_within_noise"] == pytest.approx(1 / 3)
    assert numbers["candidates"] == numbers["models"] == 3
    assert numbers["candidates/without_reward"] == pytest.approx(3 / 6)


def test_replayed_pairs_are_lists_of_one(dialogue, tokenizer):
    pairs = [
        {"instruction": {"prompt": f"fox {i}"}, "api": CALL | {"model": f"M{i}", "cfg scale": 7}} for i in range(9)
    ]
    replayed = replay_rows(pairs, 4, dialogue, None, seed=1)
    data = prepare_ranked(replayed, tokenizer, tie_standard_errors=1.0)
    assert len({row["choices"][0] for row in replayed}) == 4
    assert data.skipped == {"prompt_without_ranking": 4} and data.num_candidates == 1
    assert replay_rows(pairs, 4, dialogue, None, seed=1) == replayed != replay_rows(pairs, 4, dialogue, None, seed=2)
    assert len(replay_rows(pairs, 99, dialogue, None, seed=1)) == 9


class TestReading:
    def test_round_trip(self, rows, tmp_path):
        for row in rows:
            for one in row["candidates"]:
                one["scores"] = {"clip_score": [1.0, 2.0, 3.0, 4.0]}
        write_scored(tmp_path / "scored.parquet", rows, ["clip_score"])
        read = read_scored(tmp_path, policy="abc")
        assert read == rows

    def test_candidates_of_another_policy_are_refused(self, rows, tmp_path):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
        with pytest.raises(DataError, match=r"2 of 2 prompts have candidates of another policy \(abc; yours is xyz\)"):
            read_scored(tmp_path / "t.parquet", policy="xyz")
        assert len(read_scored(tmp_path / "t.parquet", policy=None)) == 2
        rows[0]["policy"] = rows[1]["policy"] = None  # a table that does not say
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
        assert len(read_scored(tmp_path / "t.parquet", policy="xyz")) == 2

    def test_bad_files_are_named(self, tmp_path):
        with pytest.raises(DataError, match="no table of scored candidates at .*nowhere"):
            read_scored(tmp_path / "nowhere")
        (tmp_path / "junk.parquet").write_bytes(b"junk")
        with pytest.raises(DataError, match=r"junk\.parquet can't be read as Parquet"):
            read_scored(tmp_path / "junk.parquet")
        pq.write_table(pa.table({"prompt_id": ["a"], "text": ["b"]}), tmp_path / "other.parquet")
        with pytest.raises(DataError, match="lacks instruction, candidates"):
            read_scored(tmp_path / "other.parquet")
        pq.write_table(pa.table({"prompt_id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
        with pytest.raises(DataError, match=r"empty\.parquet has no rows"):
            read_scored(tmp_path / "empty.parquet")
