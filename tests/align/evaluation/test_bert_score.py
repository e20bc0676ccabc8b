"""BERTScore beside the package `bert-score`, on MiniLM and on toy encoders, and against arithmetic done by hand."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BartConfig, BertConfig, BertModel, BertTokenizer, RobertaConfig, RobertaTokenizer

import align.evaluation.bert_score as module
from align.evaluation.bert_score import Baseline, BertScorer
from rewards.checkpoints import CheckpointError

PROMPTS = [
    "a red fox in the snow, watercolour, soft light",
    "masterpiece, best quality, 1girl, solo, silver hair, night city, neon, rain, (depth of field:1.2)",
    "portrait of an old fisherman, wrinkles, film grain, 35mm",
    "an isometric room with plants, low poly, pastel colours",
]
AWKWARD = {
    "empty candidate": ("", PROMPTS[0]),
    "empty reference": (PROMPTS[0], ""),
    "both empty": ("", "  \n"),
    "one word": ("fox", "foxes"),
    "spaces": ("  a  red\tfox\n", "a red fox"),
    "case": ("A RED FOX", "a red fox"),
    "accents": ("Café Été naïve", "cafe ete naive"),
    "chinese": ("雪中的红狐狸", "a red fox in the snow"),
    "emoji": ("🦊❄️ 👩‍🚀 fox", "🦊 in snow"),
    "combining": ("e\u0301te\u0301", "été"),
    "no token": ("\u200b\u0007", PROMPTS[1]),
    "special tokens in the text": ("a [SEP] red [CLS] fox [PAD]", "a red fox"),
    "longer than the window": ("a red fox and a blue fox, " * 200, PROMPTS[0]),
    "both longer": ("fox, snow, " * 300, "snow, fox " * 400),
    "repeated words": ("fox fox fox fox fox", "fox"),
    "same": (PROMPTS[3], PROMPTS[3]),
    "punctuation": ("(((...)))", "!!!"),
}


@pytest.fixture(scope="module")
def scorer(minilm):
    return BertScorer.from_pretrained(minilm, device="cpu")


def package(folder, layer):
    """The package's scorer. Transformers 5 has dropped the method that it calls for empty texts; it is put back."""
    bert_score = pytest.importorskip("bert_score", reason="needs the peer: pip install bert-score")
    peer = bert_score.BERTScorer(model_type=str(folder), num_layers=layer, device="cpu")
    if not hasattr(peer._tokenizer, "build_inputs_with_special_tokens"):
        peer._tokenizer.build_inputs_with_special_tokens = lambda _: peer._tokenizer.encode("")
    return peer


def one_by_one(peer, pairs):
    """The package's scores of each pair by itself, as precision, recall and F1 of all."""
    scores = [torch.stack(peer.score([candidate], [reference])) for candidate, reference in pairs]
    return torch.cat(scores, dim=1)


