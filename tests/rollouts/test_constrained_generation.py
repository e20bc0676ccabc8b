"""Jump-forward decoding beside `generate`, and beside what a trained policy would say anyway."""

import contextlib
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.scratch import ScratchConfig, build_from_scratch
from rollouts.call_constraint import CallConstraint, CallProcessor
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.constrained_generation import Sampling, generate_calls

TEXTS = ["a fox", "a very long road to nowhere, ink on paper", "水", "cats"]


@pytest.fixture(scope="module")
def dialogue(awkward_dialogue):
    return awkward_dialogue


def make(dialogue, kind="llama", **options):
    if kind == "llama":
        size = ScratchConfig(
            vocab_size=len(dialogue.tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=96, max_position_embeddings=2048, **options,
        )  # fmt: skip
        return build_from_scratch(size, dialogue.tokenizer).eval()
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048},
        "mistral": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "sliding_window": 64},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    }  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=len(dialogue.tokenizer), **sizes[kind])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def policy(dialogue):
    return make(dialogue)


@pytest.fixture(scope="module")
def trained(dialogue, awkward_catalog, taught):
    """A policy that has learned a call of its own for each text by heart."""
    chosen = ["Pixel Wave - v10", "水彩 - v1", 'Quote "Q" {x} - v2', "שלום - v2"]
    changes = [{}, {"cfg scale": 7.5}, {"width": 768, "sampling method": "DPM++ 2M Karras"}, {"sampling steps": 35}]
    calls = [
        awkward_catalog.reconstruct(name, awkward_catalog[name].default_call().to_dict() | change)
        for name, change in zip(chosen, changes, strict=True)
    ]
    return taught(dialogue, [(text, call.to_json()) for text, call in zip(TEXTS, calls, strict=True)]), calls


def prompts_of(dialogue, texts=TEXTS):
    return [dialogue.encode_prompt(text) for text in texts]


def own_logps(policy, prompt, ids):
    """Every token scored in one pass without a cache."""
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].log_softmax(-1)
    return [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)]


def test_a_valid_greedy_answer_comes_out_the_same(trained, dialogue, constraint):
    policy, calls = trained
    for text, prompt, call in zip(TEXTS, prompts_of(dialogue), calls, strict=True):
        output = policy.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=300
        )[0, len(prompt) :].tolist()
        assert dialogue.decode(output) == call.to_json(), text
        for jump_forward in (True, False):
            (found,) = generate_calls(policy, [prompt], constraint, jump_forward=jump_forward, read_description=True)
            assert found.call == call and found.text == call.to_json()
            assert found.token_ids == output[:-1]
            assert found.token_logps == pytest.approx(own_logps(policy, prompt, output[:-1]), abs=1e-4)


def test_jump_forward_asks_far_less_often(trained, dialogue, constraint):
    policy, calls = trained
    found = generate_calls(policy, prompts_of(dialogue), constraint)
    assert [item.call for item in found] == calls
    for item in found:
        assert item.num_passes == len(item.decisions) <= len(item.token_ids) / 3
        # What follows the last decision is not read.
        assert len(item.token_logps) == item.decisions[-1] + 1 < len(item.token_ids)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bloom"])
@pytest.mark.parametrize("read_description", [False, True])
def test_a_batch_is_every_prompt_alone(dialogue, constraint, awkward_catalog, kind, read_description):
    policy, prompts = make(dialogue, kind), prompts_of(dialogue)
    together = generate_calls(policy, prompts, constraint, read_description=read_description)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generate_calls(policy, [prompt], constraint, read_description=read_description)
        assert (alone.token_ids, alone.decisions, alone.num_passes) == (
            found.token_ids, found.decisions, found.num_passes
        )  # fmt: skip
        assert alone.token_logps == pytest.approx(found.token_logps, abs=1e-4)
        expected = own_logps(policy, prompt, found.token_ids)
        assert found.token_logps == pytest.approx(expected[: len(found.token_logps)], abs=1e-4)
        assert len(found.token_logps) == len(found.token_ids) or not read_description
        assert awkward_catalog.judge(found.text).reason is None


def test_decisions_are_the_likeliest_of_what_is_allowed(policy, dialogue, constraint):
    prompts = prompts_of(dialogue)
    for prompt, found in zip(prompts, generate_calls(policy, prompts, constraint), strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([[*prompt, *found.token_ids]]), use_cache=False).logits[0]
        state, expected, model = constraint.grammar.start, [], []
        for position, token in enumerate(found.token_ids):
            if position in found.decisions:
                allowed = torch.from_numpy(constraint.allowed(state))
                own = logits[len(prompt) - 1 + position][allowed].log_softmax(0)
                assert token == allowed[own.argmax()].item()
                expected.append(own.max().item())
                if constraint.grammar.chosen_model(state) is None:
                    model.append(own.max().item())
            state = constraint.advance(state, token)
        assert found.choice_logps == pytest.approx(expected, abs=1e-4)
        assert found.model_logp == pytest.approx(sum(model), abs=1e-4) and model


