"""Constrained tokens beside trying every token of the vocabulary, and decoding of every kind with a random policy."""

import random

import pytest
import torch

from align.scratch import ScratchConfig, build_from_scratch
from rollouts.call_constraint import CallConstraint, CallProcessor, TokenizerError
from rollouts.call_grammar import CallGrammar
from rollouts.decoding import diverse_beam_search
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.responses import left_padded
from rollouts.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def dialogue(awkward_dialogue):
    return awkward_dialogue


@pytest.fixture(scope="module")
def policy(dialogue):
    size = ScratchConfig(
        vocab_size=len(dialogue.tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=2048,
    )  # fmt: skip
    return build_from_scratch(size, dialogue.tokenizer).eval()


def walk(constraint, generator):
    """A random call, token by token: the state and what is written, from the start to the end."""
    state, ids = constraint.grammar.start, []
    yield state, ids
    while not constraint.grammar.is_finished(state):
        ids = [*ids, int(generator.choice(constraint.allowed(state)))]
        state = constraint.advance(state, ids[-1])
        yield state, ids


def test_allowed_are_the_tokens_with_which_the_text_goes_on(constraint):
    generator = random.Random(0)
    for _ in range(6):
        for state, _ids in walk(constraint, generator):
            expected = [
                id
                for id, data in enumerate(constraint.tokens.of_id)
                if data and constraint.grammar.advance(state, data) is not None
            ]
            assert constraint.allowed(state).tolist() == expected


def test_a_call_can_be_written_in_the_tokenizers_own_tokens(constraint, dialogue, awkward_catalog):
    for entry in awkward_catalog.values():
        ids = dialogue.response_ids([entry.default_call().to_json()])[0]
        state = constraint.grammar.start
        for id in ids:
            assert id in constraint.allowed(state)
            state = constraint.advance(state, id)
        assert constraint.grammar.call(state) == entry.default_call()
        assert not len(constraint.allowed(state))


def test_forced_tokens_are_those_of_every_call_that_can_follow(constraint, dialogue):
    """Beside the tokenizer's own tokens of whole calls: what is forced at a prefix, all of them have."""
    generator = random.Random(1)
    for _ in range(12):
        *_, (_, last) = walk(constraint, generator)
        canonical = dialogue.response_ids([constraint.tokens.join(last).decode()])[0]
        state, written, asked = constraint.grammar.start, [], 0
        while True:
            forced, after = constraint.forced(state, constraint.tokens.join(written))
            assert forced == canonical[len(written) : len(written) + len(forced)]
            written, state = written + forced, after
            if constraint.grammar.is_finished(state):
                break
            written.append(canonical[len(written)])
            state = constraint.advance(state, written[-1])
            asked += 1
        assert written == canonical
        assert asked < len(canonical) / 2


def test_nothing_is_forced_within_a_token_of_the_tokenizers_own(constraint):
    own = constraint.tokens.encode('{"model": "Quote')
    written = constraint.tokens.join(own)
    inside = written[:-2]  # "Quo" and no token border there
    state = constraint.grammar.advance(constraint.grammar.start, inside)
    borders, length = set(), 0
    whole = inside + constraint.grammar.forced(state)[0]
    for id in constraint.tokens.encode(whole.decode()):
        length += len(constraint.tokens.of_id[id])
        borders.add(length)
    forced, _ = constraint.forced(state, inside)
    assert bool(forced) == (len(inside) in borders)


def test_unfinished_characters_are_gone_on_with(awkward_catalog, dialogue):
    names = ["水 - v1", "水彩 - v1", "Süßes 水彩 ✨ - v3"]
    bytewise = CallConstraint.of_models(dialogue, [awkward_catalog[name] for name in names])
    state = bytewise.grammar.advance(bytewise.grammar.start, b'{"model": "' + "水".encode()[:2])
    written = b'{"model": "' + "水".encode()[:2]
    ids, after = bytewise.forced(state, written)
    assert bytewise.grammar.advance(state, bytewise.tokens.join(ids)) == after
    for token in bytewise.allowed(state):
        assert bytewise.advance(state, int(token)) is not None


@pytest.mark.parametrize("name", ["plain", "template"])
def test_the_lead_of_a_dialogue_belongs_to_the_answer(dialogue, awkward_catalog, name):
    form = Dialogue(dialogue.tokenizer, DialogueFormat(plain=name == "plain"))
    constraint = CallConstraint.of_models(form, awkward_catalog.values())
    assert constraint.grammar.lead == (" " if name == "plain" else "")
    entry = next(iter(awkward_catalog.values()))
    labels = [id for id in form.encode("a fox", entry.default_call().to_json()).labels if id != -100]
    state = constraint.grammar.start
    for id in labels[:-1]:
        state = constraint.advance(state, id)
    assert constraint.grammar.is_finished(state)


def batch_of(dialogue, texts=("a fox", "a very long road to nowhere, ink", "水")):
    prompts = [dialogue.encode_prompt(text) for text in texts]
    return left_padded(prompts, dialogue.tokenizer.pad_token_id, "cpu")


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0, "temperature": 3.0}, {"num_beams": 4, "num_return_sequences": 4}]
)
def test_generate_gives_calls_only(policy, dialogue, constraint, awkward_catalog, options):
    input_ids, mask = batch_of(dialogue)
    end = dialogue.tokenizer.eos_token_id
    processor = CallProcessor(constraint, input_ids.shape[1], end)
    torch.manual_seed(0)
    output = policy.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=1500, eos_token_id=end,
        pad_token_id=dialogue.tokenizer.pad_token_id, logits_processor=[processor],
        **({"do_sample": False} | options),
    )  # fmt: skip
    assert len(output) == 3 * options.get("num_return_sequences", 1)
    for row in output[:, input_ids.shape[1] :].tolist():
        assert end in row
        assert awkward_catalog.judge(dialogue.decode(row[: row.index(end)])).reason is None