def assert_equal(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(torch.stack(list(ours)), theirs, atol=tolerance, rtol=0)


def hand_made(vectors, **options):
    """A scorer whose encoder has one layer, no more than a table of vectors: [CLS], [SEP], then the words a, b, ..."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"[: len(vectors) - 2]]
    config = BertConfig(
        vocab_size=len(words), hidden_size=2, num_hidden_layers=0, num_attention_heads=1, intermediate_size=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    table = torch.zeros(len(words), 2)
    table[[2, 3, *range(5, len(words))]] = torch.tensor(vectors)
    model.embeddings.word_embeddings.weight.data = table
    model.embeddings.position_embeddings.weight.data.zero_()
    model.embeddings.token_type_embeddings.weight.data.zero_()
    model.embeddings.LayerNorm = torch.nn.Identity()
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=16)
    return BertScorer(model, tokenizer, **options)


def test_value_worked_out_by_hand():
    # Unit vectors: [CLS] (-1, 0), [SEP] (0, -1), a (1, 0), b (0, 1), c (0.6, 0.8); lengths do not matter.
    scorer = hand_made([[-2.0, 0.0], [0.0, -3.0], [1.0, 0.0], [0.0, 5.0], [6.0, 8.0]])
    score = scorer(["a b", "a"], ["c", "a b"])
    # "a b" and "c": precision = (0.6 + 0.8) / 2, recall = max(0.6, 0.8); F1 = 2 * 0.7 * 0.8 / 1.5.
    # "a" and "a b": precision = 1; recall: a finds a, b finds a, [CLS] or [SEP] at cosines 0, 0, -1: (1 + 0) / 2.
    torch.testing.assert_close(score.precision, torch.tensor([0.7, 1.0]))
    torch.testing.assert_close(score.recall, torch.tensor([0.8, 0.5]))
    torch.testing.assert_close(score.f1, torch.tensor([2 * 0.7 * 0.8 / 1.5, 2 / 3]))


def test_negative_cosines_stay_negative_whatever_else_is_in_the_batch():
    # All of one text point away from all of the other; the package would give 0 to the shorter of a batch.
    scorer = hand_made([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [1.0, 0.0]])
    alone = scorer(["b"], ["b b"])
    together = scorer(["b", "b"], ["b b", "b b b b b b b a"])
    assert float(alone.f1) == pytest.approx(1.0) == pytest.approx(float(together.f1[0]))
    embedded = scorer.embed(["a", "b"])
    # a finds [CLS], [SEP] and b at cosines -0.995, -0.995 and -1; likewise b finds [CLS] of "a" at 0.995.
    score = embedded.score(torch.tensor([0]), torch.tensor([1]))
    cosine = 1 / 1.01**0.5
    torch.testing.assert_close(torch.cat(list(score)), torch.tensor([-cosine, cosine, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [6, 3])
def test_equals_the_package(minilm, layer):
    """Precision, recall and F1 of awkward pairs and of all pairs of prompts, by both ways of asking."""
    ours = BertScorer.from_pretrained(minilm, layer=layer, device="cpu")
    pairs = [*AWKWARD.values(), *((a, b) for a in PROMPTS for b in PROMPTS)]
    expected = one_by_one(package(minilm, layer), pairs)
    assert_equal(ours(*zip(*pairs, strict=True)), expected)
    texts = list({text for pair in pairs for text in pair})
    numbers = torch.tensor([[texts.index(text) for text in pair] for pair in pairs])
    assert_equal(ours.embed(texts).score(*numbers.T), expected)


def test_empty_texts_score_zero(scorer):
    empty = [scorer([AWKWARD[name][0]], [AWKWARD[name][1]]) for name in ("empty candidate", "both empty", "no token")]
    assert [float(value) for score in empty for value in score] == [0.0] * 9
    # The package has NaN as precision here; a text of special tokens only says nothing either.
    assert torch.stack(list(scorer(["[SEP] [CLS]"], ["fox"]))).flatten().tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=34, pad_token_id=1,
        ),
        BartConfig(
            vocab_size=400, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=34,
        ),
    ],
    ids=["roberta", "bart"],
)  # fmt: skip
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_equals_the_package_with_other_encoders(tmp_path, config, layer):
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    roberta_tokenizer(add_prefix_space=True).save_pretrained(tmp_path)
    pairs = list(zip(PROMPTS, PROMPTS[1:] + PROMPTS[:1], strict=True)) + [("", "fox"), ("fox " * 50, "🦊")]
    ours = BertScorer.from_pretrained(tmp_path, layer=layer, device="cpu")
    assert ours.layer == (3 if layer is None else layer)
    assert_equal(ours(*zip(*pairs, strict=True)), one_by_one(package(tmp_path, ours.layer), pairs))


def roberta_tokenizer(**options):
    """A byte-level BPE tokenizer as RoBERTa's, trained on the prompts."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(PROMPTS * 9, vocab_size=400, special_tokens=special, show_progress=False)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=32, **options)


def test_a_text_begins_as_a_word_does_inside_it():
    config = RobertaConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=34
    )
    tokenizer = roberta_tokenizer()
    scorer = BertScorer(AutoModel.from_config(config), tokenizer)
    first, second = tokenizer(" fox")["input_ids"], tokenizer("fox")["input_ids"]
    assert scorer._tokenize(["fox", " fox "]) == [tuple(first)] * 2 != [tuple(second)] * 2
    assert scorer._tokenize([""]) == [tuple(tokenizer("")["input_ids"])]