def test_without_jumps_it_is_generate_with_the_processor(policy, dialogue, constraint):
    end = dialogue.tokenizer.eos_token_id
    for prompt in prompts_of(dialogue):
        (found,) = generate_calls(policy, [prompt], constraint, jump_forward=False)
        output = policy.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=1500,
            eos_token_id=end, logits_processor=[CallProcessor(constraint, len(prompt), end)],
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert output == [*found.token_ids, end]
        assert len(found.decisions) == found.num_passes == len(found.token_ids)


def test_samples_follow_the_policy(policy, dialogue, awkward_catalog):
    """How often one of two models is drawn, beside its probability, added up over all ways of writing it in tokens."""
    constraint = CallConstraint.of_models(dialogue, [awkward_catalog[name] for name in ("Pixel", "{}")])
    prompt = dialogue.encode_prompt("a fox")

    def probability(temperature, state, ids):
        forced, state = constraint.forced(state, constraint.tokens.join(ids))
        if name := constraint.grammar.chosen_model(state):
            return float(name == "Pixel")
        ids = [*ids, *forced]
        allowed = constraint.allowed(state)
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1][torch.from_numpy(allowed)]
        parts = zip(allowed.tolist(), (logits / temperature).softmax(0).tolist(), strict=True)
        return sum(p * probability(temperature, constraint.advance(state, id), [*ids, id]) for id, p in parts)

    for temperature in (1.0, 0.1):
        expected = probability(temperature, constraint.grammar.start, [])
        found = generate_calls(policy, [prompt] * 400, constraint, sampling=Sampling(temperature=temperature, seed=3))
        share = sum(item.call.model == "Pixel" for item in found) / 400
        assert 0.02 < expected < 0.98
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 400) ** 0.5)


def test_sampling_is_seeded_and_a_tiny_top_p_is_greedy(policy, dialogue, constraint):
    prompts = prompts_of(dialogue)

    def texts(**options):
        return [item.text for item in generate_calls(policy, prompts, constraint, **options)]

    assert texts(sampling=Sampling(seed=1)) == texts(sampling=Sampling(seed=1)) != texts(sampling=Sampling(seed=2))
    assert texts(sampling=Sampling(top_p=1e-6)) == texts()
    for options, message in (({"temperature": 0}, "`temperature` must be above 0"), ({"top_p": 0}, "`top_p` must be")):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


def test_each_prompt_can_have_models_of_its_own(policy, dialogue, awkward_catalog):
    own = [[name] for name in ("Pixel", "水 - v1", "512")] + [list(awkward_catalog)]
    constraints = [CallConstraint.of_models(dialogue, [awkward_catalog[name] for name in names]) for names in own]
    found = generate_calls(policy, prompts_of(dialogue), constraints)
    assert [item.call.model for item in found][:3] == ["Pixel", "水 - v1", "512"]
    with pytest.raises(ValueError, match="1 constraints for 4 prompts"):
        generate_calls(policy, prompts_of(dialogue), constraints[:1])
    assert generate_calls(policy, [], constraints[0]) == []


def test_models_without_a_cache_of_keys_and_values_are_refused(dialogue, constraint):
    with pytest.raises(ValueError, match=r"can't read several tokens.*other state than keys and values.*CallProcessor"):
        generate_calls(make(dialogue, "mamba"), prompts_of(dialogue)[:1], constraint)


def catalog_of(size, awkward_catalog):
    """The awkward names, and many more with signs from 900 characters."""
    entries = list(awkward_catalog.values())
    for i in range(9000):
        name = f'{chr(33 + i * 7 % 900)}{chr(33 + i * 31 % 900)} "{i}"'
        copy = entries[i % 3].model_dump(by_alias=True) | {"name": name, "version_id": 1000 + i}
        with contextlib.suppress(ValueError):  # signs that no catalogue takes
            entries.append(CatalogEntry.model_validate(copy))
    assert len(entries) >= size
    return Catalog(entries[:size])


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 500, 6000])
def test_no_random_policy_ever_writes_an_invalid_call(dialogue, awkward_catalog, size):
    catalog = catalog_of(size, awkward_catalog)
    constraint = CallConstraint.of_models(dialogue, catalog.values())
    policy, seen = make(dialogue), set()
    # T2I_ALIGN_RANDOM_CALLS=3400 makes ten thousand of all three.
    for seed in range(int(os.environ.get("T2I_ALIGN_RANDOM_CALLS", "400")) // 100):
        prompts = prompts_of(dialogue, [f"picture {seed} {i}" for i in range(100)])
        for found in generate_calls(policy, prompts, constraint, sampling=Sampling(temperature=3.0, seed=seed)):
            judged = catalog.judge(found.text)
            assert judged.reason is None and judged.call == found.call and found.text == found.call.to_json()
            seen.add(found.call.model)
    assert len(seen) > min(size, 60) * 0.7
