"""Sample answers during training."""

import json
from types import SimpleNamespace

import torch
from datasets import load_from_disk

from align.sample_answers import SampleAnswers
from align.scratch import build_from_scratch
from rollouts.catalog import Catalog
from rollouts.dialogue import Dialogue


def test_answers_are_judged_and_training_is_left_as_it_was(bench, tokenizer, tiny, tmp_path):
    rows = load_from_disk(str(bench / "sd15"))["eval"].select(range(3))
    tiny.max_position_embeddings = 2048
    model = build_from_scratch(tiny, tokenizer).train()
    callback = SampleAnswers(Dialogue(tokenizer), rows, Catalog.load(bench / "catalog.jsonl"), 5, tmp_path)
    args = SimpleNamespace(report_to=[], load_best_model_at_end=False)
    before = torch.random.get_rng_state()
    for step in (10, 20, 20):  # the last one again, as after training
        callback.on_evaluate(args, SimpleNamespace(is_world_process_zero=True, global_step=step), None, model=model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    written = [json.loads(line) for line in (tmp_path / "sample_answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [10] * 3 + [20] * 3
    assert [row["asked for"] for row in written[:3]] == [row["model"] for row in rows["api"]]
    assert [row["prompt"] for row in written[:3]] == [row["prompt"] for row in rows["instruction"]]
    assert {row["verdict"] for row in written} == {"not_json"}
    assert [row["answer"] for row in written[:3]] == [row["answer"] for row in written[3:]], "greedy"


def test_only_the_main_process_answers(bench, tokenizer, tmp_path):
    callback = SampleAnswers(Dialogue(tokenizer), [], Catalog.load(bench / "catalog.jsonl"), 5, tmp_path)
    callback.on_evaluate(None, SimpleNamespace(is_world_process_zero=False, global_step=1), None, model=None)
    assert not (tmp_path / "sample_answers.jsonl").exists()