def test_sentence_vectors_are_those_of_sentence_transformers(scorer, minilm):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason='needs sentence-transformers: pip install "t2i-align[eval]"'
    )
    encoder = sentence_transformers.SentenceTransformer(minilm, device="cpu")
    embedded = scorer.embed([*PROMPTS, PROMPTS[0]])
    expected = torch.tensor(encoder.encode(PROMPTS, normalize_embeddings=True))
    torch.testing.assert_close(embedded.sentences[embedded.rows][:4], expected, atol=1e-5, rtol=0)
    assert embedded.rows.tolist()[4] == embedded.rows.tolist()[0]


def test_batches_blocks_and_repetition_change_nothing(scorer, minilm, monkeypatch):
    texts = [*PROMPTS, *(text for pair in AWKWARD.values() for text in pair)]
    left, right = torch.cartesian_prod(torch.arange(len(texts)), torch.arange(len(texts))).T
    expected = torch.stack(list(scorer.embed(texts).score(left, right)))
    # F1 is symmetric, and precision one way is recall the other way.
    turned = torch.stack(list(scorer.embed(texts).score(right, left)))
    torch.testing.assert_close(turned[[1, 0, 2]], expected, atol=2e-6, rtol=0)
    monkeypatch.setattr(module, "NUMBERS_PER_BLOCK", 1)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 3)
    small = BertScorer.from_pretrained(minilm, device="cpu", tokens_per_batch=1)
    repeated = small.embed(texts * 2)
    assert len(repeated) == 2 * len(texts) and len(repeated.sentences) <= len(set(texts))
    some = torch.arange(0, len(left), 7)
    assert_equal(repeated.score(left[some] + len(texts), right[some]), expected[:, some], 2e-6)
    pairs = [(texts[i], texts[j]) for i, j in zip(left[some].tolist(), right[some].tolist(), strict=True)]
    assert_equal(small(*zip(*pairs[:20], strict=True)), expected[:, some[:20]], 2e-6)


def test_half_precision_moves_scores_little(scorer, minilm):
    left, right = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    expected = torch.stack(list(scorer.embed(PROMPTS).score(left, right)))
    halved = BertScorer.from_pretrained(minilm, device="cpu", storage="float16").embed(PROMPTS)
    assert halved._tokens.dtype == torch.float16
    assert_equal(halved.score(left, right), expected, 1e-4)
    bfloat16 = BertScorer.from_pretrained(minilm, device="cpu", dtype="bfloat16")
    assert bfloat16.model.dtype == torch.bfloat16
    assert_equal(bfloat16.embed(PROMPTS).score(left, right), expected, 1e-2)


def test_nothing_to_score(scorer):
    assert [tuple(value.shape) for value in scorer([], [])] == [(0,)] * 3
    embedded = scorer.embed([])
    assert len(embedded) == 0 and embedded.score(torch.tensor([]).long(), torch.tensor([]).long()).f1.shape == (0,)


def test_baseline_is_the_mean_of_random_pairs(scorer, minilm, tmp_path):
    texts = [*PROMPTS, *(text for pair in AWKWARD.values() for text in pair if text)]
    baseline = scorer.fit_baseline(texts, seed=3)
    distinct = len(set(texts))
    assert baseline.pairs == distinct // 2 and baseline.layer == 6
    assert baseline == scorer.fit_baseline(texts * 2, seed=3) != scorer.fit_baseline(texts, seed=4)
    baseline.save(tmp_path / "baseline.json")
    assert Baseline.load(tmp_path / "baseline.json") == baseline
    rescaled = BertScorer.from_pretrained(minilm, device="cpu", baseline=tmp_path / "baseline.json")
    raw, score = scorer(PROMPTS, PROMPTS[::-1]), rescaled(PROMPTS, PROMPTS[::-1])
    for name in ("precision", "recall", "f1"):
        mean = getattr(baseline, name)
        torch.testing.assert_close(getattr(score, name), (getattr(raw, name) - mean) / (1 - mean))
    assert_equal(rescaled(PROMPTS, PROMPTS[::-1], rescale=False), torch.stack(list(raw)))
    # A baseline is of raw scores, whoever fits it; over its own pairs, rescaled scores are 0 on average.
    assert rescaled.fit_baseline(texts, seed=3) == baseline
    both = Baseline(0.5, 0.5, 0.5).rescale(raw)
    torch.testing.assert_close(both.f1, 2 * raw.f1 - 1)


