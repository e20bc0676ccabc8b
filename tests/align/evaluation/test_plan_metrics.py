"""Step-wise metrics of plans, against counts by hand and the bert-score package."""

import math

import pytest

from align.chats import load_chats
from align.evaluation.bert_score import BertScorer
from align.evaluation.plan_metrics import METRICS, chosen_models, estimates, stepwise, to_markdown
from rollouts.catalog import Catalog


@pytest.fixture(scope="module")
def scorer(minilm):
    return BertScorer.from_pretrained(minilm, device="cpu")


@pytest.fixture(scope="module")
def rows(chat_bench):
    return list(load_chats(chat_bench)["test"])[:6]


@pytest.fixture(scope="module")
def catalog(chat_bench):
    return Catalog.load(chat_bench / "catalog.jsonl")


def plan_of(row, **changes):
    models = changes.pop("models", [row["model"]])
    plan = {"prompt": row["prompt"], "negative_prompt": "", "model": row["model"], "arguments": dict(row["arguments"])}
    trail = [{"name": "prompt", "raw": row["prompt"]}, {"name": "model", "raw": models}]
    return plan | {"trail": trail} | changes


def test_a_perfect_plan_has_everything(rows, catalog, scorer):
    values = stepwise([plan_of(row) for row in rows], rows, scorer, catalog)
    assert values["prompt"] == pytest.approx([1.0] * 6, abs=1e-5)
    for name in ("version", "version_top5", "model", "arguments", "arguments/steps"):
        assert values[name] == [1.0] * 6
    assert all(map(math.isnan, values["arguments/clip_skip"]))  # not known of these rows


def test_prompts_are_scored_as_the_package_does(rows, catalog, scorer, minilm):
    bert_score = pytest.importorskip("bert_score", reason="needs the peer: pip install bert-score")
    said = ["a fox", "something else entirely", rows[2]["prompt"], "a whale in fog", "x", "masterpiece"]
    values = stepwise([plan_of(r, prompt=s) for r, s in zip(rows, said, strict=True)], rows, scorer, catalog)
    peer = bert_score.BERTScorer(model_type=minilm, num_layers=6, device="cpu")
    expected = [peer.score([s], [row["prompt"]])[2].item() for s, row in zip(said, rows, strict=True)]
    assert values["prompt"] == pytest.approx(expected, abs=1e-5)


def test_models_count_by_what_the_policy_named(rows, catalog, scorer):
    right = rows[0]["model"]
    other = next(name for name in catalog if name != right)
    plans = [
        plan_of(rows[0], models=[other, right]),
        plan_of(rows[0], models=["no such model"]),  # the plan's model, a stand-in, happens to be right
        plan_of(rows[0], models=[None]),
        plan_of(rows[0], models=[other] * 5 + [right]),
        plan_of(rows[0], models=[right]),
        plan_of(rows[0], trail=[]),
    ]
    values = stepwise(plans, [rows[0]] * 6, scorer, catalog)
    assert values["version"] == [0, 0, 0, 0, 1, 0]
    assert values["version_top5"] == [1, 0, 0, 0, 1, 0]
    assert values["model"] == [0, 0, 0, 0, 1, 0]
    assert chosen_models(plans[5]) == []


def test_arguments_are_a_mean_over_those_that_the_row_knows(rows, catalog, scorer):
    wrong = dict(rows[0]["arguments"]) | {"steps": 99, "width": 640}
    known = rows[1] | {"arguments": rows[1]["arguments"] | {"clip_skip": 2}}
    plans = [plan_of(rows[0], arguments=wrong), plan_of(known, arguments=dict(rows[1]["arguments"]))]
    values = stepwise(plans, [rows[0], known], scorer, catalog)
    assert values["arguments"] == pytest.approx([3 / 5, 5 / 6])
    assert values["arguments/steps"] == [0, 1] and values["arguments/clip_skip"][1] == 0


def test_groups_are_settings_and_input_types(rows, catalog, scorer):
    values = stepwise([plan_of(row) for row in rows], rows, scorer, catalog)
    found = estimates(values, rows)
    assert set(found) == {"all", "supervised", "single", "multimodal", "history"}
    assert found["all"]["version"].n == 6 and found["single"]["version"].n == 2
    assert "arguments/clip_skip" not in found["all"]  # nobody knows it
    text = to_markdown({"Evo | 1": found, "Base": {"all": found["all"]}})
    assert text.count("### ") == 5 and "| Evo   1 | 6 | 100.0 [100.0, 100.0] |" in text
    assert all(title in text for title in METRICS.values()) and text.count("| Base |") == 1
