"""Slot diversity: where the penalty counts, and that it finds more models than the usual kind."""

import pytest
import torch

from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rollouts.api import APICall
from rollouts.beam_responses import beam_responses
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.model_information import judge_model, tokens_of_model_information
from rollouts.slot_diversity import SlotDiversity

NAMES = ["Pixel Wave - v1", "Pixel Wave - v10", 'Quote "Q" {x} - v2', "Süßes 水彩 ✨ - v3", "Dream - v1", "Ink - v1"]
INF = float("inf")


def entry(number, name):
    parameters = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}
    return CatalogEntry(
        name=name, version_id=number, model_id=number, type="Checkpoint", base_model="SD 1.5",
        default_parameters=parameters,
    )  # fmt: skip


@pytest.fixture(scope="module")
def catalog():
    return Catalog(entry(i, name) for i, name in enumerate(NAMES))


@pytest.fixture(scope="module")
def dialogue(catalog):
    texts = [model.default_call().to_json() for model in catalog.values()] * 3
    return Dialogue(train_bpe_tokenizer(texts, vocab_size=400))


def test_penalty_counts_where_names_part_and_nowhere_else():
    #   1 - 2 - 5
    #    \\- 3 - 4 - 6, and 3 - 4 - 7
    slot = SlotDiversity([[1, 2, 5], [1, 3, 4, 6], [1, 3, 4, 7]])
    rows = {(): False, (1,): True, (1, 2): False, (1, 3): False, (1, 3, 4): True, (1, 3, 4, 6): False, (9,): False,
            (1, 3, 4, 6, 1): False, (1, 9, 4): False}  # fmt: skip
    for tokens, counts in rows.items():
        place = slot.places(torch.tensor([tokens], dtype=torch.long)).item()
        assert (place >= 0) == counts, tokens
    same = slot.places(torch.tensor([[1, 3, 4], [1, 3, 4], [1, 2, 5]])).tolist()
    assert same[0] == same[1] != same[2] == -1
    assert slot.places(torch.tensor([[1], [1]])).tolist() != slot.places(torch.tensor([[1, 3, 4]] * 2)).tolist()


def test_constraint_allows_the_tokens_of_the_trie_inside_the_slot_only():
    slot = SlotDiversity([[1, 2], [1, 3]], constrain=True)
    logps = torch.tensor([[-4.0, -3.0, -2.0, -1.0]])
    before = logps.clone()
    assert slot.constrain(torch.zeros(1, 0, dtype=torch.long), logps).tolist() == [[-INF, -3.0, -INF, -INF]]
    assert slot.constrain(torch.tensor([[1]]), logps).tolist() == [[-INF, -INF, -2.0, -1.0]]
    assert slot.constrain(torch.tensor([[1, 3]]), logps).tolist() == logps.tolist()
    assert torch.equal(logps, before)
    free = SlotDiversity([[1, 2], [1, 3]])
    assert free.constrain(torch.tensor([[1]]), logps) is logps


@pytest.mark.parametrize(("beginnings", "message"), [([], "holds none"), ([[1], []], "one is empty")])
def test_bad_beginnings_are_named(beginnings, message):
    with pytest.raises(ValueError, match=message):
        SlotDiversity(beginnings)


@pytest.mark.parametrize("plain", [False, True])
def test_every_call_that_a_policy_learns_to_write_runs_through_the_trie(catalog, dialogue, plain):
    dialogue = Dialogue(dialogue.tokenizer, DialogueFormat(plain=plain))
    slot = SlotDiversity.of_models(dialogue, catalog.values(), constrain=True)
    vocabulary = len(dialogue.tokenizer)
    choices = {}
    for model in catalog.values():
        encoded = dialogue.encode("a fox", model.default_call().to_json())
        response = [label for label in encoded.labels if label != -100]
        for i, token in enumerate(response):
            beginning = torch.tensor([response[:i]], dtype=torch.long)
            assert slot.constrain(beginning, torch.zeros(1, vocabulary))[0, token] == 0, (model.name, i)
            if slot.places(beginning).item() >= 0:
                choices.setdefault(model.name, []).append(token)
    # Names are told apart by the choices alone, and they part inside the name: `{"model": "` is no choice.
    assert len({tuple(tokens) for tokens in choices.values()}) == len(NAMES)
    assert max(map(len, choices.values())) <= 4


