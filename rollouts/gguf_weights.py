"""Read a GGUF file (llama.cpp's model format) as a plain transformers model and tokenizer.

GGUF is how small models travel where the Hugging Face Hub cannot be reached. transformers reads the format too, but
what it returns is marked as quantised (it can't be saved or trained), and its tokenizer differs from the model's own
for some files. The functions here give an ordinary model and a tokenizer that splits text exactly as the model's own
does, or refuse by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Values of `tokenizer.ggml.token_type` that are matched whole in the text (`gguf.TokenType`).
_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The pattern of each model's own tokenizer.json. They differ in how many digits stay together.
_SPLIT_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}",
    "qwen2": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_SYMBOLS_AND_SPACE}",
}
KNOWN_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
"""Values of `tokenizer.ggml.pre` whose tokenizer can be rebuilt exactly."""


def _open(path: Path) -> Any:
    """`gguf.GGUFReader` of the file.

    Raises:
        ImportError: Without the package `gguf`.
        FileNotFoundError: No such file.
        ValueError: The file is no GGUF or is cut off.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError('Reading GGUF files needs the package `gguf`: pip install "t2i-align[gguf]".') from error
    if not path.is_file():
        raise FileNotFoundError(f"No GGUF file at {path}.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable GGUF file: {error}. "
            "Download it again; a few hundred bytes of text are a Git LFS pointer."
        ) from error


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file, arrays as lists: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
        ImportError: Without the package `gguf`.
        FileNotFoundError: No such file.
        ValueError: The file is no GGUF or is cut off.
    """
    return {key: field.contents() for key, field in _open(path).fields.items()}


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer a GGUF file describes; its pad token stays unset if the file names none.

    It pads on the left, as batched generation needs, and does not add BOS unless the model's own does.

    Differs from `AutoTokenizer.from_pretrained(gguf_file=...)` of transformers 5.23, which does not set digits apart
    from the space before them for SmolLM2 ("a  1"), has no NFC normaliser for Qwen2 and no `ignore_merges` for Llama 3.

    Raises:
        ValueError: The tokenizer is not one of those that can be rebuilt exactly, or its data contradict each other.
    """
    metadata = read_gguf_metadata(path)
    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in KNOWN_PRE_TOKENIZERS:
        raise ValueError(
            f"{path} has `tokenizer.ggml.model` {metadata.get('tokenizer.ggml.model')!r} and `tokenizer.ggml.pre` "
            f"{pre!r}, but only 'gpt2' with one of {list(KNOWN_PRE_TOKENIZERS)} can be rebuilt exactly. Pass the "
            "model's own tokenizer (a directory or Hub name) with --tokenizer_name_or_path."
        )
    names = special_tokens(metadata)
    backend = _byte_level_bpe(path, metadata, pre)
    # llama.cpp's own default where the file says nothing.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in names
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in names
    if add_bos or add_eos:
        used = ([names["bos_token"]] if add_bos else []) + ([names["eos_token"]] if add_eos else [])
        single = ([names["bos_token"]] if add_bos else []) + ["$A"] + ([names["eos_token"]] if add_eos else [])
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(used)]
        )
    architecture = metadata.get("general.architecture")
    length = metadata.get(f"{architecture}.context_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
        **({"model_max_length": int(length)} if length else {}),
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The tokens a GGUF file names: `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as it does.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise ValueError(f"`tokenizer.ggml.{key}_token_id` is {token_id}, but there are {len(tokens)} tokens.")
        names[f"{name}_token"] = tokens[token_id]
    return names


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens a GGUF file marks as control tokens (`<|im_end|>`), in order of id."""
    types = metadata.get("tokenizer.ggml.token_type", [])
    return [token for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False) if kind == _CONTROL]


def _byte_level_bpe(path: Path, metadata: Mapping[str, Any], pre: str) -> Tokenizer:
    """Vocabulary, merges, pre-tokenizer and added tokens."""
    tokens, merges = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.merges", [])
    if not tokens or not merges or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{path} needs distinct `tokenizer.ggml.tokens` and `tokenizer.ggml.merges`, but has {len(tokens)} tokens "
            f"({len(set(tokens))} distinct) and {len(merges)} merges. Pass --tokenizer_name_or_path."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # Llama 3 takes a word that is in the vocabulary whole, even where its merges would not lead there.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _SPLIT_PATTERNS:
        split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def load_gguf_model(
    path: Path, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> PreTrainedModel:
    """An ordinary causal language model with the weights of a GGUF file: trainable, saved with `save_pretrained`.

    Quantised weights are unpacked to float32, then cast. The generation config has the file's BOS, EOS (and
    end-of-turn, where it is another token) and pad ids.

    Raises:
        ImportError: Without the package `gguf`.
        FileNotFoundError: No such file.
        ValueError: Not a GGUF file, an architecture transformers does not know, or one it would read only in part.
    """
    reader = _open(path)
    _check_rope(path, reader)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # Without `dequantize` the model counts as quantised: it can't be saved, and the Trainer refuses it.
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **extra,
        )
    except ValueError as error:
        raise ValueError(f"transformers can't read the weights of {path}: {error}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{path} has no weights for {sorted(info['missing_keys'])}; is it one part of a split model?")
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if stored != model.num_parameters():
        raise ValueError(
            f"{path} holds {stored} weights, but transformers' {type(model).__name__} took {model.num_parameters()}: "
            "it does not know a part of this model. Use the safetensors release."
        )
    # The file's title; a saved config would carry it for good.
    vars(model.config).pop("_model_name_or_path", None)
    model.generation_config = _generation_config(reader)
    return model


def _check_rope(path: Path, reader: Any) -> None:
    """Refuse RoPE scaling, which transformers 5.23 silently drops although it changes the logits."""
    dropped = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_freqs")]
    dropped += [key for key, field in reader.fields.items() if ".rope.scaling." in key and field.contents() != "none"]
    if dropped:
        raise ValueError(
            f"{path} scales its rotary embedding ({', '.join(dropped)}), which transformers does not read from GGUF "
            "files: the model would be a different one. Use the safetensors release."
        )


def _generation_config(reader: Any) -> GenerationConfig:
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ids = {name: None if field is None else int(field.contents()) for name, field in fields.items()}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    return GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=ends[0] if len(ends) == 1 else (ends or None),
        pad_token_id=ids["padding"],
    )
