"""`python -m rollouts.candidates` on a toy policy: what is written, resuming, several processes, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.scratch import build_from_scratch
from rewards.commandline import ConfigError
from rollouts.candidates import CandidatesConfig, main
from rollouts.catalog import Catalog
from rollouts.policy import load_policy, policy_fingerprint

ALL_KINDS = {
    "num_samples": 1,
    "num_beams": 3,
    "constrain_names": True,
    "diversity_penalty": 20.0,
    "default_call": True,
    "reconstruct": True,
    "max_new_tokens": 60,
}


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


@pytest.fixture
def prompts(tmp_path):
    """A file of 18 prompts: with `batch_size: 1` four units of 4 and one of 2."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"picture {i}\n" for i in range(18)))
    return {"dataset": None, "prompts": str(path), "batch_size": 1, "max_new_tokens": 24}


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


def test_beams_of_an_untrained_policy_become_calls(config, bench):
    main(config(**ALL_KINDS))
    catalog = Catalog.load(bench / "catalog.jsonl")
    default = catalog.default_call("SD 1.5")
    fingerprint = policy_fingerprint(config().model_name_or_path)
    rows = read(config())
    for row in rows:
        assert row["policy"] == fingerprint
        origins = ["greedy", "multinomial", "diverse_beam", "diverse_beam", "diverse_beam"]
        assert [raw["origin"] for raw in row["raw"]] == origins
        assert [raw["error"] for raw in row["raw"]] == ["not_json", "not_json", None, None, None]
        calls = [candidate["call"] for candidate in row["candidates"]]
        assert [c["origin"] for c in row["candidates"]] == ["diverse_beam"] * (len(calls) - 1) + ["default"]
        assert calls[-1] == default.to_dict()
        for candidate in row["candidates"][:-1]:
            # Nothing readable was sampled: the model's defaults.
            assert candidate["response"] == catalog[candidate["call"]["model"]].default_call().to_json()
    summary = json.loads(Path(config().output).with_suffix(".summary.json").read_text())
    assert summary["prompts"] == len(rows) and summary["policy"] == [fingerprint]
    assert summary["hallucination"]["greedy"] == {"responses": len(rows), "rate": 1, "reasons": {"not_json": len(rows)}}
    assert summary["hallucination"]["diverse_beam"] == {"responses": 3 * len(rows), "rate": 0, "reasons": {}}
    assert summary["distinct_models_per_prompt"]["max"] == 4
    saved = yaml.safe_load(Path(config().output).with_suffix(".config.yaml").read_text())
    assert saved["num_beams"] == 3 and saved["beam_parameters"] == "multinomial"


def test_beams_as_they_are_without_reconstruction(config):
    main(config(num_samples=0, num_beams=2, default_call=True))
    for row in read(config()):
        assert [c["origin"] for c in row["candidates"]] == ["greedy", "diverse_beam", "diverse_beam", "default"]
        assert [c["call"] is None for c in row["candidates"]] == [True, True, True, False]
        assert row["candidates"][1]["response"] == row["raw"][1]["text"]


def test_killed_run_gives_what_an_uninterrupted_one_gives(config, prompts, tmp_path):
    options = ALL_KINDS | prompts
    main(config(**options))
    whole = Path(config().output).read_bytes()
    lines = whole.splitlines(keepends=True)
    again = config(output=str(tmp_path / "again.jsonl"), **options)
    # What a kill can leave: the first unit and half of the second from one process, a cut line from another.
    Path(again.output + ".part-0").write_bytes(b"".join(lines[:6]))
    Path(again.output + ".part-7").write_bytes(lines[9][:-40])
    main(again)
    assert Path(again.output).read_bytes() == whole
    assert sorted(path.name for path in tmp_path.glob("again*")) == [
        "again.config.yaml", "again.jsonl", "again.summary.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config, prompts, tmp_path):
    one = config(**ALL_KINDS | prompts)
    main(one)
    two = config(**ALL_KINDS | prompts | {"output": str(tmp_path / "two.jsonl")})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({k: v for k, v in vars(two).items() if v is not None}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "rollouts.candidates", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(two.output).read_bytes() == Path(one.output).read_bytes()
    assert not list(tmp_path.glob("two.jsonl.part-*"))
    assert "10/10" in done.stderr and "8/8" in done.stderr, "each process has its share"


def test_each_process_does_its_own_units(config, prompts, monkeypatch):
    # The environment of the second of three processes; what it waits for is not there, so it may not wait.
    monkeypatch.setattr("rollouts.candidate_files.Processes.wait", lambda self: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    Path(config().output).parent.mkdir()  # the first process does that
    main(config(**prompts))
    part = Path(config().output + ".part-1").read_text().splitlines()
    # Units of 4 prompts, of which the second and the fifth are its own.
    assert [json.loads(line)["prompt_id"] for line in part] == [
        f"prompts-{i}" for i in (4, 5, 6, 7, 16, 17)
    ]  # fmt: skip


def test_another_policy_or_other_options_are_not_mixed_in(config, policy, tokenizer, tmp_path):
    main(config())
    with pytest.raises(ConfigError, match="was made with `num_samples` 2, not 3. Choose another file"):
        main(config(num_samples=3))
    with pytest.raises(ConfigError, match="was made with `seed` 0, not 1"):
        main(config(seed=1))
    before = Path(config().output).read_bytes()
    other = load_policy(str(policy))
    other.get_output_embeddings().weight.data += 1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ConfigError, match=f"candidates of another policy .*other is {policy_fingerprint(str(tmp_path / 'other'))}"
    ):
        main(config(model_name_or_path=str(tmp_path / "other")))
    assert Path(config().output).read_bytes() == before
    Path(config().output).with_suffix(".config.yaml").unlink()
    main(config(num_samples=3))  # nothing says how it was made; nothing is left to do either
    assert Path(config().output).read_bytes() == before


def test_whole_dabench_folder_means_the_architecture(config, bench):
    main(config(dataset=str(bench), num_samples=0))
    import datasets

    assert [row["prompt_id"] for row in read(config())] == datasets.load_from_disk(str(bench / "sd15"))["eval"]["id"]


def test_out_of_memory_names_the_batch_size(config, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rollouts.candidates.generate_responses", full)
    with pytest.raises(ConfigError, match="Out of memory with `batch_size` 2 and 0 beams; set a smaller"):
        main(config())


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
        ({"num_beams": -1}, "`num_beams` must be 0 or more, but is -1"),
        ({"num_beams": 2, "diversity_penalty": 0.0}, "`diversity_penalty` must be above 0, but is 0.0"),
        ({"constrain_names": True}, "`constrain_names` needs `num_beams` > 0 and `diversity: slot`"),
        ({"num_beams": 2, "constrain_names": True, "diversity": "hamming"}, "`constrain_names` needs"),
        ({"default_model": "A"}, r"`default_model` \('A'\) needs `default_call: true`"),
        ({"architecture": "SD 3"}, r"`architecture` must be one of \['SD 1.5', 'SDXL 1.0'\], but is 'SD 3'"),
        ({"diversity": "more"}, "`diversity` must be slot or hamming"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, but is 0"),
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
