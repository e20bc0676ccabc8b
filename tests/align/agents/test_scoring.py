"""Probabilities of names beside every name scored alone, and beams beside all of them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.agents.scoring import NameScorer, likeliest_names, name_tokens
from rollouts.call_constraint import CallConstraint

PROMPTS = ["a fox in pixel art", "水", "a long road, ink on paper, dusk, fog"]


@pytest.fixture(scope="module")
def constraint(dialogue, shop):
    return CallConstraint.of_models(dialogue, shop.of_architecture("SD 1.5"))


def of_kind(kind, dialogue):
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(dialogue.tokenizer), **sizes[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def test_name_tokens_end_with_the_closing_quote(constraint, dialogue):
    entries = list(constraint.grammar.entries.values())
    for entry, ids in zip(entries, name_tokens(constraint, entries), strict=True):
        text = entry.default_call().to_json()
        name = text[: text.index(', "type": ')]
        assert constraint.tokens.join(ids).decode().startswith(name)
        assert not constraint.tokens.join(ids[:-1]).decode(errors="ignore").startswith(name)
        assert ids == dialogue.response_ids([text])[0][: len(ids)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_one_pass_gives_what_every_name_alone_does(kind, policy, dialogue, constraint):
    model = policy if kind == "llama" else of_kind(kind, dialogue)
    entries = list(constraint.grammar.entries.values())
    prompts = [dialogue.encode_prompt(text) for text in PROMPTS]
    names = [name_tokens(constraint, entries[start:end]) for start, end in ((0, 5), (2, 3), (4, 12))]
    found = NameScorer(model)(prompts, names)
    for prompt, own, scores in zip(prompts, names, found, strict=True):
        assert scores.shape == (len(own),) and scores.dtype == torch.float32
        for ids, score in zip(own, scores.tolist(), strict=True):
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].log_softmax(-1)
            expected = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_beams_find_the_likeliest_names(policy, dialogue, constraint):
    entries = list(constraint.grammar.entries.values())
    prompts = [dialogue.encode_prompt(text) for text in PROMPTS]
    found = likeliest_names(policy, prompts, constraint, 6)
    scores = NameScorer(policy)(prompts, [name_tokens(constraint, entries)] * len(prompts))
    for names, own in zip(found, scores, strict=True):
        assert 2 <= len(names) <= 6 and len(set(names)) == len(names)
        best = entries[int(own.argmax())].name
        assert best in names
    assert found[0][0] == "Pixel Wave - v10"
    single = CallConstraint.of_models(dialogue, entries[:1])
    assert likeliest_names(policy, prompts[:1], single, 3) == [[entries[0].name]]
