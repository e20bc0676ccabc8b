"""`align/model_tokens.py`: from a ChatGenBench and a policy to tokens of models, and how well they are chosen."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from align.chat_dialogue import ChatDialogue, ChatFormat
from align.chats import load_chats, split_validation
from align.model_tokens import ModelTokenArguments, examples_of, main
from align.pairs import DataError
from align.trainers import ModelTokenConfig
from align.trainers.model_token_rows import ModelTokens

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(chat_policy):
    return chat_policy


@pytest.fixture(scope="module")
def run(policy, chat_bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    args = ModelTokenArguments(str(policy), str(chat_bench), model_dtype="float32")
    return folder, main(args, ModelTokenConfig(str(folder), optimizer="lbfgs", num_epochs=20))


def test_models_are_chosen_far_better_than_by_chance(run):
    folder, metrics = run
    assert metrics["all"]["n"] == 8 * 2 * 3
    assert metrics["all"]["top1"] > 0.5 and metrics["all"]["top5"] >= metrics["all"]["top1"]  # chance: 1 of 8
    assert json.loads((folder / "selection.json").read_text()) == metrics
    assert {name: found["n"] for name, found in metrics.items()} == {
        "all": 48, "setting=supervised": 48, "input_type=single": 16, "input_type=multimodal": 16,
        "input_type=history": 16, "shots=6+": 48,
    }  # fmt: skip


def test_the_accuracy_is_that_of_eq_4_computed_by_hand(run, policy, chat_bench):
    folder, metrics = run
    tokens = ModelTokens.load(folder)
    from rollouts.policy import load_policy, load_tokenizer

    model = load_policy(str(policy), dtype="float32").eval()
    dialogue = ChatDialogue(load_tokenizer(str(policy)), ChatFormat.load(policy))
    ranks = {line["id"]: line for line in map(json.loads, (folder / "selection.jsonl").read_text().splitlines())}
    hits = Counter()
    for row in load_chats(chat_bench)["test"]:
        prefix = dialogue.encode_selection(row["messages"], row["prompt"]).input_ids
        assert dialogue.tokenizer.decode(prefix).endswith(row["prompt"])
        with torch.no_grad():
            hidden = model.model(torch.tensor([prefix])).last_hidden_state[0, -1]
        logits = torch.cat([model.lm_head.weight, tokens.rows]) @ hidden  # [W_v; W_M] h
        best = logits[len(model.lm_head.weight) :].argsort(descending=True).tolist()
        rank = best.index(tokens.names.index(row["model"]))
        assert ranks[row["id"]]["rank"] == rank
        hits["top1"] += rank < 1
        hits["top5"] += rank < 5
    assert {name: hits[name] / 48 for name in hits} == pytest.approx(
        {name: metrics["all"][name] for name in ("top1", "top5")}
    )


def test_fewer_chats_and_models_without_tokens_are_counted(policy, chat_bench, tmp_path):
    args = ModelTokenArguments(str(policy), str(chat_bench), chats_per_demonstration=1, max_train_rows=3)
    metrics = main(args, ModelTokenConfig(str(tmp_path), optimizer="lbfgs", num_epochs=2))
    tokens = ModelTokens.load(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert len(tokens) <= 3 and len(lines) == 48
    assert all((line["rank"] is None) == (line["model"] not in tokens.names) for line in lines)
    assert all((line["shots"] == 0) == (line["rank"] is None) for line in lines)
    assert metrics["shots=0"] == {"n": sum(line["rank"] is None for line in lines), "top1": 0.0, "top5": 0.0}


def test_validation_demonstrations_are_not_learned_from(chat_bench, policy):
    train, validation = split_validation(load_chats(chat_bench)["train"])
    assert len(validation) and not {r["prompt"] for r in train} & {r["prompt"] for r in validation}


@pytest.mark.parametrize("init", ["names", "descriptions"])
def test_rows_can_begin_at_words(policy, chat_bench, tmp_path, init):
    args = ModelTokenArguments(str(policy), str(chat_bench), max_test_rows=4, max_train_rows=40)
    main(args, ModelTokenConfig(str(tmp_path), init=init, optimizer="lbfgs", num_epochs=1))
    assert len(ModelTokens.load(tmp_path)) == 8


def test_a_chat_that_does_not_fit_is_named(policy, chat_bench):
    from rollouts.policy import load_tokenizer

    rows = load_chats(chat_bench)["test"]
    dialogue = ChatDialogue(load_tokenizer(str(policy)), ChatFormat.load(policy))
    with pytest.raises(DataError, match=r"test row '0-8/0': .* only 10 are allowed"):
        examples_of(rows, sorted(set(rows["model"])), dialogue, 10, "test")


@pytest.mark.slow
def test_the_command(policy, chat_bench, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["align/model_tokens.py", "--config", "configs/chatgen/evo_tokens.yaml", "--model_dtype", "float32"]
    command += ["--model_name_or_path", str(policy), "--dataset", str(chat_bench), "--output_dir", str(tmp_path)]
    command += ["--num_epochs", "3", "--max_length", "400"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(ModelTokens.load(tmp_path)) == 8 and (tmp_path / "config.yaml").is_file()
    assert "ChatGen-Evo, stage 2" in (tmp_path / "README.md").read_text()
