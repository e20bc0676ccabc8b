"""Parameters and seconds from the files of runs."""

import json

import numpy as np
from safetensors.numpy import save_file

from align.evaluation.plan_costs import agent_costs, num_parameters, training_seconds


def test_policy_and_tokens_add_up(tmp_path):
    for name, shapes in {"policy": [(2, 3), (4,)], "tokens": [(5, 3)]}.items():
        (tmp_path / name).mkdir()
        for i, shape in enumerate(shapes):
            save_file({"w": np.zeros(shape, dtype="f4")}, tmp_path / name / f"{i}.safetensors")
    save_file({"w": np.zeros(99, dtype="f4")}, tmp_path / "tokens" / "checkpoint.safetensors")
    (tmp_path / "tokens" / "0.safetensors").rename(tmp_path / "tokens" / "model_tokens.safetensors")
    lines = [{"step": 1, "loss": 2.0}, {"step": 9, "train_runtime": 12.5}, {"step": 9, "eval_loss": 1.0}]
    (tmp_path / "policy/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    epochs = [{"step": i, "epoch": i, "loss": 1.0, "seconds": 0.25} for i in range(3)]
    (tmp_path / "tokens/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    evo = {"policy": str(tmp_path / "policy"), "tokens": str(tmp_path / "tokens")}
    assert agent_costs(evo) == {"parameters": 10 + 15, "training_seconds": 12.5 + 0.75}
    assert agent_costs({"policy": evo["policy"]}) == {"parameters": 10, "training_seconds": 12.5}
    assert agent_costs({"policy": evo["policy"], "rewrite": True})["training_seconds"] == 0
    assert agent_costs({"verbatim": True}) == {"parameters": 0, "training_seconds": 0}


def test_both_stages_in_one_folder_count_once(tmp_path):
    for name, shape in {"model": (4, 3), "model_tokens": (5, 3)}.items():
        save_file({"w": np.zeros(shape, dtype="f4")}, tmp_path / f"{name}.safetensors")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 9, "train_runtime": 12.5}) + "\n")
    joint = {"policy": str(tmp_path), "tokens": str(tmp_path)}
    assert agent_costs(joint) == {"parameters": 12 + 15, "training_seconds": 12.5}


def test_what_is_not_known(tmp_path):
    assert agent_costs({"policy": "somebody/model"}) == {"parameters": None, "training_seconds": None}
    assert num_parameters(tmp_path) is None and training_seconds(tmp_path) is None
