"""`python -m rollouts.candidates` on a toy policy: what is written, resuming, bad input."""

import json
import subprocess
import sys

import pytest

from align.scratch import build_from_scratch
from rewards.commandline import ConfigError
from rollouts.candidates import CandidatesConfig, candidate, main
from rollouts.catalog import Catalog


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    from align.scratch import ScratchConfig

    folder = tmp_path_factory.mktemp("policy")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = build_from_scratch(ScratchConfig(vocab_size=320, intermediate_size=32, **size), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(policy, bench, tmp_path):
    def make(**changes):
        options = {
            "model_name_or_path": str(policy),
            "catalog": str(bench / "catalog.jsonl"),
            "dataset": str(bench / "sd15"),
            "split": "eval",
            "output": str(tmp_path / "out" / "candidates.jsonl"),
            "num_samples": 2,
            "batch_size": 2,
            "max_new_tokens": 6,
        }
        return CandidatesConfig(**(options | changes))

    return make


def read(config):
    with open(config.output, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_prompt_gets_its_candidates_and_the_seed_decides_them(config, bench, tmp_path):
    import datasets

    main(config())
    rows = read(config())
    evaluation = datasets.load_from_disk(str(bench / "sd15"))["eval"]
    assert [row["prompt_id"] for row in rows] == evaluation["id"]
    assert [row["instruction"] for row in rows] == evaluation["instruction"]
    for row in rows:
        assert [c["origin"] for c in row["candidates"]] == ["greedy", "multinomial", "multinomial"]
        assert all(c["call"] is None and c["error"] == "not_json" for c in row["candidates"])
    samples = [c["response"] for row in rows for c in row["candidates"][1:]]
    assert len(set(samples)) > len(samples) / 2, "samples of an untrained policy differ"
    other = config(output=str(tmp_path / "again.jsonl"))
    main(other)
    assert read(other) == rows
    reseeded = config(output=str(tmp_path / "other.jsonl"), seed=1)
    main(reseeded)
    assert read(reseeded) != rows
    assert datasets.load_dataset("json", data_files=config().output, cache_dir=str(tmp_path))["train"].num_rows == len(
        rows
    )


def test_interrupted_run_goes_on_where_it_was(config):
    main(config(num_samples=0))
    whole = read(config())
    with open(config().output, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in whole[:3])
        file.write('{"prompt_id": "cut sh')
    main(config(num_samples=0))
    assert read(config()) == whole


def test_candidate_of_a_valid_call(bench):
    catalog = Catalog.load(bench / "catalog.jsonl")
    call = next(iter(catalog.values())).default_call()
    row = candidate(call.to_json(), "greedy", catalog)
    assert row == {"response": call.to_json(), "call": call.to_dict(), "origin": "greedy", "error": None}
    gone = call.model_copy(update={"model": "Gone - v1"}).to_json()
    assert candidate(gone, "greedy", catalog) == {
        "response": gone,
        "call": None,
        "origin": "greedy",
        "error": "unknown_model",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "`split` 'test' is not in .*'sft', 'rrhf', 'eval'"),
        ({"dataset": "nowhere"}, "is no DatasetDict; name one architecture's folder"),
        ({"dataset": None, "prompts": "nowhere.txt"}, "There is no prompt file at nowhere.txt"),
    ],
)
def test_bad_input_is_named(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(config(**changes))


def test_candidates_of_other_prompts_are_not_mixed_in(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    main(config(dataset=None, prompts=str(prompts), num_samples=0))
    assert [row["prompt_id"] for row in read(config())] == ["prompts-0", "prompts-1"]
    with pytest.raises(ConfigError, match="holds candidates of other prompts"):
        main(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "p.txt"}, "either `dataset` or `prompts`"),
        ({"greedy": False, "num_samples": 0}, "There must be candidates"),
    ],
)
def test_options_are_checked(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.slow
def test_command_ends_with_one_line_on_a_missing_catalogue(policy, tmp_path):
    flags = ["--model_name_or_path", str(policy), "--catalog", "nowhere.jsonl", "--prompts", "p", "--output", "o"]
    done = subprocess.run(
        [sys.executable, "-m", "rollouts.candidates", *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr.strip()) == (2, "error: There is no catalogue file at nowhere.jsonl.")
