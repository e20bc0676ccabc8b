"""`align/sft.py` on policies that see pictures: what is learned, what is frozen, what is kept, and what stops it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, SFTConfig

from align.chats import encode_chats, load_chats
from align.pairs import DataError
from align.picture_collator import PictureCollator
from align.picture_dialogue import load_dialogue
from align.run_directory import read_metrics
from align.scratch import ScratchConfig
from align.sft import SFTArguments, main
from align.vision_tower import freeze_vision_tower, vision_tower
from rewards.commandline import ConfigError, parse_config
from rollouts.policy import load_policy

REPOSITORY = Path(__file__).parents[2]
OPTIONS = {
    "max_length": 400, "max_train_rows": 8, "max_eval_rows": 4, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 3.0e-3, "lr_scheduler_type": "constant",
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "eval_strategy": "no", "report_to": "none", "sample_answers": 0, "disable_tqdm": True, "learn": "prompt",
    "writing_task": "Write.", "planning_task": "Plan.",
}  # fmt: skip


def train(output, policy, dataset, **options):
    """Run it in this process; returns the losses."""
    given = OPTIONS | {"output_dir": output, "model_name_or_path": policy, "dataset": dataset} | options
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    main(*parse_config(SFTArguments, SFTConfig, ModelConfig, ScratchConfig, args=flags))
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_mllm, picture_bench):
    folder = tmp_path_factory.mktemp("run")
    losses = train(folder, tiny_mllm, picture_bench, save_strategy="steps", save_steps=2)
    return folder, losses


def weights(folder):
    return load_file(folder / "model.safetensors")


def moved(before, after):
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.fixture
def rows(picture_bench, tiny_mllm):
    dialogue = load_dialogue(tiny_mllm, folder=picture_bench)
    return dialogue, encode_chats(
        load_chats(picture_bench)["train"].select(range(6)), dialogue, "prompt", 400, what="x"
    )


def test_batches_hold_pixels_and_learn_the_response_only(rows):
    dialogue, encoded = rows
    assert encoded["pictures"] == [[], ["images/1.png"], [], [], ["images/1.png"], []], "where they are, no pixels"
    batch = PictureCollator(dialogue)(list(encoded))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    image = batch["input_ids"] == dialogue.image_token_id
    assert image.sum(1).tolist() == [0, 4, 0, 0, 4, 0] and (batch["labels"][image] == -100).all()
    for row, ids, labels, mask in zip(
        encoded, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        length = len(row["input_ids"])
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length) and (labels[length:] == -100).all()
        learned = labels[labels != -100].tolist()
        assert learned == row["input_ids"][-len(learned) :] and dialogue.decode(learned).startswith(
            "masterpiece, a fox"
        )


@pytest.mark.parametrize("policy", ["tiny_mllm", "tiny_qwen_vl"])
def test_a_blank_picture_in_the_padding_changes_nothing(request, policy, picture_bench):
    folder = request.getfixturevalue(policy)
    dialogue, model = load_dialogue(folder, folder=picture_bench), load_policy(str(folder), dtype="float32").train()
    texts = [row for row in rows_of(dialogue, picture_bench) if not row["pictures"]]
    found = []
    for always in (False, True):
        batch = PictureCollator(dialogue, always_pixels=always)(texts)
        assert ("pixel_values" in batch) is always and (batch["attention_mask"].sum(1) == lengths_of(texts)).all()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    (loss, without), (same, grads) = found
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    unseen = [name for name, grad in without.items() if grad is None]
    assert any("projector" in name or "merger" in name for name in unseen)
    for name, grad in grads.items():
        expected = torch.zeros_like(grad) if without[name] is None else without[name]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def rows_of(dialogue, bench):
    return list(encode_chats(load_chats(bench)["train"].select(range(6)), dialogue, "prompt", 400, what="x"))


def lengths_of(rows):
    return torch.tensor([len(row["input_ids"]) for row in rows])


@pytest.mark.parametrize("policy", ["tiny_mllm", "tiny_qwen_vl"])
def test_the_loss_is_that_of_every_chat_alone(request, policy, picture_bench, tmp_path):
    folder = request.getfixturevalue(policy)
    found = train(tmp_path, folder, picture_bench, max_steps=1, max_train_rows=6, per_device_train_batch_size=6)
    dialogue, model = load_dialogue(folder, folder=picture_bench), load_policy(str(folder), dtype="float32").eval()
    from align.chats import split_validation
    from align.sft import _first

    total = count = seen = 0
    for row in _first(split_validation(load_chats(picture_bench)["train"])[0], 6):
        given = dialogue.encode_chat(row["messages"], "Write.")
        whole = dialogue.encode_chat(row["messages"], "Write.", row["prompt"])
        ids = torch.tensor([whole.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, **dialogue.picture_inputs(ids, [whole.pictures])).logits[0]
        first = len(given.input_ids)
        total += float(F.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum"))
        count, seen = count + len(whole.input_ids) - first, seen + len(whole.pictures)
    assert 0 < seen < 6, "chats with and without pictures"
    assert found == [pytest.approx(total / count, rel=1e-4)]
    assert moved(weights(folder), weights(tmp_path))


def test_what_is_left_behind_loads_and_has_learned(run, picture_bench):
    folder, losses = run
    assert losses[-1] < losses[0]
    model, notes = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()) and AutoProcessor.from_pretrained(folder).image_seq_length == 4
    assert AutoProcessor.from_pretrained(folder / "checkpoint-4").image_seq_length == 4
    form = json.loads((folder / "chat_dialogue.json").read_text())
    assert (form["writing_task"], form["max_pictures"], form["picture_side"]) == ("Write.", 5, 1024)
    assert "| frozen parameters of the vision tower |" in (folder / "README.md").read_text()
    dialogue = load_dialogue(folder, folder=picture_bench)
    assert dialogue.encode_chat(load_chats(picture_bench)["test"][1]["messages"], "Write.").pictures


def test_the_vision_tower_stays_and_its_projector_learns(run, tiny_mllm):
    changed = moved(weights(tiny_mllm), weights(run[0]))
    assert not [name for name in changed if "vision_tower" in name]
    assert any("multi_modal_projector" in name for name in changed) and any(
        "language_model" in name for name in changed
    )


def test_the_vision_tower_learns_if_asked_to(tiny_mllm, picture_bench, tmp_path):
    train(tmp_path, tiny_mllm, picture_bench, freeze_vision=False, max_steps=2, learn="plan")
    assert any("vision_tower" in name for name in moved(weights(tiny_mllm), weights(tmp_path)))
    assert "ChatGen-Base" in (tmp_path / "README.md").read_text()


def test_what_projects_is_no_part_of_the_frozen_tower(tiny_mllm, tiny_qwen_vl):
    for folder, name in ((tiny_mllm, "model.vision_tower"), (tiny_qwen_vl, "model.visual")):
        model = load_policy(str(folder))
        assert vision_tower(model)[0] == name and freeze_vision_tower(model) > 1000
        free = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("projector" in n or "merger" in n for n in free) and not any(
            "vision_tower.encoder" in n for n in free
        )
        assert not any("visual.blocks" in n for n in free)


def test_a_policy_without_a_tower_is_named(chat_policy):
    with pytest.raises(ConfigError, match="No vision tower was found in LlamaForCausalLM; set `freeze_vision: false`"):
        freeze_vision_tower(load_policy(str(chat_policy)))


def test_resuming_gives_the_same_losses(run, tiny_mllm, picture_bench, tmp_path):
    folder, losses = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    again = train(tmp_path, tiny_mllm, picture_bench, save_strategy="steps", save_steps=2)
    assert again == pytest.approx(losses, abs=1e-6)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, rtol=0, atol=1e-6)


def test_the_best_model_is_the_one_that_is_kept(tiny_mllm, picture_bench, tmp_path):
    # A rate at which it gets worse from the second step on.
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    train(tmp_path, tiny_mllm, picture_bench, load_best_model_at_end=True, learning_rate=1.0, **options)
    evaluations = [line["eval_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    best = 1 + evaluations[:3].index(min(evaluations[:3]))
    assert best < 3
    assert evaluations[-1] == pytest.approx(min(evaluations), abs=1e-5), "evaluated again at the end"
    assert not moved(weights(tmp_path / f"checkpoint-{best}"), weights(tmp_path))


@pytest.mark.slow
def test_two_processes_with_other_pictures_each_give_the_losses_of_one(tiny_mllm, picture_bench, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    options = {"max_train_rows": 16, "gradient_accumulation_steps": 2, "max_steps": 3}
    one = train(tmp_path / "one", tiny_mllm, picture_bench, per_device_train_batch_size=2, **options)
    given = OPTIONS | options | {"per_device_train_batch_size": 1, "output_dir": tmp_path / "two"}
    given |= {"model_name_or_path": tiny_mllm, "dataset": picture_bench}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, "--config_file", "configs/accelerate/cpu_zero2.yaml", "align/sft.py"]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| processes | 2 (DEEPSPEED) |" in (tmp_path / "two/README.md").read_text()
    two = [line["loss"] for line in read_metrics(tmp_path / "two/metrics.jsonl") if "loss" in line]
    assert two == pytest.approx(one, abs=2e-3)


def test_an_adapter_leaves_the_tower_alone_and_is_merged(tiny_mllm, picture_bench, tmp_path):
    train(
        tmp_path, tiny_mllm, picture_bench, use_peft=True, lora_target_modules="all-linear", lora_r=4, max_steps=3
    )  # fmt: skip
    before, after = weights(tiny_mllm), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = moved(before, after)
    assert changed and all("language_model" in name or "projector" in name for name in changed), changed
    assert AutoProcessor.from_pretrained(tmp_path).image_seq_length == 4


def test_an_adapter_is_resumed(tiny_mllm, picture_bench, tmp_path):
    options = {
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "lora_r": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    losses = train(tmp_path / "a", tiny_mllm, picture_bench, **options)
    shutil.copytree(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")
    shutil.copy(tmp_path / "a/metrics.jsonl", tmp_path / "b")
    assert train(tmp_path / "b", tiny_mllm, picture_bench, **options) == pytest.approx(losses, abs=1e-6)


def test_pictures_that_can_not_be_opened_stop_it_at_once_or_become_text(picture_bench, tiny_mllm, tmp_path, caplog):
    bench = tmp_path / "bench"
    shutil.copytree(picture_bench, bench)
    (bench / "images/1.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"sft row '.*': The picture images/1.png is no picture .*unreadable_pictures: text"
    ):
        train(tmp_path / "a", tiny_mllm, bench)
    with caplog.at_level("WARNING"):
        losses = train(tmp_path / "b", tiny_mllm, bench, unreadable_pictures="text", max_steps=1)
    assert len(losses) == 1 and "pictures can't be opened and are written as [picture]" in caplog.text


def test_a_picture_that_goes_or_changes_while_training_is_named(rows, tmp_path):
    dialogue, encoded = rows
    row = dict(encoded[1])
    with pytest.raises(DataError, match="gone.png is missing .* could be opened when training began"):
        PictureCollator(dialogue)([row | {"pictures": ["images/gone.png"]}])


def test_chats_with_pictures_are_not_packed(tiny_mllm, picture_bench, tmp_path):
    with pytest.raises(ConfigError, match="can't be packed; set `packing: false`"):
        train(tmp_path, tiny_mllm, picture_bench, packing=True)
