"""What is done with fitted rows: Eq. 4, choices, models that come and go, files, export to an ordinary model folder."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.scratch import train_bpe_tokenizer
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_export import token_names
from align.trainers.model_token_loss import LogitTransform
from align.trainers.model_token_rows import ModelTokens, exported_models

NAMES = ("Dream Shaper - v8", "Realistic <Vision>", "中世古香織 / Été|1", "Dream Shaper - v8!")
TEXTS = ["a red fox in the snow", "Dream Shaper - v8 draws a lighthouse at dusk", "portrait, 8k"]


@pytest.fixture
def tokens():
    return ModelTokens(NAMES, torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) / 4)


@pytest.fixture
def hidden():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def test_equation_4_by_hand():
    # Words have logits 0 and log 3, models log 4 and 0 for the first prefix: 1, 3, 4 and 1 out of 9.
    tokens = ModelTokens(("a", "b"), torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log())
    words = torch.tensor([[0.0, torch.tensor(3.0).log()]])
    found = tokens.probabilities(torch.tensor([[1.0, 5.0]]), words)
    torch.testing.assert_close(found, torch.tensor([[1 / 9, 3 / 9, 4 / 9, 1 / 9]]))
    ((first, second),) = tokens.choose(torch.tensor([[1.0, 5.0]]), k=2, word_lse=words.logsumexp(1))
    assert (first.name, second.name) == ("a", "b")
    assert (first.probability, second.probability) == pytest.approx((4 / 9, 1 / 9))
    ((alone,),) = tokens.choose(torch.tensor([[1.0, 5.0]]))
    assert alone.probability == pytest.approx(4 / 5), "given that a model comes next"


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(1.0, 2.0)])
def test_choose_agrees_with_equation_4(tokens, hidden, transform):
    tokens = ModelTokens(tokens.names, tokens.rows, transform)
    words = torch.randn(6, 11)
    probabilities = tokens.probabilities(hidden, words)
    assert probabilities.sum(1).tolist() == pytest.approx([1] * 6)
    for row, choices in zip(probabilities[:, 11:], tokens.choose(hidden, 4, word_lse=words.logsumexp(1)), strict=True):
        assert {choice.name: choice.probability for choice in choices} == pytest.approx(
            dict(zip(NAMES, row.tolist(), strict=True)), rel=1e-4
        )
        ordered = [choice.probability for choice in choices]
        assert ordered == sorted(ordered, reverse=True)


def test_equal_models_come_in_order(hidden):
    tokens = ModelTokens(("a", "b", "c"), torch.zeros(3, 32))
    assert [choice.name for choice in tokens.choose(hidden, 3)[0]] == ["a", "b", "c"]


@pytest.mark.parametrize("k", [0, 5])
def test_more_choices_than_models(tokens, hidden, k):
    with pytest.raises(ModelTokenError, match=f"`k` must be from 1 .*4, but is {k}"):
        tokens.choose(hidden, k)


def test_hidden_states_of_another_backbone(tokens):
    with pytest.raises(ModelTokenError, match=r"\(examples, 32\), but is \(1, 16\)"):
        tokens.logits(torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (("a", "a"), torch.zeros(2, 3), "same name, 'a'"),
        (("a",), torch.zeros(2, 3), "a row for each of 1 names"),
        ((), torch.zeros(0, 3), "at least one model"),
        (("a", "b"), torch.tensor([[0.0], [torch.nan]]), "row of model 'b' is not finite"),
    ],
)
def test_rows_that_cannot_be(names, rows, message):
    with pytest.raises(ModelTokenError, match=message):
        ModelTokens(names, rows)


# Models come and go


@pytest.fixture
def shots():
    """Three examples of each of two new models, six of others; 8 words."""
    generator = torch.Generator().manual_seed(2)
    centres = 3 * torch.randn(3, 32, generator=generator)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1, -1])
    hidden = centres[labels] + torch.randn(12, 32, generator=generator)
    return hidden, labels, (hidden @ torch.randn(32, 8, generator=generator) / 4).logsumexp(1)


def test_added_models_are_found_and_old_rows_stay(tokens, shots):
    hidden, labels, lse = shots
    more = tokens.add_models(["new", "newer"], hidden, labels, lse)
    assert more.names == (*NAMES, "new", "newer") and torch.equal(more.rows[:4], tokens.rows)
    assert tokens.names == NAMES, "the old object is as it was"
    chosen = [choices[0] for choices in more.choose(hidden, word_lse=lse)]
    assert [choice.name for choice in chosen[:6]] == ["new"] * 3 + ["newer"] * 3
    assert all(choice.probability > 0.7 for choice in chosen[:6])
    assert not {choice.name for choice in chosen[6:]} & {"new", "newer"}


def test_adding_without_others_is_warned_of(tokens, shots, caplog):
    hidden, labels, lse = (tensor[:6] for tensor in shots)
    more = tokens.add_models(["new", "newer"], hidden, labels, lse)
    assert torch.equal(more.rows[:4], tokens.rows) and "at least one of each old model" in caplog.text


def test_added_rows_are_at_the_minimum(tokens, shots):
    """Of cross-entropy over words, old and new models plus the penalty, by autograd."""
    hidden, labels, lse = (tensor.double() if tensor.is_floating_point() else tensor for tensor in shots)
    tokens = ModelTokens(NAMES, tokens.rows.double())
    initial = torch.full((2, 32), 0.1, dtype=torch.float64)
    found = tokens.add_models(["new", "newer"], hidden, labels, lse, initial=initial, l2=0.01, iterations=200)
    rows = found.rows[4:].clone().requires_grad_()
    old = torch.logaddexp(lse, (hidden @ tokens.rows.T).logsumexp(1))
    logits = torch.cat([old[:, None], hidden @ rows.T], 1)
    (F.cross_entropy(logits, labels + 1) + 0.005 * ((rows - initial) ** 2).sum()).backward()
    assert float(rows.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["new", NAMES[0]]}, "same name"),
        ({"names": []}, "`names` is empty"),
        ({"names": ["new", "newer", "newest"]}, "Model 'newest' has no example"),
        ({"names": ["new"]}, "`labels` must be from -1 to 0, but are from -1 to 1"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "as many examples"),
        ({"hidden": torch.full((12, 32), torch.nan)}, "must be finite"),
        ({"initial": torch.zeros(1, 32)}, r"`initial` must be finite and \(2, 32\)"),
    ],
)
def test_models_that_cannot_be_added(tokens, shots, change, message):
    given = dict(zip(("hidden", "labels", "word_lse"), shots, strict=True)) | {"names": ["new", "newer"]} | change
    with pytest.raises(ModelTokenError, match=message):
        tokens.add_models(**given)


def test_remove_models(tokens):
    fewer = tokens.remove_models([NAMES[1], NAMES[3]])
    assert fewer.names == (NAMES[0], NAMES[2]) and torch.equal(fewer.rows, tokens.rows[[0, 2]])
    with pytest.raises(ModelTokenError, match="no model 'Dream Shaper'. Did you mean 'Dream Shaper - v8'"):
        tokens.remove_models(["Dream Shaper"])
    with pytest.raises(ModelTokenError, match="At least one model must be left"):
        tokens.remove_models(NAMES)


# Files


def test_save_and_load(tokens, tmp_path):
    tokens = ModelTokens(NAMES, tokens.rows, LogitTransform(0.5, 30.0), "abc")
    tokens.save(tmp_path)
    loaded = ModelTokens.load(tmp_path)
    assert (loaded.names, loaded.transform, loaded.backbone) == (NAMES, LogitTransform(0.5, 30.0), "abc")
    assert torch.equal(loaded.rows, tokens.rows) and loaded.rows.dtype == torch.float32


def test_files_of_different_runs(tokens, tmp_path):
    """What a kill between the two files would leave."""
    tokens.save(tmp_path)
    names = (tmp_path / "model_tokens.json").read_bytes()
    ModelTokens(NAMES[::-1], tokens.rows).save(tmp_path)
    (tmp_path / "model_tokens.json").write_bytes(names)
    with pytest.raises(ModelTokenError, match="not of the same run"):
        ModelTokens.load(tmp_path)


@pytest.mark.parametrize("file", ["model_tokens.json", "model_tokens.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_damaged_files(tokens, tmp_path, file, damage):
    tokens.save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ModelTokenError, match=f"{file} can't be used"):
        ModelTokens.load(tmp_path)


# Export


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(TEXTS, vocab_size=290)


def model_of(build, tokenizer, kind, tied, bias=False, padding=0, dtype=torch.float64):
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = build(kind, attention, dtype, tie_word_embeddings=tied, vocab_size=len(tokenizer) + padding)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(len(tokenizer) + padding).to(dtype))
    return model


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("tied", "untie"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "cohere"])
def test_exported_model_predicts_equation_4(build, tokenizer, tokens, tmp_path, kind, tied, untie, padding):
    model = model_of(build, tokenizer, kind, tied, padding=padding)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    backbone = Backbone(model)
    tokens = ModelTokens(NAMES, tokens.rows.double(), backbone.transform)
    written = tokens.export(model, tokenizer, tmp_path, untie=untie)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert len(model.get_output_embeddings().weight) == len(tokenizer) + padding, "the caller's model is as it was"

    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    size = len(tokenizer) + padding
    assert loaded.convert_tokens_to_ids(list(written.values())) == list(range(size, size + 4))
    assert exported.config.get_text_config().vocab_size == len(loaded) == size + 4
    assert_old_rows(exported, before, size)
    head, table = exported.get_output_embeddings().weight, exported.get_input_embeddings().weight
    assert torch.equal(head[size:], tokens.rows)
    assert (head is table) == (tied and not untie)
    if head is not table:
        ids = tokenizer(NAMES[0], add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(table[size], table[ids].mean(0))

    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        found = exported(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0).detach()
        words = model(input_ids=torch.tensor([ids])).logits[:, -1].detach()
        expected = tokens.probabilities(backbone([ids]).hidden, words)[0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert len(expected) == size + 4


def test_tokenizer_class_of_its_own(build, tokenizer, tokens, tmp_path):
    """Qwen's adds tokens to any vocabulary that lacks them, so it must be loaded before rows are counted."""
    model_of(build, tokenizer, "qwen2", True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    qwen = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert type(qwen).__name__.startswith("Qwen2") and len(qwen) == len(tokenizer) + 1
    written = tokens.export(model_of(build, qwen, "qwen2", True), qwen, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(loaded) == len(qwen) + 4
    assert loaded.convert_tokens_to_ids(list(written.values())) == list(range(len(qwen), len(qwen) + 4))


def assert_old_rows(exported, before, size):
    """Everything that was there, bit by bit."""
    after = exported.state_dict()
    for name, weight in before.items():
        found = after[name][:size] if after[name].shape != weight.shape else after[name]
        assert torch.equal(found, weight), name


def test_bias_of_new_rows_is_0(build, tokenizer, tokens, tmp_path):
    model = model_of(build, tokenizer, "gpt2", tied=False, bias=True)
    ModelTokens(NAMES, tokens.rows.double()).export(model, tokenizer, tmp_path / "model")
    # GPT-2 has no bias of its own that could be loaded: what was written counts.
    found = load_file(tmp_path / "model" / "model.safetensors")["lm_head.bias"]
    assert torch.equal(found[: len(tokenizer)], model.lm_head.bias) and found[len(tokenizer) :].tolist() == [0] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_half_precision(build, tokenizer, tokens, tmp_path, tied):
    model = model_of(build, tokenizer, "llama", tied, dtype=torch.bfloat16)
    tokens.export(model, tokenizer, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.dtype == torch.bfloat16
    assert_old_rows(exported, model.state_dict(), len(tokenizer))
    assert torch.equal(exported.lm_head.weight[-4:], tokens.rows.bfloat16())
    assert torch.equal(ModelTokens.load(tmp_path).rows, tokens.rows), "unrounded ones are beside it"


def test_written_tokens_are_read_back(build, tokenizer, tokens, tmp_path):
    """A generated model token leads to its model, and users' text can't contain one."""
    written = tokens.export(model_of(build, tokenizer, "llama", True), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    content = json.loads((tmp_path / "model_tokens.json").read_text())
    assert content["tokens"] == list(written.values())
    assert exported_models(tmp_path) == {len(tokenizer) + number: name for number, name in enumerate(NAMES)}
    for number, token in enumerate(written.values()):
        assert loaded.decode([len(tokenizer) + number]) == token
        assert loaded(f"a fox{token}")["input_ids"][-1] == len(tokenizer) + number
        assert max(loaded(f"a fox{token}", split_special_tokens=True)["input_ids"]) < len(tokenizer)


def test_generation_stops_at_nothing_but_picks_a_model(build, tokenizer, tokens, tmp_path):
    model = model_of(build, tokenizer, "llama", True, dtype=torch.float32)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    backbone = Backbone(model)
    output = backbone(ids.tolist())
    rows = tokens.rows.clone()
    rows[2] = output.hidden[0] / output.hidden[0].norm() ** 2 * (output.word_max[0] + 5)
    tokens = ModelTokens(NAMES, rows)
    written = tokens.export(model, tokenizer, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = exported.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert AutoTokenizer.from_pretrained(tmp_path).decode([found]) == written[NAMES[2]]


def test_token_names():
    names = ["Dream Shaper - v8", "Dream Shaper\u3000-\nv8", "Été|1>", "香織", "香", "a~2", "a"]
    assert token_names(names, {"<|model:a|>"}) == [
        "<|model:Dream_Shaper_-_v8|>",
        "<|model:Dream_Shaper_-_v8~2|>",
        "<|model:Ete_1|>",
        "<|model:_|>",
        "<|model:_~2|>",
        "<|model:a~2|>",
        "<|model:a~3|>",
    ]


@pytest.mark.parametrize(
    ("rows", "transform", "message"),
    [
        (torch.zeros(4, 16), LogitTransform(), "hidden states of 16 .*model has 32"),
        (torch.zeros(4, 32), LogitTransform(2.0), r"scale=2.0.*export with the backbone"),
    ],
)
def test_export_to_another_backbone(build, tokenizer, tmp_path, rows, transform, message):
    with pytest.raises(ModelTokenError, match=message):
        ModelTokens(NAMES, rows, transform).export(model_of(build, tokenizer, "llama", True), tokenizer, tmp_path)


def test_tokenizer_with_more_tokens_than_rows(build, tokenizer, tokens, tmp_path):
    model = model_of(build, tokenizer, "llama", True, padding=-1)
    with pytest.raises(ModelTokenError, match="resize_token_embeddings"):
        tokens.export(model, tokenizer, tmp_path)
    assert not (tmp_path / "model_tokens.json").exists()


def test_export_with_other_weights_is_warned_of(build, tokenizer, tokens, tmp_path, caplog):
    model = model_of(build, tokenizer, "llama", True)
    for digest, warned in ((Backbone(model).digest(), False), ("", False), ("abc", True)):
        caplog.clear()
        ModelTokens(NAMES, tokens.rows, backbone=digest).export(model, tokenizer, tmp_path)
        assert ("digest abc" in caplog.text) == warned


def test_folder_that_is_not_exported(tokens, tmp_path):
    tokens.save(tmp_path)
    with pytest.raises(ModelTokenError, match="model_tokens.json is of no exported model.*first_id"):
        exported_models(tmp_path)


def test_export_of_something_wrapped(build, tokenizer, tokens, tmp_path):
    model = model_of(build, tokenizer, "llama", True)
    with pytest.raises(ModelTokenError, match="must be a model of transformers, but is a DataParallel"):
        tokens.export(nn.DataParallel(model), tokenizer, tmp_path)
