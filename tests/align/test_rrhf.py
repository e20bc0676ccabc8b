"""`align/rrhf.py` end to end: from a table, with its own rollout, killed in every stage, on several processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from align.run_directory import read_metrics
from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rollouts.catalog import Catalog
from rollouts.dialogue import DialogueFormat
from rollouts.policy import policy_fingerprint
from rollouts.scored_table import write_scored

REPOSITORY = Path(__file__).parents[2]
TOY = {
    "max_length": 400,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 3.0e-3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_strategy": "no",
    "eval_share": 0.2,
    "report_to": "none",
    "disable_tqdm": True,
}
MODELS = 4


def command(folder, policy, table, *flags, launcher=(), config=None):
    """`accelerate launch align/rrhf.py`, as a user types it."""
    folder.mkdir(exist_ok=True)
    (folder / "rrhf.yaml").write_text(yaml.safe_dump(TOY | (config or {})))
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *(launcher or ("--cpu", "--num_processes", "1")),
        *("align/rrhf.py", "--config", str(folder / "rrhf.yaml"), "--model_name_or_path", str(policy)),
        *("--dataset", str(table), "--output_dir", str(folder / "run"), *flags),
    ]


def launch(*args, timeout=280, environment=None, **kwargs):
    return subprocess.run(
        command(*args, **kwargs),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, env=os.environ | (environment or {}),
    )  # fmt: skip


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def catalog(bench):
    return Catalog.load(bench / "catalog.jsonl")


@pytest.fixture(scope="module")
def policy(bench, catalog, tmp_path_factory):
    """An untrained policy with a tokenizer that knows the catalogue's calls."""
    folder = tmp_path_factory.mktemp("policy")
    texts = [entry.default_call().to_json() for entry in catalog.of_architecture("SD 1.5")]
    tokenizer = train_bpe_tokenizer(texts, vocab_size=600)
    size = ScratchConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=1024,
    )  # fmt: skip
    build_from_scratch(size, tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DialogueFormat().save(folder)
    return folder


@pytest.fixture(scope="module")
def table(bench, catalog, policy, tmp_path_factory):
    """Scored candidates: of `MODELS` models the same one is always the best, with a picture each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("table")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    calls = [entry.default_call() for entry in catalog.of_architecture("SD 1.5")[:MODELS]]
    rows = []
    for number, row in enumerate(datasets.load_from_disk(str(bench / "sd15"))["sft"].select(range(24))):
        candidates = [
            {
                "response": call.to_json(), "call": call.to_dict(), "origin": "diverse_beam", "seeds": [1, 2],
                "images": [str(folder / "red.png")] * 2, "scores": {"clip_score": [0.1 * i, 0.1 * i + 0.01 * number]},
                "image_rewards": [0.1 * i, 0.1 * i + 0.01 * number], "reward": 0.1 * i + 0.005 * number,
                "reward_standard_error": 0.005, "error": None,
            }
            for i, call in enumerate(calls)
        ]  # fmt: skip
        rows.append(
            {
                "prompt_id": row["id"],
                "instruction": row["instruction"],
                "policy": policy_fingerprint(str(policy)),
                "candidates": candidates[number % MODELS :] + candidates[: number % MODELS],
            }
        )
    write_scored(folder / "scored.parquet", rows, ["clip_score"])
    return folder / "scored.parquet"


@pytest.fixture(scope="module")
def reference(policy, table, tmp_path_factory):
    """Four uninterrupted steps on one process."""
    folder = tmp_path_factory.mktemp("reference")
    done = launch(folder, policy, table, config={"eval_strategy": "steps", "eval_steps": 2, "table_prompts": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.slow
def test_run_leaves_a_policy_that_has_learned_the_order(reference, policy, table):
    lines = read_metrics(reference / "metrics.jsonl")
    evaluations = [line for line in lines if "eval_rank/accuracy" in line]
    assert [line["step"] for line in evaluations][:2] == [2, 4]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 1
    assert all(line["loss/ce"] > 0 for line in lines if "loss/ce" in line)
    # What the table is like was logged once: the best of each prompt is model 3 of 0 to 3.
    (about,) = [line for line in lines if "rollout/reward/best" in line]
    rows = pq.read_table(table).to_pylist()
    best = [max(c["reward"] for c in row["candidates"]) for row in rows]
    assert about["rollout/reward/best"] == pytest.approx(sum(best) / len(best))
    assert about["step"] == 0 and about["rollout/candidates"] == MODELS
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after, notes = AutoModelForCausalLM.from_pretrained(reference, output_loading_info=True)
    assert not any(notes.values()), notes
    assert all(not torch.equal(before[name], weight) for name, weight in after.state_dict().items())
    assert policy_fingerprint(str(reference)) != policy_fingerprint(str(policy))
    card = (reference / "README.md").read_text()
    assert "| processes | 1 (NO) |" in card and "| log-probabilities | packed |" in card
    ranked = [json.loads(line) for line in (reference / "ranked_candidates.jsonl").read_text().splitlines()]
    assert {line["step"] for line in ranked} == {2, 4}
    first = ranked[:MODELS]
    assert [line["rank"] for line in first] == [1, 2, 3, 4]
    assert [line["p"] for line in first] == sorted((line["p"] for line in first), reverse=True)


@pytest.mark.slow
def test_started_again_it_does_nothing_and_killed_it_goes_on(reference, policy, table, tmp_path):
    again = launch(reference.parent, policy, table, config={"eval_strategy": "steps", "eval_steps": 2})
    assert again.returncode == 0 and "is trained already" in again.stderr

    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command(tmp_path, policy, table), cwd=REPOSITORY, stdout=nowhere, stderr=nowhere,
                                   start_new_session=True)  # fmt: skip
        wait_for(tmp_path / "run/checkpoint-2/trainer_state.json", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run/trained.json").is_file()
    done = launch(tmp_path, policy, table)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=1e-6)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "run", reference))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_wandb_offline_holds_losses_table_and_pictures(policy, table, tmp_path):
    done = launch(
        tmp_path,
        policy,
        table,
        config={"report_to": "wandb", "eval_strategy": "steps", "eval_steps": 2, "table_prompts": 1, "max_steps": 2},
        environment={"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true",
                     "WANDB_DATA_DIR": str(tmp_path / "data")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/ranked_candidates*.json"))
    content = json.loads(tables[0].read_text())
    assert content["columns"][:4] == ["step", "prompt", "rank", "model"]
    assert len(content["data"]) == MODELS and all(line[-1] is not None for line in content["data"])


def wait_for(path, process, seconds=200):
    """Until a file is there; the last part of its path may be a pattern."""
    deadline = time.monotonic() + seconds
    while not any(path.parent.glob(path.name)):
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before {path}"
        time.sleep(0.02)


class TestWithRollout:
    """Candidates, pictures, rewards and training in one command; two rounds."""

    @pytest.fixture(scope="class")
    def world(self, tmp_path_factory):
        """Two small models of the toy kind, prompts in DABench's form, and a policy that knows their names."""
        from pocket.untrained import save_catalog

        folder = tmp_path_factory.mktemp("world")
        catalog = save_catalog(folder / "models")
        rows = [
            {"id": f"p{i}", "instruction": {"prompt": f"a red fox {i}", "negative prompt": ""},
             "api": catalog.default_call("SD 1.5").to_dict()}
            for i in range(4)
        ]  # fmt: skip
        datasets.DatasetDict({"rrhf": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "bench/sd15"))
        catalog.save(folder / "bench/catalog.jsonl")
        tokenizer = train_bpe_tokenizer((e.default_call().to_json() for e in catalog.values()), vocab_size=500)
        size = ScratchConfig(
            vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=1024,
        )  # fmt: skip
        build_from_scratch(size, tokenizer, seed=2).save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
        DialogueFormat().save(folder / "policy")
        return folder

    CONFIG = {
        "rollout": {
            "candidates": {"num_beams": 3, "constrain_names": True, "max_new_tokens": 60},
            "render": {
                "num_images": 2, "resolution_scale": 0.125, "device": "cpu", "batch_size": 4,
                "scorers": {"clip_score": {"checkpoint": str(REPOSITORY / "pocket/weights/clip")}},
            },
        },
        "rounds": 2,
        "round_options": [{}, {"learning_rate": 1.0e-3, "max_steps": 2}],
        "eval_share": 0.0,
        "sft_replay": 0.0,
    }  # fmt: skip

    def flags(self, world):
        return ("--weights", str(world / "models"), "--catalog", str(world / "bench/catalog.jsonl"))

    @pytest.mark.slow
    def test_killed_in_each_stage_it_goes_on(self, world, tmp_path):
        run = tmp_path / "run"
        line = command(tmp_path, world / "policy", world / "bench", *self.flags(world), config=self.CONFIG)
        stages = [run / "round-1/candidates.jsonl", run / "round-1/rollout/done-*.json",
                  run / "round-1/checkpoint-2/trainer_state.json", run / "round-2/candidates.jsonl"]  # fmt: skip
        for stage in stages:
            with open(os.devnull, "w") as nowhere:
                process = subprocess.Popen(line, cwd=REPOSITORY, stdout=nowhere, stderr=nowhere, start_new_session=True)
                wait_for(stage, process)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        drawn = (run / "round-1/rollout/scored.parquet").stat().st_mtime_ns
        done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "round 1" in done.stderr and "is trained already" in done.stderr
        assert (run / "round-1/rollout/scored.parquet").stat().st_mtime_ns == drawn, "the first round was drawn again"

        first, second = (pq.read_table(run / f"round-{n}/rollout/scored.parquet").to_pylist() for n in (1, 2))
        assert len(first) == len(second) == 4
        assert {row["policy"] for row in first} == {policy_fingerprint(str(world / "policy"))}
        assert {row["policy"] for row in second} == {policy_fingerprint(str(run / "round-1"))}
        for row in first + second:
            assert {c["origin"] for c in row["candidates"]} >= {"diverse_beam"}
            assert len(row["candidates"]) >= 2 and all(c["reward"] is not None for c in row["candidates"])
        # The curriculum: the second round has its own learning rate and number of steps.
        rates = {n: {line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}
                 for n, folder in ((1, run / "round-1"), (2, run))}  # fmt: skip
        assert rates == {1: {3.0e-3}, 2: {1.0e-3}}
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [1, 2]
        AutoModelForCausalLM.from_pretrained(run)

    @pytest.mark.slow
    def test_two_processes_share_the_work(self, world, tmp_path):
        config = self.CONFIG | {"rounds": 1, "round_options": [], "per_device_train_batch_size": 1, "max_steps": 2}
        done = launch(
            tmp_path, world / "policy", world / "bench", *self.flags(world), config=config,
            launcher=("--config_file", str(REPOSITORY / "configs/accelerate/cpu_ddp.yaml")),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "| processes | 2 (MULTI_CPU) |" in (tmp_path / "run/README.md").read_text()
        one = launch(
            tmp_path / "one", world / "policy", world / "bench", *self.flags(world),
            config=config | {"per_device_train_batch_size": 2},
        )  # fmt: skip
        assert one.returncode == 0, one.stderr[-3000:]
        tables = [
            pq.read_table(f / "run/round-1/rollout/scored.parquet").to_pylist() for f in (tmp_path, tmp_path / "one")
        ]
        assert [[c["response"] for c in row["candidates"]] for row in tables[0]] == [
            [c["response"] for c in row["candidates"]] for row in tables[1]
        ]
        assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one/run"), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, "`rounds: 2` needs a `rollout:` block"),
        ({"rollout": {"renders": {}}}, "`rollout` may hold candidates and render"),
        ({"rollout": {}}, "A `rollout:` needs `weights`"),
        ({"rollout": {"render": {"num_image": 3}}, "weights": "w"}, "unknown option `num_image`. Did you mean"),
        ({"rollout": {"render": {"calls": "x"}}, "weights": "w"}, "`rollout.render.calls` is set by this command"),
        ({"rollout": {"render": {"num_images": 0}}, "weights": "w"}, "`num_images` must be at least 1"),
        ({"rollout": {}, "weights": "w", "rounds": 2, "round_options": [{}, {"rounds": 3}]}, "can't be changed"),
        ({"rollout": {}, "weights": "w", "round_options": [{"loss_type": "dpo"}]}, r"\['loss_type'\] can't be changed"),
        ({"eval_share": 1.0}, r"`eval_share` must lie in \[0, 1\)"),
        ({"sft_replay": 0.5}, "`sft_replay` needs `sft_dataset`"),
        ({"architecture": "SDXL 9"}, "`architecture` must be one of"),
        ({"loss_type": "ppo"}, "`loss_type` must be one of rrhf"),
        ({"eval_strategy": "epoch", "eval_share": 0.0}, "leaves none to evaluate on"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(policy, table, bench, tmp_path, options, message, capsys):
    from trl import ModelConfig

    from align.rrhf import RRHFArguments, main
    from align.trainers import RRHFConfig
    from rewards.commandline import run_command

    dataset = bench if "rollout" in options else table
    path = tmp_path / "rrhf.yaml"
    path.write_text(yaml.safe_dump(TOY | options))
    arguments = ["rrhf.py", "--config", str(path), "--model_name_or_path", str(policy), "--dataset", str(dataset)]
    arguments += ["--output_dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", arguments)
        run_command(main, RRHFArguments, RRHFConfig, ModelConfig)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(message, last), last


def test_candidates_of_another_policy_are_refused_unless_allowed(policy, table, tmp_path):
    from trl import ModelConfig

    from align.pairs import DataError
    from align.rrhf import RRHFArguments, train
    from align.trainers import RRHFConfig

    rows = [row | {"policy": "0123456789abcdef"} for row in pq.read_table(table).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other.parquet")
    options = {k: v for k, v in TOY.items() if k not in ("eval_share",)} | {"max_steps": 1, "save_strategy": "no"}
    training = RRHFConfig(output_dir=str(tmp_path / "run"), **options)
    arguments = RRHFArguments(dataset=str(tmp_path / "other.parquet"))
    with pytest.raises(DataError, match="candidates of another policy"):
        train(arguments, training, ModelConfig(), str(policy), tmp_path / "other.parquet")
    arguments.any_policy = True
    train(arguments, training, ModelConfig(), str(policy), tmp_path / "other.parquet")
    assert (tmp_path / "run/trained.json").is_file()
