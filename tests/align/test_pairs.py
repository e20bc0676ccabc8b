"""Instruction-call pairs: which folders are data sets, and what becomes of a row."""

import json

import datasets
import pytest

from align.pairs import DataError, encode_pairs, load_pairs, response_text
from rollouts.dialogue import Dialogue

API = {
    "model": "Pixel Wave - v10",
    "type": "Checkpoint",
    "base Model": "SD 1.5",
    "width": 512,
    "height": 512,
    "sampling method": "Euler a",
    "sampling steps": 20,
    "cfg scale": 7.0,
    "model description": "Soft light.",
}


def rows(count=3, **changes):
    return datasets.Dataset.from_list(
        [
            {"id": f"row-{i}", "instruction": {"prompt": f"fox {i}", "negative prompt": ""}, "api": API | changes}
            for i in range(count)
        ]
    )


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def test_the_folder_of_the_builder_or_one_data_set_in_it(tmp_path):
    save(tmp_path / "sd15", sft=rows(3), eval=rows(1))
    save(tmp_path / "sdxl", sft=rows(2), eval=rows(1))
    assert len(load_pairs(tmp_path, "SD 1.5")["sft"]) == 3
    assert len(load_pairs(str(tmp_path), "SDXL 1.0")["sft"]) == 2
    assert len(load_pairs(tmp_path / "sdxl", "SD 1.5")["sft"]) == 2  # a data set says itself what it is


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(
        DataError, match=r"has no DABench for SD 1.5 \(it has: none\). Build it with python -m align.bench"
    ):
        load_pairs(tmp_path / "nowhere", "SD 1.5")
    save(tmp_path / "sd15", sft=rows(), eval=rows())
    with pytest.raises(DataError, match=r"has no DABench for SDXL 1.0 \(it has: SD 1.5\)"):
        load_pairs(tmp_path, "SDXL 1.0")
    with pytest.raises(DataError, match="`architecture` must be one of SD 1.5, SDXL 1.0, but is 'sd15'"):
        load_pairs(tmp_path, "sd15")


@pytest.mark.parametrize("damage", ["dataset_dict.json", "sft/state.json", "sft/data-00000-of-00001.arrow"])
def test_a_damaged_data_set(tmp_path, damage):
    save(tmp_path / "sd15", sft=rows(), eval=rows())
    (tmp_path / "sd15" / damage).write_bytes(b'{"cut')
    with pytest.raises(DataError, match=r"sd15 can't be read: .*Build it again"):
        load_pairs(tmp_path, "SD 1.5")
    (tmp_path / "sd15" / damage).unlink()
    with pytest.raises(DataError):
        load_pairs(tmp_path, "SD 1.5")


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"split eval: the columns \['instruction', 'api'\] are missing"):
        load_pairs(save(tmp_path / "a", sft=rows(), eval=datasets.Dataset.from_list([{"id": "x"}])), "SD 1.5")
    with pytest.raises(DataError, match=r"the splits \['eval'\] are missing"):
        load_pairs(save(tmp_path / "b", sft=rows()), "SD 1.5")
    with pytest.raises(DataError, match="a split without rows"):
        load_pairs(save(tmp_path / "c", sft=rows(), eval=rows().select([])), "SD 1.5")


def test_response_text_is_the_canonical_one():
    """Whatever order and number type the columns of a data set have."""
    expected = json.dumps(API | {"cfg scale": 7})
    assert response_text(API) == response_text(dict(reversed(API.items()))) == expected
    assert response_text(rows()[0]["api"]) == expected


def test_rows_become_tokens_with_labels_on_the_response(tokenizer):
    dialogue = Dialogue(tokenizer)
    encoded = encode_pairs(rows(), dialogue, 1000, what="sft")
    assert encoded.column_names == ["input_ids", "labels"]
    for i, row in enumerate(encoded):
        prompt = dialogue.encode_prompt(f"fox {i}")
        assert row["input_ids"][: len(prompt)] == prompt
        learned = [label for label in row["labels"] if label != -100]
        assert row["labels"] == [-100] * len(prompt) + learned
        assert row["input_ids"] == prompt + learned
        assert tokenizer.decode(learned) == response_text(API) + "<|im_end|>"


def test_rows_that_are_cut_are_counted(tokenizer, caplog):
    dialogue = Dialogue(tokenizer)
    longest = max(len(row["input_ids"]) for row in encode_pairs(rows(), dialogue, 1000, what="sft"))
    with caplog.at_level("INFO", logger="align.pairs"):
        encoded = encode_pairs(rows(2), dialogue, longest - 1, what="eval")
    assert "eval: the user's text was cut in 2 of 2 rows" in caplog.text
    assert all(len(row["input_ids"]) < longest for row in encoded)
    assert all(
        tokenizer.decode([x for x in row["labels"] if x != -100]) == response_text(API) + "<|im_end|>"
        for row in encoded
    )


def test_rows_that_can_not_be_learned(tokenizer):
    dialogue = Dialogue(tokenizer)
    with pytest.raises(DataError, match="sft row 'row-0': unknown_sampler: .*'magic'"):
        encode_pairs(rows(**{"sampling method": "magic"}), dialogue, 1000, what="sft")
    with pytest.raises(DataError, match="sft row 'row-0': A dialogue needs .* only 20 are allowed"):
        encode_pairs(rows(), dialogue, 20, what="sft")
    with pytest.raises(DataError, match="eval has no rows"):
        encode_pairs(rows().select([]), dialogue, 1000, what="eval")