def test_two_texts_make_a_baseline(scorer):
    baseline = scorer.fit_baseline(PROMPTS[:2], seed=0)
    one, other = scorer(PROMPTS[:1], PROMPTS[1:2]), scorer(PROMPTS[1:2], PROMPTS[:1])
    assert baseline.f1 == pytest.approx(float(one.f1), abs=1e-6)
    assert {round(baseline.precision, 5)} <= {round(float(one.precision), 5), round(float(other.precision), 5)}
    with pytest.raises(ValueError, match="at least 2 distinct texts"):
        scorer.fit_baseline([PROMPTS[0]] * 5)


def test_a_baseline_of_something_else_is_refused(minilm, tmp_path):
    for changed, message in ({"layer": 3}, "of layer 3"), ({"encoder": "0" * 64}, "another encoder"):
        with pytest.raises(ValueError, match=message):
            BertScorer.from_pretrained(minilm, device="cpu", baseline=Baseline(0.1, 0.1, 0.1, **changed))
    for value in (1.0, -2, float("nan"), "0.3", None):
        with pytest.raises(ValueError, match="`f1` of a baseline must be at least -1 and below 1"):
            Baseline(0.1, 0.1, value)
    for content in ("", "[1]", '{"precision": 1}', '{"precision": 0, "recall": 0, "f1": 0, "x": 0}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is no baseline"):
            Baseline.load(tmp_path / "bad.json")


def test_what_can_not_be_scored_is_named(scorer):
    with pytest.raises(ValueError, match="one reference per candidate, but got 2 and 1"):
        scorer(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="Text 1 must be a string, but is None"):
        scorer.embed(["a", None])
    with pytest.raises(TypeError, match="Texts must be in a list, but got the string 'a red fox'"):
        scorer.embed("a red fox")
    with pytest.raises(TypeError, match="Texts must be in a list, but got the string 'fox'"):
        scorer("fox", "dog")
    with pytest.raises(TypeError, match="Text 1 must be a string, but is 3"):
        scorer(["a", "b"], ["a", 3])
    with pytest.raises(ValueError, match="Text 1 has half a surrogate pair"):
        scorer.embed(["a", "b \ud83d"])
    embedded = scorer.embed(["a", "b"])
    for number in (2, -1):
        with pytest.raises(IndexError, match="from 0 to 1, but got"):
            embedded.score(torch.tensor([0]), torch.tensor([number]))
    with pytest.raises(ValueError, match="same shape"):
        embedded.score(torch.tensor([0, 1]), torch.tensor([0]))


def test_an_encoder_that_makes_nan_is_refused():
    with pytest.raises(ValueError, match=r"NaN or infinite values in torch.float32"):
        hand_made([[1.0, 0.0], [1.0, 0.0], [float("nan"), 0.0]]).embed(["a"])


def test_options_out_of_range(minilm):
    for options, message in (
        ({"layer": 7}, "`layer` must be from 0, the token embeddings, to 6, the last one, but got 7"),
        ({"layer": -1}, "but got -1"),
        ({"max_tokens": 2}, "`max_tokens` must be from 3, two of them special, to 512, but is 2"),
        ({"max_tokens": 513}, "to 512, but is 513"),
        ({"tokens_per_batch": 0}, "`tokens_per_batch` must be at least 1, but got 0"),
        ({"dtype": "int8"}, "`dtype` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            BertScorer.from_pretrained(minilm, device="cpu", **options)
    with pytest.raises(CheckpointError, match="no checkpoint at /nowhere"):
        BertScorer.from_pretrained("/nowhere")


def test_encoders_that_do_not_fit(tokenizer, tmp_path):
    scorer = hand_made([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    scorer.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="to 16, but the tokenizer allows any; give it"):
        BertScorer(scorer.model, scorer.tokenizer)
    with pytest.raises(ValueError, match="adds no special tokens"):
        BertScorer(scorer.model, tokenizer)  # byte-level BPE as GPT-2's
    with pytest.raises(CheckpointError, match="is no encoder"):
        BertScorer.from_pretrained(tmp_path)


def test_missing_weights_are_never_random(minilm, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in Path(minilm).glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(Path(minilm) / "model.safetensors")
    kept = {key: value for key, value in state.items() if "layer.2.output" not in key and "pooler" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights of its encoder") as error:
        BertScorer.from_pretrained(tmp_path, device="cpu")
    assert all("layer.2.output" in key for key in error.value.missing)
