"""ChatGenBench as training data."""

import json

import pytest

from align.chat_dialogue import ChatDialogue
from align.chats import (
    demonstrations_per_model,
    encode_chats,
    load_chats,
    plan_text,
    shot_group,
    split_validation,
)
from align.pairs import DataError
from align.scratch import train_bpe_tokenizer


@pytest.fixture(scope="module")
def rows(chat_bench):
    return load_chats(chat_bench)["train"]


@pytest.fixture(scope="module")
def dialogue(rows):
    return ChatDialogue(train_bpe_tokenizer([plan_text(row) for row in rows], vocab_size=500))


def test_the_folder_and_the_data_set_in_it_load(chat_bench, rows):
    assert load_chats(chat_bench / "chats")["train"][0] == rows[0] and len(rows) == 8 * 8 * 3


def test_a_plan_holds_what_is_wanted_in_the_papers_order(rows):
    plan = json.loads(plan_text(rows[0]))
    assert list(plan) == ["prompt", "negative_prompt", "model", "arguments"]
    assert plan["arguments"] == {"sampler": "Euler a", "steps": 20, "cfg_scale": 7.0, "width": 512, "height": 512}


def test_validation_is_by_demonstration_and_does_not_change(rows):
    train, validation = split_validation(rows, 0.2)
    sides = [{row["source"]["demonstration"] for row in part} for part in (train, validation)]
    assert not sides[0] & sides[1] and len(train) + len(validation) == len(rows)
    assert 0.08 < len(validation) / len(rows) < 0.35
    again = split_validation(rows.shuffle(seed=1), 0.2)[1]
    assert sorted(again["id"]) == sorted(validation["id"])


@pytest.mark.parametrize("target", ["prompt", "plan"])
def test_what_is_learned_is_the_target_and_nothing_else(rows, dialogue, target):
    encoded = encode_chats(rows, dialogue, target, 400, what="train")
    for row, given in zip(rows, encoded, strict=True):
        learned = [token for token, label in zip(given["input_ids"], given["labels"], strict=True) if label != -100]
        wanted = row["prompt"] if target == "prompt" else plan_text(row)
        assert dialogue.decode(learned) == wanted
        text = dialogue.tokenizer.decode(given["input_ids"][: -len(learned)])
        assert row["messages"][-1]["content"][-1]["text"] in text and row["prompt"] not in text


def test_rows_that_do_not_fit_are_named(rows, dialogue):
    with pytest.raises(DataError, match=r"train row '0-0/0': .* only 20 are allowed"):
        encode_chats(rows, dialogue, "plan", 20, what="train")
    with pytest.raises(DataError, match="train has no rows"):
        encode_chats(rows.select([]), dialogue, "plan", 400, what="train")


def test_folders_without_chats_are_named(tmp_path, rows):
    with pytest.raises(DataError, match="has no chats. Build them with python -m align.bench.chatgen"):
        load_chats(tmp_path)
    from datasets import DatasetDict

    DatasetDict(train=rows).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match=r"the splits \['test'\] are missing"):
        load_chats(tmp_path / "one")
    less = rows.remove_columns(["prompt", "source"])
    DatasetDict(train=less, test=less).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"split train: the columns \['prompt', 'source'\] are missing"):
        load_chats(tmp_path / "two")


def test_demonstrations_count_once_however_many_chats_they_have():
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"model": m, "source": {"demonstration": d}} for m, d in (("A", "1"), ("A", "1"), ("A", "2"), ("B", "3"))]
    )
    assert demonstrations_per_model(rows) == {"A": 2, "B": 1}


def test_groups_by_demonstrations():
    assert [shot_group(n) for n in (0, 1, 2, 3, 5, 6, 1000)] == ["0", "1", "2", "3-5", "3-5", "6+", "6+"]
