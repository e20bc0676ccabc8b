"""The bytes that each token of a tokenizer stands for, and which tokens begin with given bytes.

Grammars over bytes need them exactly, also for tokens that are half a character. They are read from how the tokenizer
decodes (byte-level BPE such as GPT-2's, or pieces with a byte fallback such as LLaMA-2's), and checked on some texts.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBES = (
    '{"model": "DreamShaper", "width": 512, "cfg scale": 7.5}',
    'crème brûlée 狐 🦊 \\ "quoted" {x}',
    "two  spaces\n",
)


class TokenizerError(ValueError):
    """A tokenizer whose tokens can't be taken apart into bytes."""


class TokenBytes:
    """Ordinary tokens and their bytes; control tokens and tokens without text have none.

    Attributes:
        of_id: The bytes of every token, `None` for control tokens. As long as the vocabulary.
        texts: Bytes of the tokens that have some, sorted; the same bytes can stand there more than once.
        ids: Their token ids.

    Args:
        tokenizer: Any tokenizer of the `tokenizers` library.

    Raises:
        TokenizerError: Another kind of tokenizer, or one whose tokens don't add up to the texts they encode.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        to_bytes = _reader(tokenizer)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        added = set(tokenizer.added_tokens_decoder)
        self.of_id: list[bytes | None] = [None] * len(tokenizer)
        for text, id in tokenizer.get_vocab().items():
            if id not in special and id not in tokenizer.all_special_ids:
                # Added tokens are whole texts, not pieces.
                self.of_id[id] = text.encode() if id in added else to_bytes(text)
        order = sorted((data, id) for id, data in enumerate(self.of_id) if data)
        self.texts = [data for data, _ in order]
        self.ids = [id for _, id in order]
        self.longest = max(map(len, self.texts), default=0)
        self._adds_space = False
        self._adds_space = self.join(self.encode("a")) == b" a"
        self._check()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which control tokens that are spelled out are text like any other.

        They say the text, or a space more where the tokenizer puts one first and the text has none.
        """
        if self._adds_space:
            text = text.removeprefix(" ")
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def join(self, ids: Sequence[int]) -> bytes:
        """What tokens say together; control tokens say nothing."""
        return b"".join(self.of_id[id] or b"" for id in ids)

    def range_of(self, beginning: bytes, low: int = 0, high: int | None = None) -> tuple[int, int]:
        """Which of `texts` begin like this."""
        end = len(self.texts) if high is None else high
        first = bisect_left(self.texts, beginning, low, end)
        return first, bisect_left(self.texts, _successor(beginning), first, end) if beginning else end

    def _check(self) -> None:
        for probe in _PROBES:
            found = self.join(self.encode(probe))
            if found.removeprefix(b" " if self._adds_space else b"") != probe.removeprefix(" ").encode():
                raise TokenizerError(
                    f"The tokens of {probe!r} say {found!r} in this tokenizer ({type(self.tokenizer).__name__}), which "
                    "changes texts: answers can't be constrained."
                )


def _successor(beginning: bytes) -> bytes:
    """The least bytes that are greater than everything that begins like this."""
    stripped = beginning.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\xff" * (len(beginning) + 64)


def _reader(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
    kinds = set(_kinds(decoder))
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return _piece
    raise TokenizerError(
        f"{type(tokenizer).__name__} decodes by {sorted(kinds) or 'no rule'}; only byte-level tokenizers and pieces "
        "with a byte fallback can be taken apart into bytes."
    )


def _kinds(decoder: Any) -> Iterator[str]:
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", []):
            yield from _kinds(part)


def _byte_level(text: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in text)


def _piece(text: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters are themselves, the other bytes come after U+0100 in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
