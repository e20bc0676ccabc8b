"""Batched answers: the same as one at a time, whatever the padding, the order or an interruption."""

import random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rollouts.dialogue import Dialogue
from rollouts.responses import answer_prompts, generate_responses

# Prompts and answers of very different lengths, so that batches need padding and end at different steps.
PAIRS = {
    "fox": '{"model": "a"}',
    "a red fox, watercolour, masterpiece, 8k, a red fox, watercolour": '{"model": "dreamshaper_8", "width": 512}',
    "cat on a mat": '{"model": "cat"}',
    "watercolour of a house by the sea": '{"width": 768, "cfg scale": 7.5}',
    "8k": "[]",
    "masterpiece, 8k, city": '{"model": "city", "width": 640, "cfg scale": 7}',
    "": "{}",
}
PROMPTS = list(PAIRS)


@pytest.fixture(scope="module")
def dialogue():
    texts = [*PAIRS, *PAIRS.values()] * 2
    return Dialogue(train_bpe_tokenizer(texts, vocab_size=330))


@pytest.fixture(scope="module")
def policy(dialogue):
    """A toy Llama that has learned the pairs by heart: its answers end, and its choices are clear."""
    size = ScratchConfig(vocab_size=340, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = build_from_scratch(size, dialogue.tokenizer).train()
    encoded = [dialogue.encode(prompt, response) for prompt, response in PAIRS.items()]
    width = max(len(e.input_ids) for e in encoded)
    ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for e in encoded])
    labels = torch.tensor([e.labels + [-100] * (width - len(e.labels)) for e in encoded])
    mask = torch.arange(width)[None] < torch.tensor([len(e.input_ids) for e in encoded])[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return model.eval()
    raise AssertionError(f"the toy policy did not learn its seven pairs: loss {loss.item()}")


def answers(policy, dialogue, prompts=PROMPTS, **options):
    """Responses by index, without their times."""
    options = {"max_new_tokens": 60, "progress": False} | options
    found = list(generate_responses(policy, dialogue, prompts, **options))
    by_index = {r.index: (r.text, r.num_tokens, r.finished) for r in found}
    assert len(by_index) == len(found)
    assert all(r.seconds > 0 for r in found)
    return by_index


def test_what_was_learned_comes_back_in_place(policy, dialogue):
    found = answers(policy, dialogue, batch_size=3)
    assert sorted(found) == list(range(len(PROMPTS)))
    for i, (prompt, response) in enumerate(PAIRS.items()):
        tokens = len(dialogue.tokenizer(response).input_ids) + 1  # its end token counts
        assert found[i] == (response, tokens, True), prompt


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_a_batch_answers_like_one_at_a_time(policy, dialogue, batch_size):
    assert answers(policy, dialogue, batch_size=batch_size) == answers(policy, dialogue, batch_size=1)


def test_left_padding_changes_nothing_for_a_model_without_clear_choices(dialogue):
    """Random weights: the tokens are arbitrary, so a wrong position or mask would show at once."""
    size = ScratchConfig(vocab_size=340, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False)
    model = build_from_scratch(size, dialogue.tokenizer)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.parameters():
                weight.mul_(6 if weight.ndim == 2 else 1)  # as drawn, the layers hardly add to the last token
    alone = answers(model, dialogue, batch_size=1, max_new_tokens=12)
    assert answers(model, dialogue, batch_size=7, max_new_tokens=12) == alone
    assert len({text for text, _, _ in alone.values()}) == len(PROMPTS)


def test_the_longest_prompt_comes_first_and_instructions_may_be_objects(policy, dialogue):
    objects = [{"prompt": prompt, "negative prompt": "ugly"} for prompt in PROMPTS]
    order = [
        r.index for r in generate_responses(policy, dialogue, objects, max_new_tokens=3, batch_size=1, progress=False)
    ]
    lengths = [len(dialogue.encode_prompt(PROMPTS[i])) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    assert answers(policy, dialogue, objects) == answers(policy, dialogue)
    assert answers(policy, dialogue, []) == {}


def test_an_answer_at_the_token_limit_is_unfinished(policy, dialogue):
    response = PAIRS["cat on a mat"]
    tokens = dialogue.tokenizer(response).input_ids
    cut = answers(policy, dialogue, max_new_tokens=len(tokens))[2]
    assert cut == (response, len(tokens), False)  # complete by chance, but it did not end by itself
    assert answers(policy, dialogue, max_new_tokens=len(tokens) + 1)[2] == (response, len(tokens) + 1, True)
    text, count, finished = answers(policy, dialogue, max_new_tokens=3)[2]
    assert (text, count, finished) == (dialogue.tokenizer.decode(tokens[:3]).strip(), 3, False)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("skip", [{0}, {1, 2, 3}, {0, 2, 4, 6}, set(range(7))])
def test_a_resumed_run_gives_the_answers_of_an_uninterrupted_one(policy, dialogue, sampling, skip):
    whole = answers(policy, dialogue, batch_size=3, **sampling)
    rest = answers(policy, dialogue, batch_size=3, skip=frozenset(skip), **sampling)
    assert rest == {i: answer for i, answer in whole.items() if i not in skip}


def test_sampling_depends_on_the_seed_only(policy, dialogue):
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 20}
    torch.manual_seed(1)
    first = answers(policy, dialogue, **options)
    torch.manual_seed(2)
    assert answers(policy, dialogue, **options) == first
    assert answers(policy, dialogue, seed=1, **options) != first
    assert answers(policy, dialogue, **options) != answers(policy, dialogue, max_new_tokens=20)
    # Batches do not repeat each other's luck.
    assert len({text for text, _, _ in answers(policy, dialogue, ["fox"] * 4, batch_size=1, **options).values()}) > 1
    # So cold, or so narrow, that only the likeliest token is left
    greedy = answers(policy, dialogue)
    assert answers(policy, dialogue, do_sample=True, temperature=0.01) == greedy
    assert answers(policy, dialogue, do_sample=True, top_p=1e-6) == greedy


def test_the_callers_random_numbers_are_left_alone(policy, dialogue):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for response in generate_responses(policy, dialogue, PROMPTS, max_new_tokens=3, do_sample=True, progress=False):
        assert response.num_tokens <= 3
        assert torch.equal(torch.get_rng_state(), before[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]


def test_settings_that_came_with_a_model_change_neither_greedy_decoding_nor_sampling(policy, dialogue):
    """Qwen 2.5 comes with a repetition penalty, others with beams, top-k, min-p: JSON repeats itself by nature."""
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20}
    plain, sampled = answers(policy, dialogue), answers(policy, dialogue, **options)
    ours = policy.generation_config
    policy.generation_config = GenerationConfig.from_dict(
        ours.to_dict()
        | {"repetition_penalty": 8.0, "num_beams": 3, "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1}
        | {"no_repeat_ngram_size": 1, "min_length": 100, "min_p": 0.9, "typical_p": 0.2, "eos_token_id": 0}
    )
    try:
        assert answers(policy, dialogue) == plain
        assert answers(policy, dialogue, **options) == sampled
    finally:
        policy.generation_config = ours


def test_nothing_is_written_twice_if_so_wanted(dialogue):
    """As a plain loop writes it: the likeliest token that doesn't make three tokens stand there twice."""
    size = ScratchConfig(vocab_size=340, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    policy = build_from_scratch(size, dialogue.tokenizer).eval()  # untrained: it repeats itself for ever
    prompts = [dialogue.encode_prompt(prompt) for prompt in ("a red fox, a red fox", "8k")]

    def written(**options):
        found = answer_prompts(policy, dialogue, prompts, max_new_tokens=24, progress=False, **options)
        return [r.text for r in sorted(found, key=lambda r: r.index)]

    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 24:
            with torch.no_grad():
                order = policy(input_ids=torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
            there = {tuple(ids[i : i + 3]) for i in range(len(ids) - 2)}
            ids.append(next(token for token in order if (*ids[-2:], token) not in there))
            if ids[-1] == dialogue.tokenizer.eos_token_id:
                break
        expected.append(dialogue.decode([i for i in ids[len(prompt) :] if i != dialogue.tokenizer.eos_token_id]))
    assert written(no_repeat_ngram_size=3, batch_size=1) == expected
    assert written(no_repeat_ngram_size=3, batch_size=2) == expected
    assert written() != expected


def test_long_prompts_are_cut(policy, dialogue):
    long = "fox " * 500
    limit = len(dialogue.encode_prompt("fox")) + 8
    assert answers(policy, dialogue, [long, "fox"], max_prompt_tokens=limit)[1][0] == PAIRS["fox"]
    cut = dialogue.encode_prompt(long, limit)
    assert len(cut) <= limit
    text = dialogue.tokenizer.decode(cut).removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
    shorter = answers(policy, dialogue, [text], max_prompt_tokens=limit)[0]
    assert answers(policy, dialogue, [long], max_prompt_tokens=limit)[0] == shorter


def test_a_tokenizer_without_a_pad_token(policy, dialogue):
    expected = answers(policy, dialogue)
    pad = dialogue.tokenizer.pad_token
    dialogue.tokenizer.pad_token = None
    try:
        assert answers(policy, dialogue) == expected
    finally:
        dialogue.tokenizer.pad_token = pad
