"""Plans that are kept, and what is asked for."""

import pytest

from align.agents.chat_answers import ChatAnswer
from align.agents.chatgen import ChatGenAgent
from align.chats import load_chats
from align.evaluation.chatgen_plans import GIVEN, KeptPlans, PlannerOptions, load_agent
from rewards.commandline import ConfigError
from rollouts.catalog import Catalog


@pytest.fixture
def asked(monkeypatch):
    """How many chats policies are asked to answer, call by call."""
    counts = []

    def ask(agent, chats, task, max_new_tokens):
        counts.append(len(chats))
        return [ChatAnswer('{"prompt": "a fox", "model": "Owl Painter - v2"}', (), True, 0.25) for _ in chats]

    monkeypatch.setattr(ChatGenAgent, "_ask", ask)
    return counts


@pytest.mark.parametrize("given", [{}, {"rewrite": True}])
def test_agents_that_write_everything_at_once_are_asked_once(
    given, asked, chat_policy, chat_tokens, chat_bench, tmp_path
):
    catalog, rows = Catalog.load(chat_bench / "catalog.jsonl"), list(load_chats(chat_bench)["test"])[:5]
    options = PlannerOptions(str(chat_bench), 2, "float32", "cpu")
    given = {"policy": str(chat_policy)} | given
    found = {}
    for part in ("ablation", "alone"):
        planner = KeptPlans("Base", given, catalog, options)
        if part == "ablation":
            planner.plan(rows, tmp_path / "plans.jsonl")
            assert asked == [2, 2, 1]
        found[part] = [planner.plan(rows, tmp_path / f"{part}-{stage}.jsonl", GIVEN[stage]) for stage in GIVEN]
    assert found["ablation"] == found["alone"]
    assert asked == 4 * [2, 2, 1]  # `alone` had nothing to go by
    for stage, plans in zip(GIVEN, found["ablation"], strict=True):
        assert all(plan[step] == row[step] for plan, row in zip(plans, rows, strict=True) for step in GIVEN[stage])


def test_evo_is_asked_again(asked, chat_policy, chat_tokens, chat_bench, tmp_path):
    catalog, rows = Catalog.load(chat_bench / "catalog.jsonl"), list(load_chats(chat_bench)["test"])[:2]
    given = {"policy": str(chat_policy), "tokens": str(chat_tokens), "arguments": "usual"}
    planner = KeptPlans("Evo", given, catalog, PlannerOptions(str(chat_bench), 2, "float32", "cpu"))
    planner.plan(rows, tmp_path / "plans.jsonl")
    planner.plan(rows, tmp_path / "arguments.jsonl", GIVEN["arguments"])
    planner.plan(rows, tmp_path / "prompt.jsonl", GIVEN["prompt"])
    assert asked == [2, 0, 2]


def test_agents_may_be_kept_from_repeating_themselves(asked, chat_policy, chat_bench, tmp_path):
    catalog, rows = Catalog.load(chat_bench / "catalog.jsonl"), list(load_chats(chat_bench)["test"])[:1]
    options = PlannerOptions(str(chat_bench), 2, "float32", "cpu")
    plain, kept = {"policy": str(chat_policy)}, {"policy": str(chat_policy), "no_repeat_ngram_size": 6}
    assert load_agent(plain, catalog, options).no_repeat_ngram_size == 0
    assert load_agent(kept, catalog, options).no_repeat_ngram_size == 6
    # Plans of one are not taken for plans of the other.
    KeptPlans("Base", plain, catalog, options).plan(rows, tmp_path / "plans.jsonl")
    with pytest.raises(ConfigError, match="holds plans of"):
        KeptPlans("Base", kept, catalog, options).plan(rows, tmp_path / "plans.jsonl")
