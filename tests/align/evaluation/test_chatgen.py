"""`python -m align.evaluation.chatgen` on toy agents."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from align.evaluation.chatgen import ChatGenEvaluationConfig, main
from align.evaluation.chatgen_draw import DrawingConfig
from align.evaluation.metrics import bootstrap
from align.evaluation.plan_results import PlanResultsError, load_results
from rewards.commandline import ConfigError
from rollouts.catalog import Catalog
from rollouts.policy import load_policy


@pytest.fixture(scope="module")
def agents(chat_policy, chat_tokens):
    policy = str(chat_policy)
    evo, plain = {"policy": policy, "tokens": str(chat_tokens)}, {"policy": policy, "rewrite": True}
    return {"Evo": evo, "Base": {"policy": policy}, "Baseline": plain, "Verbatim": {"verbatim": True}}


@pytest.fixture(scope="module")
def make(agents, chat_bench, minilm):
    def make(folder, **options):
        options = {"agents": agents, "max_rows": 6, "encoder": minilm, "device": "cpu"} | options
        return main(ChatGenEvaluationConfig(str(chat_bench), str(folder), **options))

    return make


@pytest.mark.slow
def test_tables_hold_every_agent_and_a_second_run_asks_nothing(make, agents, tmp_path):
    report = make(tmp_path)["stepwise"]
    assert set(report) == {"Evo", "Base", "Baseline", "Verbatim"} and report["Evo"]["all"]["version"]["n"] == 6
    assert report["Base"]["all"]["version"]["value"] == 0  # an untrained policy names no model
    table = (tmp_path / "table.md").read_text()
    assert "### all" in table and "### history" in table and "| Evo | 6 |" in table
    before = (tmp_path / "plans-0.jsonl").read_bytes()
    assert make(tmp_path)["stepwise"] == report and (tmp_path / "plans-0.jsonl").read_bytes() == before
    # A run that was killed while it wrote goes on.
    (tmp_path / "plans-0.jsonl").write_bytes(before[: len(before) * 2 // 3])
    assert make(tmp_path)["stepwise"]["Evo"]["all"]["version"] == report["Evo"]["all"]["version"]
    assert len((tmp_path / "plans-0.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_given_steps_are_right(make, agents, tmp_path):
    report = make(tmp_path, agents={"Evo": agents["Evo"]}, given=["prompt", "model"])["stepwise"]["Evo"]["all"]
    assert report["version"]["value"] == report["version_top5"]["value"] == 1
    assert report["prompt"]["value"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="plans-0.jsonl holds plans of .*name another `output_dir`"):
        make(tmp_path, agents={"Evo": agents["Evo"]}, given=[])
    plans = [json.loads(line)["plan"] for line in (tmp_path / "plans-0.jsonl").read_text().splitlines()]
    assert all(plan["arguments"]["sampler"] for plan in plans)


@pytest.mark.slow
def test_the_step_wise_halves_of_tables_4_to_7(make, agents, chat_tokens, tmp_path):
    evo = {"Evo": agents["Evo"]}
    tables = make(tmp_path, agents=evo, max_rows=6, ablation=True, baselines=["default", "tfidf"])
    table = {(row["stage"], row["method"]): row for row in tables["table6"]["rows"]}
    results = load_results(tmp_path)
    assert [row["setting"] for row in tables["table4"]["rows"]] == ["supervised"]  # there is no other
    for stage, metric in (("prompt", "prompt"), ("model", "version"), ("arguments", "arguments")):
        rows = results.of(stage, "Evo")
        values = [row["steps"][metric] for row in rows]
        assert len(values) == 6 and table[stage, "Evo"]["step"] == bootstrap(values)._asdict()
        for row in rows:  # the ground truth of the other steps, and only that
            plan, truth = json.loads(row["plan"]), row | {"arguments": json.loads(row["arguments"])}
            assert all(plan[step] == truth[step] for step in {"prompt", "model", "arguments"} - {stage})
        lines = (tmp_path / f"plans-0-{stage}.jsonl").read_text().splitlines()
        assert {json.loads(line)["device"] for line in lines} == {"cpu"}
    assert any(json.loads(row["plan"])["prompt"] != row["prompt"] for row in results.of("prompt", "Evo"))
    # Of the whole plan: seconds of its steps; parameters of policy and tokens.
    (five,) = tables["table5"]["rows"]
    plans = [json.loads(line)["plan"] for line in (tmp_path / "plans-0.jsonl").read_text().splitlines()]
    seconds = [sum(step["seconds"] for step in plan["trail"]) for plan in plans]
    assert five["seconds"]["value"] == pytest.approx(sum(seconds) / 6) and five["device"] == "cpu"
    with safe_open(chat_tokens / "model_tokens.safetensors", framework="np") as file:
        of_tokens = sum(file.get_tensor(name).size for name in list(file.keys()))
    policy = load_policy(agents["Evo"]["policy"])
    assert five["parameters"] == sum(p.numel() for p in policy.parameters()) + of_tokens
    assert five["training_seconds"] is None  # nobody trained the policy
    # 8 demonstrations of every model in the training split.
    choice = {(row["method"], row["demonstrations"]): row for row in tables["selection"]["rows"]}
    assert set(choice) == {(m, g) for m in ("Evo", "default model", "TF-IDF nearest neighbour") for g in ("all", "6+")}
    assert choice["TF-IDF nearest neighbour", "6+"]["version"]["value"] == 1
    assert "| Evo | 6+ |" in (tmp_path / "selection.md").read_text()
    assert [row["input_type"] for row in tables["table7"]["rows"]] == ["single", "multimodal", "history"]
    assert "fid" not in tables["table4"]["estimates"] and "regret" not in tables


SCORER = """
import numpy as np, torch

