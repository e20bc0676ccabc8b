"""Demonstrations: references, near duplicates, settings, rows."""

import json
import random

import pytest

from align.bench.chatgen.demonstrations import NeighbourReferences, settings_by_model, unlike_others
from align.bench.chatgen.rows import chat_row, read_jsonl, save_rows, write_jsonl
from align.bench.chatgen.schema import Chat, Reference, chat_text, row_features


def test_only_prompts_without_a_near_duplicate_may_be_tested_on():
    prompts = ["a red fox in snow", "snow, in a red fox", "a red fox", "a blue whale", "five six seven eight nine",
               "five six seven eight ten"]  # fmt: skip
    assert unlike_others(prompts, 0.8) == [False, False, True, True, True, True]
    assert unlike_others(prompts, 0.6) == [False, False, False, True, False, False]
    assert unlike_others([], 0.8) == []


def test_references_are_of_the_same_model_and_split(demonstration):
    items = [demonstration(str(n), prompt=f"fox {n}", model=f"m{n % 2}") for n in range(12)]
    splits = {item.id: "test" if int(item.id) >= 8 else "train" for item in items}
    references = NeighbourReferences(items, splits)
    rng, own = random.Random(0), 0
    for item in items * 40:
        found = references(item, rng)
        other = next(o for o in items if o.image == found.image)
        assert found.prompt == other.prompt and other.model == item.model and splits[other.id] == splits[item.id]
        own += other is item
    assert 0.4 < own / 480 < 0.6


def test_without_pictures_there_is_no_reference_and_alone_only_the_own_one(demonstration):
    bare = demonstration("1", image=None)
    assert NeighbourReferences([bare], {"1": "train"})(bare, random.Random(0)) is None
    alone = demonstration("2")
    assert NeighbourReferences([alone], {"2": "train"})(alone, random.Random(0)) == Reference(alone.image, alone.prompt)
    # One without a picture of its own points to another's.
    pair = NeighbourReferences([bare, demonstration("3", prompt="a whale")], {"1": "train", "3": "train"})
    assert pair(bare, random.Random(0)).prompt == "a whale"


def test_fingerprints_tell_when_others_changed(demonstration):
    items = [demonstration(str(n), model="m") for n in range(3)]
    splits = dict.fromkeys("012", "train")
    before = NeighbourReferences(items, splits).fingerprint(items[:1])
    assert before == NeighbourReferences(items, splits).fingerprint(items[:1])
    assert before != NeighbourReferences(items[:2], splits).fingerprint(items[:1])
    assert before != NeighbourReferences(items, splits | {"2": "test"}).fingerprint(items[:1])


def test_settings_count_demonstrations_for_training(demonstration):
    training = [demonstration(str(n), model="many") for n in range(10)] + [demonstration("x", model="few")] * 9
    assert settings_by_model(["many", "few", "none"], training, 10) == {
        "many": "supervised", "few": "few_shot", "none": "few_shot",
    }  # fmt: skip


def test_rows_hold_the_chat_its_picture_and_its_targets(task, tmp_path):
    (tmp_path / "images").mkdir()
    picture = tmp_path / "images" / "9.png"
    shown = task(kind="multimodal", reference=Reference(str(picture), "a fox in summer"))
    row = chat_row(Chat(shown, ("like this?",), "template"), "train", tmp_path)
    assert row["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "image": "images/9.png"},
                {"type": "text", "text": "like this?", "image": None},
            ],
        }
    ]
    assert row["source"]["reference"] == {"image": "images/9.png", "prompt": "a fox in summer"}
    outside = task(kind="multimodal", reference=Reference("/elsewhere/9.png", ""))
    assert chat_row(Chat(outside, ("x",), "t"), "train", tmp_path)["source"]["reference"]["image"] == "/elsewhere/9.png"


def test_rows_are_saved_and_read_back(task, tmp_path):
    history = task(targets=("a fox", "a red fox"), kind="history")
    chats = [Chat(history, ("a fox!", "red, please 🦊"), "small"), Chat(task(1), ("half a pair \ud800",), "small")]
    files = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    write_jsonl(files["train"], [chat_row(chat, "train") for chat in chats])
    write_jsonl(files["test"], [])
    save_rows(files, tmp_path / "chats", tmp_path)
    from datasets import load_from_disk

    data = load_from_disk(str(tmp_path / "chats"))
    assert data["train"].features == data["test"].features == row_features()
    first, second = data["train"]
    assert chat_text(first["messages"]) == "a fox!\nred, please 🦊" and first["source"]["turns"] == [
        "a fox",
        "a red fox",
    ]
    assert len(chat_text(first["messages"], None).split("\n")) == 3
    assert chat_text(second["messages"]) == "half a pair ?"
    assert json.loads(json.dumps(first)) == next(iter(read_jsonl(files["train"])))


@pytest.mark.parametrize("sides", [("train", "test"), ("test", "train")])
def test_saving_again_replaces_what_was_there(task, tmp_path, sides):
    for count in (2, 1):
        files = {side: tmp_path / f"{side}.jsonl" for side in sides}
        for path in files.values():
            write_jsonl(path, [chat_row(Chat(task(n), ("x",), "t"), "train") for n in range(count)])
        save_rows(files, tmp_path / "chats", tmp_path)
    from datasets import load_from_disk

    assert {name: len(rows) for name, rows in load_from_disk(str(tmp_path / "chats")).items()} == {
        "train": 1,
        "test": 1,
    }
