"""`python -m align.evaluation.chatgen` on toy agents."""

import json

import pytest

from align.evaluation.chatgen import ChatGenEvaluationConfig, main
from rewards.commandline import ConfigError


@pytest.fixture(scope="module")
def agents(chat_policy, chat_tokens):
    policy = str(chat_policy)
    evo, plain = {"policy": policy, "tokens": str(chat_tokens)}, {"policy": policy, "rewrite": True}
    return {"Evo": evo, "Base": {"policy": policy}, "Baseline": plain}


@pytest.fixture(scope="module")
def make(agents, chat_bench, minilm):
    def make(folder, **options):
        options = {"agents": agents, "max_rows": 10, "encoder": minilm, "device": "cpu"} | options
        return main(ChatGenEvaluationConfig(str(chat_bench), str(folder), **options))

    return make


@pytest.mark.slow
def test_tables_hold_every_agent_and_a_second_run_asks_nothing(make, agents, tmp_path):
    report = make(tmp_path)
    assert set(report) == {"Evo", "Base", "Baseline"} and report["Evo"]["all"]["version"]["n"] == 10
    assert report["Base"]["all"]["version"]["value"] == 0  # an untrained policy names no model
    table = (tmp_path / "table.md").read_text()
    assert "### all" in table and "### history" in table and "| Evo | 10 |" in table
    before = (tmp_path / "plans-0.jsonl").read_bytes()
    assert make(tmp_path) == report and (tmp_path / "plans-0.jsonl").read_bytes() == before
    # A run that was killed while it wrote goes on.
    (tmp_path / "plans-0.jsonl").write_bytes(before[: len(before) * 2 // 3])
    assert make(tmp_path)["Evo"]["all"]["version"] == report["Evo"]["all"]["version"]
    assert len((tmp_path / "plans-0.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow
def test_given_steps_are_right(make, agents, tmp_path):
    report = make(tmp_path, agents={"Evo": agents["Evo"]}, given=["prompt", "model"])["Evo"]["all"]
    assert report["version"]["value"] == report["version_top5"]["value"] == 1
    assert report["prompt"]["value"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="plans-0.jsonl holds plans of .*name another `output_dir`"):
        make(tmp_path, agents={"Evo": agents["Evo"]}, given=[])
    plans = [json.loads(line)["plan"] for line in (tmp_path / "plans-0.jsonl").read_text().splitlines()]
    assert all(plan["arguments"]["sampler"] for plan in plans)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"agents": {}}, "`agents` is empty"),
        ({"agents": {"a": {"tokens": "x"}}}, "a must have `policy`"),
        ({"agents": {"a": {"policy": "x", "toks": "y"}}}, "can have `tokens`"),
        ({"given": ["dreams"]}, "`given` may hold prompt, model, arguments, but has dreams"),
    ],
)
def test_options_that_can_not_be_used_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ChatGenEvaluationConfig("d", "o", **({"agents": {"a": {"policy": "x"}}} | options))
