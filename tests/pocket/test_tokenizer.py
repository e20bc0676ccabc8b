"""The pocket tokenizers beside open_clip's and transformers' own."""

import gzip
import random

import pytest
from open_clip.tokenizer import SimpleTokenizer, basic_clean
from transformers import BertTokenizer

from pocket.drawing import GOOD_QUALITY, all_scenes, caption, vary_caption
from pocket.tokenizer import (
    BAD_QUALITY,
    CONTEXT_LENGTH,
    bert_vocabulary,
    byte_pair_merges,
    clip_tokenizer,
    save_merges,
    words,
)
from pocket.train.clip import CONFIG

ODD_TEXTS = [
    "",
    "  two   spaces\t and\n lines ",
    "Naïve RED Cat",
    "cafe\u0301 ÀÉ straße İ",
    "日本の猫",
    "a cat 🐱🏽 of 2024, 3D!",
    "don't we'll it's",
    "cat.dog,car word-word a_b",
    "½² Ω≈ç√ …",
    "zero\u200bwidth\u00a0space",
]


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def open_clips(tmp_path_factory):
    """open_clip's tokenizer with our merges."""
    path = tmp_path_factory.mktemp("merges") / "merges.txt.gz"
    save_merges(path)
    return SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)


def padded(tokenizer, text):
    """As open_clip does it: zeros behind the end."""
    ids = tokenizer(text, truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]
    return ids + [0] * (CONTEXT_LENGTH - len(ids))


def test_captions_have_the_ids_of_open_clip(tokenizer, open_clips):
    rng = random.Random(0)
    scenes = rng.sample(list(all_scenes()), 300)
    texts = [vary_caption(scene, rng, rng.choice(["", *GOOD_QUALITY, *BAD_QUALITY])) for scene in scenes]
    assert [padded(tokenizer, text) for text in texts] == open_clips(texts).tolist()


@pytest.mark.parametrize("text", [*ODD_TEXTS, "many words " * 40, "x" * 100])
def test_odd_texts_have_the_ids_of_open_clip(tokenizer, open_clips, text):
    assert padded(tokenizer, text) == open_clips(text)[0].tolist()


@pytest.mark.parametrize("text", ["“curly” quotes", "salt &amp; pepper", "ﬁne"])
def test_open_clip_mends_text_first(tokenizer, open_clips, text):
    """The one difference: quotes, ligatures and HTML are mended by open_clip and spelt here."""
    assert padded(tokenizer, text) != open_clips(text)[0].tolist()
    assert padded(tokenizer, basic_clean(text)) == open_clips(text)[0].tolist()


def test_every_word_is_one_token(tokenizer):
    assert len(words()) == len(set(words()))
    for word in words():
        ids = tokenizer(word)["input_ids"]
        assert len(ids) == 3, word  # start, word, end
        assert tokenizer.decode(ids[1:2]).strip() == word


def test_other_words_are_spelt(tokenizer):
    ids = tokenizer("zxq", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["z", "x", "q</w>"]


def test_every_caption_fits(tokenizer):
    longest = max((caption(scene) for scene in all_scenes()), key=lambda text: len(text.split()))
    assert len(tokenizer(f"masterpiece, best quality, {longest}")["input_ids"]) <= CONTEXT_LENGTH


def test_merges_are_distinct_and_build_on_each_other():
    merges = byte_pair_merges()
    assert len(merges) == len(set(merges))
    known = {letter + end for letter in map(chr, range(33, 127)) for end in ("", "</w>")}
    for first, second in merges:
        assert first in known and second in known
        known.add(first + second)
    assert all(word + "</w>" in known for word in words())


def test_a_file_of_merges_is_always_the_same(tmp_path):
    for name in ("a.gz", "b.gz"):
        save_merges(tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    lines = gzip.decompress((tmp_path / "a.gz").read_bytes()).decode().splitlines()
    assert lines[0].startswith("#version") and len(lines) == 1 + len(byte_pair_merges())


def test_size_of_the_vocabulary(tokenizer):
    """256 bytes, in words and at their ends, the merges, start and end: what CLIP's text tower has rows for."""
    assert len(tokenizer) == 512 + len(byte_pair_merges()) + 2 == CONFIG["text_cfg"]["vocab_size"]


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.model_max_length, again.pad_token_id) == (CONTEXT_LENGTH, tokenizer.eos_token_id)


def test_berts_vocabulary(tmp_path):
    pieces = bert_vocabulary()
    assert len(pieces) == len(set(pieces))
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    bert = BertTokenizer.from_pretrained(tmp_path)
    for word in words():
        assert bert.tokenize(word) == [word]
    assert bert.tokenize("Zebra, 7") == ["z", "##e", "##b", "##r", "##a", ",", "7"]
    assert bert.tokenize("a 🐱") == ["a", "[UNK]"]
    rng = random.Random(0)
    for scene in rng.sample(list(all_scenes()), 100):
        assert "[UNK]" not in bert.tokenize(vary_caption(scene, rng, "masterpiece, best quality"))
