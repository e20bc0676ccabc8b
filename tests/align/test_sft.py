"""`align/sft.py` end to end: on toy models, on one and several processes, killed and resumed."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.chat_dialogue import ChatDialogue, ChatFormat
from align.run_directory import last_complete_checkpoint, read_metrics
from rollouts.policy import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
TOY = {
    "from_scratch": True,
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_length": 768,
    "max_train_rows": 24,
    "max_eval_rows": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 3.0e-3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_strategy": "no",
    "report_to": "none",
    "sample_answers": 0,
    "disable_tqdm": True,
}


def launch(folder, bench, *flags, launcher=(), config=None, timeout=240, **environment):
    """Run `accelerate launch align/sft.py` as a user would; returns the completed process."""
    folder.mkdir(exist_ok=True)
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(TOY | (config or {})))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *(launcher or ("--cpu", "--num_processes", "1")),
        *("align/sft.py", "--config", str(path), "--dataset", str(bench), "--output_dir", str(folder / "run"), *flags),
    ]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "run/metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, bench):
    """Six uninterrupted steps on one process."""
    folder = tmp_path_factory.mktemp("reference")
    done = launch(folder, bench, config={"eval_strategy": "steps", "eval_steps": 3, "sample_answers": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_run_leaves_a_model_that_loads_and_has_learned(reference):
    run = reference / "run"
    assert losses(reference)[-1] < losses(reference)[0] - 0.1
    model, notes = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not any(notes.values()), notes
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template and len(tokenizer) <= model.config.vocab_size
    assert yaml.safe_load((run / "config.yaml").read_text())["hidden_size"] == 32
    assert json.loads((run / "dialogue.json").read_text())["plain"] is False
    assert "| processes | 1 (NO) |" in (run / "README.md").read_text()
    answers = [json.loads(line) for line in (run / "sample_answers.jsonl").read_text().splitlines()]
    assert {row["step"] for row in answers} == {3, 6}
    assert all(row["verdict"] != "ok" for row in answers), "six steps can't have taught it a whole call"
    evaluations = [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluations][:2] == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_processes_give_the_losses_of_one(reference, bench, tmp_path, config):
    if "zero" in config:
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    done = launch(
        tmp_path,
        bench,
        *("--per_device_train_batch_size", "1"),
        launcher=("--config_file", str(REPOSITORY / f"configs/accelerate/{config}.yaml")),
        DS_ACCELERATOR="cpu",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kind = "MULTI_CPU" if config == "cpu_ddp" else "DEEPSPEED"
    assert f"| processes | 2 ({kind}) |" in (tmp_path / "run/README.md").read_text()
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=2e-3)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(reference / "run").state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_losses(reference, bench, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(TOY))
    command = [sys.executable, "align/sft.py", "--config", str(path), "--dataset", str(bench)]
    command += ["--output_dir", str(folder / "run")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (folder / "run/checkpoint-2/trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint before the run ended"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill in the middle of saving leaves: a newer checkpoint without its last file.
    half = folder / "run/checkpoint-5"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut sh")
    assert "checkpoint-5" not in str(last_complete_checkpoint(folder / "run"))

    done = launch(folder, bench)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stderr
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-6)


@pytest.mark.slow
def test_lora_is_merged_into_an_ordinary_model(reference, bench, tmp_path):
    done = launch(
        tmp_path,
        bench,
        *("--from_scratch", "false", "--model_name_or_path", str(reference / "run"), "--use_peft", "true"),
        *("--lora_target_modules", "q_proj", "v_proj", "--packing", "true", "--gradient_checkpointing", "true"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before = AutoModelForCausalLM.from_pretrained(reference / "run").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert before.keys() == after.keys()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_wandb_offline_holds_losses_and_sample_answers(bench, tmp_path):
    done = launch(
        tmp_path,
        bench,
        config={"report_to": "wandb", "eval_strategy": "steps", "eval_steps": 3, "sample_answers": 2},
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
        WANDB_SILENT="true",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history = list(wandb_history(file))
    assert [row["train/loss"] for row in history if "train/loss" in row] == pytest.approx(losses(tmp_path))
    assert all("train/learning_rate" in row for row in history if "train/loss" in row)
    tables = [row for row in history if "sample_answers._type" in row or "sample_answers" in row]
    assert [row["train/global_step"] for row in tables] == [3, 6]
    (first, *_) = tmp_path.glob("wandb/offline-run-*/files/media/table/sample_answers*.json")
    assert json.loads(first.read_text())["columns"] == ["step", "prompt", "answer", "verdict", "asked for"]


def wandb_history(path):
    """The logged rows of an offline W&B file: LevelDB log framing around protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, position, buffer, block = path.read_bytes(), 7, b"", 32768
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        buffer = chunk if kind in (1, 2) else buffer + chunk
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_scratch", "false"], "Give either `model_name_or_path` or `from_scratch: true`"),
        (["--trust_remote_code", "true"], "`trust_remote_code: true` would run code that came with a model"),
        (["--early_stopping_patience", "2"], "needs `load_best_model_at_end: true`"),
        (["--architecture", "SDXL 9"], "`architecture` must be one of"),
        (["--max_length", "60"], "A dialogue needs .* tokens without any of the user's text"),
        (["--catalog", "nowhere.jsonl", "--sample_answers", "1"], "no catalogue file at nowhere.jsonl"),
    ],
)
def test_bad_options_are_one_line(bench, tmp_path, flags, message, capsys, monkeypatch):
    from trl import ModelConfig, SFTConfig

    from align.pairs import DataError
    from align.scratch import ScratchConfig
    from align.sft import SFTArguments, main
    from rewards.commandline import run_command
    from rollouts.catalog import CatalogError
    from rollouts.dialogue import DialogueError

    command = bad_command(tmp_path, bench, flags)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        run_command(
            main, SFTArguments, SFTConfig, ModelConfig, ScratchConfig, errors=(DataError, CatalogError, DialogueError)
        )
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(message, last), last


@pytest.mark.slow
def test_a_bad_option_is_one_line_for_users_too(bench, tmp_path):
    command = bad_command(tmp_path, bench, ["--max_length", "60"])
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def bad_command(folder, bench, flags):
    (folder / "sft.yaml").write_text(yaml.safe_dump(TOY))
    command = ["align/sft.py", "--config", str(folder / "sft.yaml"), "--dataset", str(bench)]
    return [*command, "--output_dir", str(folder / "run"), *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learn", "title"),
    [("plan", "ChatGen-Base"), ("prompt", "ChatGen-Evo, stage 1 "), ("joint", "ChatGen-Evo, stages 1 and 2 jointly")],
)
def test_chats_are_learned_too(tmp_path, chat_bench, learn, title):
    done = launch(tmp_path, chat_bench, "--learn", learn, "--writing_task", "Write it.", config={"sample_answers": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert title in (run / "README.md").read_text()
    form = ChatFormat.load(run)
    assert form.writing_task == "Write it." and not (run / "dialogue.json").exists()
    dialogue = ChatDialogue(load_tokenizer(str(run)), form)
    assert dialogue.encode_chat([{"role": "user", "content": "a fox"}], form.writing_task).input_ids
    AutoModelForCausalLM.from_pretrained(run)
    assert (run / "model_tokens.safetensors").is_file() == (learn == "joint")