@pytest.fixture(scope="module")
def policy(catalog, dialogue):
    """A toy Llama that answers "a" with any of the models, and is sure of all but the name."""
    torch.manual_seed(0)
    encoded = [dialogue.encode("a", model.default_call().to_json()) for model in catalog.values()]
    width = max(len(e.input_ids) for e in encoded)
    ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for e in encoded])
    labels = torch.tensor([e.labels + [-100] * (width - len(e.labels)) for e in encoded])
    size = ScratchConfig(vocab_size=400, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = build_from_scratch(size, dialogue.tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=(ids != 0).long() | (labels != -100), labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, "the toy policy did not learn its calls"
    return model.eval()


def found_names(policy, dialogue, catalog, diversity, penalty, beams=6):
    tokens = tokens_of_model_information(dialogue, catalog, "SD 1.5")
    options = {"num_beams": beams, "diversity_penalty": penalty, "max_new_tokens": tokens, "diversity": diversity}
    (texts,) = beam_responses(policy, dialogue, ["a"], **options)
    assert len(texts) == beams
    return [judge_model(text, catalog, "SD 1.5").name for text in texts]


def test_slot_diversity_names_more_models_than_hamming_diversity(policy, dialogue, catalog):
    slot = SlotDiversity.of_models(dialogue, catalog.values())
    of_slot = found_names(policy, dialogue, catalog, slot, 2.0)
    assert None not in of_slot and len(set(of_slot)) == 5  # one for each first token of a name
    # The same penalty everywhere drives beams away from the JSON itself.
    of_hamming = found_names(policy, dialogue, catalog, None, 2.0)
    assert of_hamming.count(None) >= 2 and len(set(of_hamming) - {None}) <= 4
    # When all first tokens are taken, a beam with a penalty as large as this would rather invent a name.
    assert None in found_names(policy, dialogue, catalog, slot, 9.0)
    constrained = SlotDiversity.of_models(dialogue, catalog.values(), constrain=True)
    of_constrained = found_names(policy, dialogue, catalog, constrained, 9.0)
    assert None not in of_constrained and len(set(of_constrained)) == 5


def test_constrained_beams_of_an_untrained_policy_name_real_models(dialogue, catalog):
    size = ScratchConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    untrained = build_from_scratch(size, dialogue.tokenizer).eval()
    slot = SlotDiversity.of_models(dialogue, catalog.values(), constrain=True)
    options = {"num_beams": 4, "diversity_penalty": 5.0, "max_new_tokens": 60, "diversity": slot, "batch_size": 2}
    for texts in beam_responses(untrained, dialogue, ["a", "a longer prompt", "b"], **options):
        named = {text.split('", "type')[0].removeprefix('{"model": "').replace('\\"', '"') for text in texts}
        assert named <= set(NAMES) and len(named) >= 3
    free = beam_responses(untrained, dialogue, ["a"], **options | {"diversity": None})
    assert not any(text.startswith('{"model": "') for text in free[0])


def test_enough_tokens_for_every_name(catalog, dialogue):
    limit = tokens_of_model_information(dialogue, catalog, "SD 1.5")
    for model in catalog.values():
        (whole,) = dialogue.response_ids([model.default_call().to_json()])
        text = dialogue.decode(whole[:limit])
        assert judge_model(text, catalog, "SD 1.5").name == model.name
        with pytest.raises(ValueError, match="not_json"):
            APICall.from_json(text)
        assert limit < len(whole)
