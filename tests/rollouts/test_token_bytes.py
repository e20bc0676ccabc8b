"""The bytes of tokens say the text together: for byte-level tokenizers, and for pieces with a byte fallback."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.scratch import train_bpe_tokenizer
from rollouts.token_bytes import TokenBytes, TokenizerError

TEXTS = ['{"model": "Süßes 水彩 ✨ - v3", "width": 512}', "a red fox, watercolour"] * 4


def byte_level():
    return train_bpe_tokenizer(TEXTS, vocab_size=330)


def with_pieces():
    """Like LLaMA-2's: a space before every text, spaces as pieces, bytes for what has none."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "f",
        "o",
        "x",
        "fo",
        "fox",
        "▁fox",
        "ß",
    ]
    letters = sorted(set('{"model": DreamShaper, width 512}') - {" "})
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *letters]))}
    merges = [("f", "o"), ("fo", "x"), ("▁", "fox")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("make", "adds_space"), [(byte_level, False), (with_pieces, True)])
def test_tokens_of_a_text_say_the_text(make, adds_space):
    tokens = TokenBytes(make())

    @given(st.text())
    @settings(max_examples=200, deadline=None)
    def check(text):
        ids = tokens.encode(text)
        said = tokens.join(ids).decode()
        assert said == (f" {text}" if adds_space and text and not text.startswith(" ") else text)[: len(said)]
        assert len(said) >= len(text.removeprefix(" ")) and tokens.tokenizer.decode(ids) == said[adds_space:]

    check()


@pytest.mark.parametrize("make", [byte_level, with_pieces])
def test_control_tokens_say_nothing_and_are_text_when_somebody_types_them(make):
    tokenizer = make()
    tokens = TokenBytes(tokenizer)
    assert tokens.of_id[tokenizer.eos_token_id] is None
    typed = tokens.encode(f"a {tokenizer.eos_token} b")
    assert tokenizer.eos_token_id not in typed
    assert tokens.join(typed).strip().decode() == f"a {tokenizer.eos_token} b"
    assert len(tokens.of_id) == len(tokenizer)


def test_added_words_are_whole_texts(tokenizer):
    own = byte_level()
    own.add_tokens(["watercolour für alle"])
    tokens = TokenBytes(own)
    assert tokens.of_id[own.convert_tokens_to_ids("watercolour für alle")] == "watercolour für alle".encode()


def test_ranges_hold_what_begins_with_given_bytes():
    tokens = TokenBytes(byte_level())
    for beginning in (b"", b"a", b"wa", b"\xc3", b"\xff", b"no such token"):
        low, high = tokens.range_of(beginning)
        assert tokens.texts[low:high] == [text for text in tokens.texts if text.startswith(beginning)]
    low, high = tokens.range_of(b"w")
    inner = tokens.range_of(b"wa", low, high)
    assert inner == tokens.range_of(b"wa")
    assert all(tokens.of_id[id] == text for id, text in zip(tokens.ids, tokens.texts, strict=True))


def test_tokenizers_that_change_texts_or_are_of_another_kind_are_refused():
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerError, match="changes texts: answers can't be constrained"):
        TokenBytes(lower)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="decodes by no rule"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