class Red:
    def __call__(self, prompts, images):
        return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])

def load(*, checkpoint=None, config=None, tokenizer=None, device=None, dtype=None):
    return Red()
"""


@pytest.mark.slow
def test_plans_and_pictures_by_one_command(agents, chat_bench, toy_world, minilm, tmp_path, monkeypatch):
    (tmp_path / "red_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "chats").symlink_to(chat_bench / "chats")
    files = toy_world.catalog[toy_world.sd].files
    entries = [e.model_copy(update={"files": files}) for e in Catalog.load(chat_bench / "catalog.jsonl").values()]
    Catalog(entries).save(bench / "catalog.jsonl")
    options = {"encoder": minilm, "device": "cpu", "max_rows": 3, "given": ["arguments"]}
    agents = {name: agents[name] for name in ("Evo",)}
    rollout = {"native_side": 64, "scorers": {"red": {"name": "red_scorer:load"}}}
    drawing = DrawingConfig(weights=str(toy_world.folder), rollout=rollout, fid_resamples=5)
    config = ChatGenEvaluationConfig(str(bench), str(tmp_path / "out"), agents=agents, **options)
    evo, truth = main(config, drawing)["table4"]["rows"]
    assert (evo["method"], evo["drawn"], evo["not_drawn"], evo["red"]["n"]) == ("Evo", 3, {}, 3)
    rows = load_results(tmp_path / "out").of("", "Evo")
    values = [np.asarray(Image.open(row["images"][0]))[..., 0].mean() for row in rows]
    assert evo["red"]["value"] == pytest.approx(np.mean(values), abs=1e-3)
    assert truth["version"] is None and evo["unified"]["value"] == pytest.approx(
        (np.mean(values) - min_and_max(tmp_path / "out")[0]) / np.ptp(min_and_max(tmp_path / "out")), abs=1e-4
    )
    # Without files no plan can be drawn, nor the default call in its place.
    Catalog(e.model_copy(update={"files": []}) for e in entries).save(bench / "catalog.jsonl")
    with pytest.raises(PlanResultsError, match="No plan can be drawn, and the default call of .* neither .no_file: "):
        main(config, drawing)


def min_and_max(folder):
    """Of the pictures of a folder: the ranges of Eq. 6, without FID."""
    red = [np.asarray(Image.open(path))[..., 0].mean() for path in folder.rglob("*.png")]
    return np.array([min(red), max(red)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"agents": {}}, "`agents` is empty"),
        ({"agents": {"a": {"tokens": "x"}}}, "a must have `policy`"),
        ({"agents": {"a": {"policy": "p", "tokens": "x", "arguments": "all"}}}, "written or usual, but is 'all'"),
        ({"agents": {"a": {"policy": "x", "toks": "y"}}}, "can have arguments, no_repeat_ngram_size, rewrite, tokens"),
        ({"agents": {"a": {"policy": "x", "no_repeat_ngram_size": -1}}}, "`no_repeat_ngram_size` of a must be 0 or"),
        ({"agents": {"a": {"verbatim": False}}}, "or be {verbatim: true}, but has {'verbatim': False}"),
        ({"agents": {"a": {"verbatim": True, "policy": "x"}}}, "or be {verbatim: true}, but has"),
        ({"agents": {"ground truth": {"policy": "x"}}}, "'ground truth' can't be the name of an agent"),
        ({"given": ["prompt"], "ablation": True}, "`ablation` gives the right steps by itself"),
        ({"baselines": ["magic"]}, "`baselines` may hold default, popular, tfidf, embedding, but has magic"),
        ({"learn_from": "dreams"}, "`learn_from` must be chat or prompt, but is 'dreams'"),
        ({"given": ["dreams"]}, "`given` may hold prompt, model, arguments, but has dreams"),
    ],
)
def test_options_that_can_not_be_used_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ChatGenEvaluationConfig("d", "o", **({"agents": {"a": {"policy": "x"}}} | options))