@pytest.mark.parametrize("groups", [1, 4])
def test_diverse_beams_are_calls_only(policy, dialogue, constraint, awkward_catalog, groups):
    input_ids, mask = batch_of(dialogue)
    end = dialogue.tokenizer.eos_token_id
    found = diverse_beam_search(
        policy, input_ids, mask, num_beams=4, num_beam_groups=groups, diversity_penalty=1.0 if groups > 1 else 0.0,
        max_new_tokens=1500, eos_token_id=end, pad_token_id=dialogue.tokenizer.pad_token_id, num_return_sequences=4,
        logits_processor=CallProcessor(constraint, input_ids.shape[1], end),
    )  # fmt: skip
    for row in found.sequences.tolist():
        assert end in row
        assert awkward_catalog.judge(dialogue.decode(row[: row.index(end)])).reason is None


def test_rows_that_do_not_continue_the_last_ones_are_read_from_their_beginning(dialogue, constraint):
    processor = CallProcessor(constraint, 0, dialogue.tokenizer.eos_token_id)
    generator = random.Random(5)
    steps = [ids for _, ids in walk(constraint, generator) if ids]
    scores = torch.zeros(1, len(constraint.tokens.of_id))
    fresh = [
        CallProcessor(constraint, 0, dialogue.tokenizer.eos_token_id)(torch.tensor([ids]), scores) for ids in steps
    ]
    for index in (3, 4, 1, 9, 2):
        assert torch.equal(processor(torch.tensor([steps[index]]), scores), fresh[index])


def test_a_vocabulary_that_lacks_a_byte_is_named(awkward_catalog, dialogue):
    tokens = TokenBytes(dialogue.tokenizer)
    kept = [(text, id) for text, id in zip(tokens.texts, tokens.ids, strict=True) if b"q" not in text]
    tokens.texts, tokens.ids = [text for text, _ in kept], [id for _, id in kept]
    entry = awkward_catalog["Pixel"].model_copy(update={"name": "q"})
    with pytest.raises(TokenizerError, match="No token of the vocabulary goes on with"):
        stuck = CallConstraint(CallGrammar([entry]), tokens)
        stuck.allowed(stuck.grammar.advance(stuck.grammar.start, b'{"model": "'))
