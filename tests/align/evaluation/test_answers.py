"""Answers that are kept (asking again after a kill is tested in test_hallucination.py)."""

import json

import pytest

from align.evaluation.answers import PolicyAnswers, policy_identity, prompt_text, read_answers
from align.evaluation.prompt_sets import PromptSet
from rewards.commandline import ConfigError

PROMPTS = PromptSet("Two prompts", ["a fox", {"prompt": "a dog", "negative prompt": "ugly"}], None)


def policy(**changes):
    return PolicyAnswers("gone/policy", **{"max_new_tokens": 8, "max_prompt_tokens": None, "batch_size": 2} | changes)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_policy_that_answered_everything_is_not_loaded(tmp_path):
    path = tmp_path / f"{PROMPTS.slug}.jsonl"
    rows = [{"index": 1, "prompt": "a dog", "text": "B"}, {"index": 0, "prompt": "a fox", "text": "A"}]
    write(path, [row | policy().origin for row in rows])
    assert [answer["text"] for answer in policy().answer(PROMPTS, path)] == ["A", "B"]
    assert policy().latency(PROMPTS, 0) is None


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="`model_name_or_path`: .*gone/policy"):
        policy().answer(PROMPTS, tmp_path / "answers.jsonl")
    with pytest.raises(ConfigError, match=r"`agents\.SFT`: .*gone/policy"):
        policy(option="agents.SFT").latency(PROMPTS, 1)


def test_whose_answers_they_are(tmp_path):
    path = tmp_path / "answers.jsonl"
    write(path, [{"index": 0, "prompt": "a fox", "text": "A"} | policy().origin])
    assert read_answers(path, PROMPTS, policy().origin)[0]["text"] == "A"
    with pytest.raises(ConfigError, match="of another policy or with other options"):
        read_answers(path, PROMPTS, policy(max_new_tokens=9).origin)
    with pytest.raises(ConfigError, match="to other prompts"):
        read_answers(path, PromptSet("Other", ["a cat"], None), policy().origin)


def test_other_weights_are_another_policy_and_the_same_ones_written_again_are_not(tmp_path):
    assert policy_identity("org/model") == "org/model"
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = policy_identity(str(tmp_path))
    assert first.startswith(f"{tmp_path} ") and policy_identity(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"1")  # a stage that was started again
    assert policy_identity(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert policy_identity(str(tmp_path)) != first


def test_the_prompt_of_an_instruction():
    assert [prompt_text(instruction) for instruction in PROMPTS.instructions] == ["a fox", "a dog"]
