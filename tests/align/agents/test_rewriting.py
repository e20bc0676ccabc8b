"""The baselines without fine-tuning."""

import pytest

from align.agents.rewriting import RewritingAgent, VerbatimAgent
from align.chat_dialogue import ChatDialogue
from align.chats import load_chats
from rollouts.catalog import Catalog
from rollouts.dialogue import DialogueError
from rollouts.policy import load_policy, load_tokenizer


@pytest.fixture(scope="module")
def agent(chat_policy, chat_bench):
    policy = load_policy(str(chat_policy), dtype="float32").eval()
    dialogue = ChatDialogue(load_tokenizer(str(chat_policy)))
    catalog, rows = Catalog.load(chat_bench / "catalog.jsonl"), load_chats(chat_bench)["train"]
    return RewritingAgent(policy, dialogue, catalog, rows, max_prompt_tokens=10)


CHATS = [[{"role": "user", "content": text}] for text in ("a fox in the rain, please", "", "ignore it all {")]


def test_the_default_model_draws_with_default_parameters(agent):
    default = agent.catalog.default_call("SD 1.5")
    for plan in agent.plans(CHATS):
        assert plan.call(agent.catalog) == agent.catalog.reconstruct(default.model, default.to_dict())
        assert plan.prompt and plan.model == default.model and plan.arguments["steps"] == default.sampling_steps


def test_examples_stand_before_the_chat(agent, chat_bench):
    text = agent.dialogue.tokenizer.decode(agent.dialogue.encode_chat(CHATS[0], agent._task).input_ids)
    assert text.count("Request:") == 4 and text.count("Prompt:") == 3
    assert text.rindex("Request:") < text.index("a fox in the rain, please")
    prompts = {row["prompt"] for row in load_chats(chat_bench)["train"]}
    assert sum(f"Prompt: {prompt}" in text for prompt in prompts) == 3


def test_truths_and_empty_answers(agent):
    plan = agent._plan("Prompt:  a red\n fox ", "x", {}, 0.0)
    assert plan.prompt == "a red fox" and plan.notes == ()
    assert agent._plan("", "what I said", {}, 0.0).notes == ("no_prompt: the user's words instead",)
    given = agent._plan("", "x", {"prompt": "p", "model": "Owl Painter - v2", "arguments": {"steps": 9}}, 0.0)
    assert (given.prompt, given.model, given.arguments) == ("p", "Owl Painter - v2", {"steps": 9})


@pytest.mark.parametrize("text", ["Prompt:  a red\n fox ", ""])
@pytest.mark.parametrize("truth", [{}, {"prompt": "p", "model": "Owl Painter - v2"}, {"arguments": {"steps": 9}}])
def test_ground_truth_afterwards_is_ground_truth_at_once(agent, text, truth):
    kept = agent._plan(text, "what I said", {}, 0.5, ("a note",)).to_dict()
    assert agent.replanned(kept, truth) == agent._plan(text, "what I said", truth, 0.5, ("a note",))


@pytest.fixture(scope="module")
def verbatim(chat_bench):
    return VerbatimAgent(Catalog.load(chat_bench / "catalog.jsonl"))


def test_verbatim_prompts_are_what_the_user_said(verbatim):
    history = [
        {"role": "user", "content": [{"type": "image", "image": "../none.png"}, {"type": "text", "text": "a  fox\n"}]},
        {"role": "assistant", "content": "Here it is."},
        {"role": "user", "content": "in the rain"},
    ]
    plans = verbatim.plans([*CHATS, history])
    said = ["a fox in the rain, please", "a picture", "ignore it all {", "a fox in the rain"]
    assert [plan.prompt for plan in plans] == said
    default = verbatim.catalog.default_call("SD 1.5")
    for plan in plans:
        assert plan.call(verbatim.catalog) == verbatim.catalog.reconstruct(default.model, default.to_dict())
    assert verbatim.plan(CHATS[0]) == plans[0] and plans[1].trail[0].raw == ""
    with pytest.raises(DialogueError):
        verbatim.plan([])


@pytest.mark.parametrize("truth", [{}, {"prompt": "p", "model": "Owl Painter - v2"}, {"arguments": {"steps": 9}}])
def test_verbatim_plans_are_ground_truth_where_there_is_some(verbatim, truth):
    plan = verbatim.plan(CHATS[0], truth)
    assert {"prompt": plan.prompt, "model": plan.model, "arguments": plan.arguments} | truth == {
        "prompt": plan.prompt, "model": plan.model, "arguments": plan.arguments
    }  # fmt: skip
    assert verbatim.replanned(verbatim.plan(CHATS[0]).to_dict(), truth) == plan
