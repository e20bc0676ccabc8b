"""What a training run leaves behind, and what a resumed one makes of it."""

import json
from types import SimpleNamespace

import pytest
import yaml

from align.run_directory import MetricsFile, last_complete_checkpoint, read_metrics, write_model_card


def state(step, epoch=None, main_process=True):
    return SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=main_process)


def log(metrics, step, **logs):
    metrics.on_log(None, state(step, step / 10), None, logs=logs)


def test_lines_are_appended(tmp_path):
    metrics = MetricsFile(tmp_path / "run")
    metrics.on_train_begin(None, state(0), None)
    log(metrics, 1, loss=2.5, learning_rate=1e-3)
    log(metrics, 2, loss=2.25)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "epoch": 0.1, "loss": 2.5, "learning_rate": 0.001},
        {"step": 2, "epoch": 0.2, "loss": 2.25},
    ]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [json.loads(line) for line in text.splitlines()]


def test_only_the_main_process_writes(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(None, state(0, main_process=False), None)
    metrics.on_log(None, state(1, main_process=False), None, logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_resuming_cuts_back_to_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(None, state(0), None)
    for step in (10, 20, 30):
        log(metrics, step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    resumed = MetricsFile(tmp_path)
    resumed.on_train_begin(None, state(20), None)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]
    log(resumed, 30, loss=31.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10.0, 20.0, 31.0]
    MetricsFile(tmp_path).on_train_begin(None, state(0), None)  # from the start: nothing is kept
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_diverged_loss_leaves_the_file_readable(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(None, state(0), None)
    log(metrics, 1, loss=float("nan"), grad_norm=float("inf"), other=float("-inf"), note="x")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "epoch": 0.1, "loss": "nan", "grad_norm": "inf", "other": "-inf", "note": "x"}
    metrics.on_log(None, state(2), None, logs={})
    metrics.on_log(None, state(2), None)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_damaged_and_missing_metrics(tmp_path, caplog):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert "damaged line" in caplog.text


def checkpoint(folder, step, content='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x")
    if content is not None:
        (path / "trainer_state.json").write_text(content)
    return str(path)


def test_last_complete_checkpoint(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 90)
    newest = checkpoint(tmp_path, 100)  # by number, not by name: "100" < "90"
    assert last_complete_checkpoint(tmp_path) == newest
    assert caplog.text == ""
    checkpoint(tmp_path, 110, content=None)  # killed before its last file
    checkpoint(tmp_path, 120, content='{"global_step": 12')  # killed in the middle of it
    checkpoint(tmp_path, 130, content="")
    (tmp_path / "checkpoint-140").write_text("a file")
    checkpoint(tmp_path, "best")
    checkpoint(tmp_path, "200.tmp")
    checkpoint(tmp_path, "²")
    assert last_complete_checkpoint(str(tmp_path)) == newest
    for step in (110, 120, 130, 140):
        assert f"checkpoint-{step} was not saved to its end" in caplog.text


@pytest.fixture
def card(tmp_path):
    write_model_card(
        tmp_path / "model",
        title="DiffAgent-SFT for SD 1.5",
        command="accelerate launch align/sft.py --hub_token hf_secret1 --push_to_hub_token=hf_secret2 --seed 1",
        facts={"base": "models/a|b", "parameters": "6,500,000", "steps": 1100},
        metrics={"eval_loss": 0.123456, "eval_runtime": None, "epoch": 5},
    )
    return (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_model_card(card):
    header, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert text.startswith("# DiffAgent-SFT for SD 1.5\n")
    for row in (r"| base | models/a\|b |", "| parameters | 6,500,000 |", "| steps | 1100 |", "| eval_loss | 0.1235 |"):
        assert f"\n{row}\n" in card
    assert "\n| eval_runtime | None |\n| epoch | 5 |\n" in card
    assert "Catalog.validate" in card  # says how to guard against invented models


def test_model_card_shows_the_command_without_secrets(card):
    assert "accelerate launch align/sft.py --hub_token *** --push_to_hub_token=*** --seed 1\n```" in card
    assert "secret" not in card
