"""The words of the pocket world, for its text encoders: CLIP's byte-pair tokenizer and BERT's, with few merges.

Both are made by a rule, so that they are the same everywhere, and know every word of the captions as one token; other
words are spelt.
"""

import gzip
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import pre_tokenizers

from pocket.drawing import BACKGROUNDS, COLORS, GOOD_QUALITY, STYLES, SUBJECTS
from rewards.files import write_atomically

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT_LENGTH = 32
"""Tokens of a text encoder, start and end included."""
BAD_QUALITY = ("blurry", "noisy", "faded", "low quality")
_OTHERS = """
an the and with of in on at by to picture image photo drawing painting bright dark small large big simple detailed cute
beautiful colourful worst bad ugly style masterpiece clean soft glowing lines blocks dots paper
"""
MERGES_FILE = "merges.txt.gz"


def words() -> list[str]:
    """Every word that is one token, in a fixed order."""
    phrases = [*SUBJECTS, *COLORS, *BACKGROUNDS.values(), *STYLES.values(), *GOOD_QUALITY, *BAD_QUALITY, _OTHERS]
    return list(dict.fromkeys(" ".join(phrases).replace(",", " ").split()))


def byte_pair_merges() -> list[tuple[str, str]]:
    """The merges that make each word one token: always the most frequent pair, of equals the first in the alphabet."""
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for pieces in spelt for pair in zip(pieces, pieces[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(pieces, best) for pieces in spelt]


def clip_tokenizer() -> "CLIPTokenizer":
    """CLIP's tokenizer with these merges; ids are those of open_clip's SimpleTokenizer with `save_merges`' file.

    (But open_clip first mends what is typographic in a text, such as curly quotes, ligatures and HTML entities.)
    """
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    merges = byte_pair_merges()
    # open_clip numbers the bytes in this order: printable ones first
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), start, end]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=cast(Any, merges),
        model_max_length=CONTEXT_LENGTH, bos_token=start, eos_token=end, pad_token=end,
    )  # fmt: skip


def save_merges(path: str | Path) -> None:
    """Write the merges in the format of open_clip's `bpe_simple_vocab_16e6.txt.gz`."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in byte_pair_merges())]
    write_atomically(Path(path), gzip.compress("\n".join(lines).encode(), mtime=0))


def bert_vocabulary() -> list[str]:
    """BERT's word pieces: special tokens, all words, and letters to spell others with."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.:;!?()'\"-", *letters]
    return list(dict.fromkeys([*pieces, *(f"##{letter}" for letter in letters), *words()]))


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
