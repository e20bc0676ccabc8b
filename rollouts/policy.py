"""The policy: a language model that writes API calls, and its tokenizer; one that sees pictures, and its processor.

Only safetensors and GGUF files are read, never pickles, and no code that came with a model is run. This command turns a
GGUF file into an ordinary directory of safetensors and tokenizer, which loads faster and can be trained on:

    python -m rollouts.policy --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output_dir models/smollm2-135m --dtype bfloat16
"""

import argparse
import hashlib
import logging
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rollouts.gguf_weights import (
    control_tokens,
    load_gguf_model,
    load_gguf_tokenizer,
    read_gguf_metadata,
    special_tokens,
)

logger = logging.getLogger(__name__)

# Of a fingerprint.
_PIECES, _PIECE_BYTES = 256, 4096

DTYPES = ("float32", "bfloat16", "float16", "auto")

# What published models call the token they pad with; Llama 3 has one but does not declare it.
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|pad_token|>", "<|finetune_right_pad_id|>")


def load_tokenizer(
    name_or_path: str, *, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, a Hub model, or a GGUF file; it always has a pad token.

    A declared pad token is kept. A missing one becomes a padding or unknown token of the vocabulary other than EOS
    (`<unk>` of LLaMA-2, `<|finetune_right_pad_id|>` of Llama 3), and only without any the EOS token, with a warning:
    a collator that masks by the value of the token would then mask every EOS, and the policy would never learn to stop.

    Args:
        name_or_path: A directory, a Hub id, or the path of a `.gguf` file.
        gguf_file: Name of a GGUF file inside `name_or_path`.
        revision: Git revision on the Hub.

    Raises:
        FileNotFoundError: No such directory or file.
        OSError: Not a directory here, and the Hub can't give it either.
        ValueError: The GGUF tokenizer can't be rebuilt exactly, or there is neither a pad nor an EOS token.
    """
    gguf = _gguf_path(name_or_path, gguf_file, revision)
    if gguf is not None:
        tokenizer = load_gguf_tokenizer(gguf)
    else:
        source = _directory_or_hub_id(name_or_path)
        try:
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        except OSError as error:
            raise _cannot_load(name_or_path, "tokenizer", error) from error
        tokenizer = cast(PreTrainedTokenizerBase, loaded)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _choose_pad_token(tokenizer, name_or_path)
    return tokenizer


def load_policy(
    name_or_path: str,
    *,
    gguf_file: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A language model from a directory, the Hub, or a GGUF file; trainable, in evaluation mode.

    It is a causal one, or one for pictures and text (`AutoModelForImageTextToText`) if its configuration is of such.

    Args:
        name_or_path: A directory with safetensors, a Hub id, or the path of a `.gguf` file.
        gguf_file: Name of a GGUF file inside `name_or_path`. Its weights are unpacked: a 4-bit file needs 8 times its
            size in float32.
        dtype: "float32", "bfloat16" or "float16"; "auto" and `None` keep the checkpoint's own, float32 for GGUF.
        revision: Git revision on the Hub.
        attn_implementation: "sdpa", "eager", ...; `None` lets transformers choose.

    Raises:
        FileNotFoundError: No such directory or file, or no config.json or safetensors in it.
        OSError: Not a directory here, and the Hub can't give it either.
        ValueError: Unknown dtype, a checkpoint that is a pickle or an adapter, or a GGUF that would be read in part.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {list(DTYPES)} or None, but got {dtype!r}.")
    gguf = _gguf_path(name_or_path, gguf_file, revision)
    if gguf is not None:
        unpacked = torch.float32 if dtype in (None, "auto") else getattr(torch, dtype)
        model = load_gguf_model(gguf, unpacked, attn_implementation)
        _set_gguf_pad(model, gguf)
        return model
    source = _directory_or_hub_id(name_or_path)
    if isinstance(source, Path):
        _check_checkpoint(source)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    kind = AutoModelForImageTextToText if sees_pictures(name_or_path, revision=revision) else AutoModelForCausalLM
    try:
        return kind.from_pretrained(
            source, dtype=dtype or "auto", revision=revision, use_safetensors=True, trust_remote_code=False, **extra
        )
    except OSError as error:
        raise _cannot_load(name_or_path, "model", error) from error


def sees_pictures(name_or_path: str, *, revision: str | None = None) -> bool:
    """Whether a model's configuration is of one that reads pictures and text. A GGUF file's model never does.

    Raises:
        FileNotFoundError: No such directory.
        OSError: No configuration there, and the Hub can't give it either.
    """
    if _gguf_path(name_or_path, None, revision) is not None:
        return False
    source = _directory_or_hub_id(name_or_path)
    if isinstance(source, Path) and not (source / "config.json").is_file():
        return False  # whoever loads it will say what is wrong
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _cannot_load(name_or_path, "configuration", error) from error
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def load_processor(name_or_path: str, *, revision: str | None = None) -> ProcessorMixin:
    """The processor of a model that sees pictures; its tokenizer always has a pad token, as `load_tokenizer`'s.

    Args:
        name_or_path: A directory or a Hub id.
        revision: Git revision on the Hub.

    Raises:
        FileNotFoundError: No such directory.
        OSError: Not a directory here, and the Hub can't give it either.
        ValueError: There is only a tokenizer, or it has neither a pad nor an EOS token.
    """
    source = _directory_or_hub_id(name_or_path)
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise _cannot_load(name_or_path, "processor", error) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{name_or_path} sees pictures, but has only a tokenizer and no processor; copy processor_config.json and "
            "preprocessor_config.json of the model that it was trained from beside it."
        )
    tokenizer = cast(Any, processor).tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _choose_pad_token(tokenizer, name_or_path)
    return processor


def policy_fingerprint(name_or_path: str) -> str:
    """What tells a policy from another: the same after copying or moving its folder, and quick for any size.

    Of a folder or a `.gguf` file: 16 hex digits over the names and sizes of its weight files and 4 KB pieces of each,
    evenly spaced from the first byte to the last; files up to 1 MB are read whole. Of a Hub id: the id, with `@` and
    the commit that is in the local cache, if any.

    Raises:
        FileNotFoundError: No such directory or file, or no weights in it.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _digest_of_weights([path])
    source = _directory_or_hub_id(name_or_path)
    if isinstance(source, str):
        cached = try_to_load_from_cache(source, "config.json")
        return f"{source}@{Path(cached).parent.name}" if isinstance(cached, str) else source
    files = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".gguf", ".bin") and p.is_file())
    files = [p for p in files if p.name != "training_args.bin"]  # no weights, and another one at every saving
    if not files:
        raise FileNotFoundError(f"No weights (.safetensors or .gguf) in {source}: the checkpoint is incomplete.")
    return _digest_of_weights(files)


def _digest_of_weights(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max((size - _PIECE_BYTES) / (_PIECES - 1), _PIECE_BYTES)
        with path.open("rb") as file:
            for i in range(_PIECES):
                file.seek(round(i * step))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def _gguf_path(name_or_path: str, gguf_file: str | None, revision: str | None) -> Path | None:
    """Where the GGUF file is, or None if none is meant."""
    root = Path(name_or_path).expanduser()
    if gguf_file is None:
        if root.suffix.lower() != ".gguf":
            return None
        path = root
    elif root.suffix.lower() == ".gguf":
        raise ValueError(
            f"`name_or_path` ({name_or_path}) is a GGUF file already; leave out `gguf_file` ({gguf_file})."
        )
    elif isinstance(_directory_or_hub_id(name_or_path), Path):
        path = root / gguf_file
    else:
        try:
            path = Path(hf_hub_download(name_or_path, gguf_file, revision=revision))
        except OSError as error:
            raise _cannot_load(name_or_path, gguf_file, error) from error
    if not path.is_file():
        raise FileNotFoundError(f"No GGUF file at {path}.")
    return path


def _directory_or_hub_id(name_or_path: str) -> Path | str:
    """A Path for a directory here, the string for what can only be a Hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file; give the directory that holds config.json, or a .gguf file.")
    # A Hub id is "name" or "owner/name".
    if path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2 or not name_or_path:
        raise FileNotFoundError(f"No model directory at {name_or_path!r}.")
    return name_or_path


def _cannot_load(name_or_path: str, what: str, error: OSError) -> OSError:
    if Path(name_or_path).expanduser().is_dir():
        return OSError(f"Can't load the {what} in {name_or_path}: {error}")
    return OSError(
        f"`{name_or_path}` is not a directory here, and its {what} could not be had from the Hub (is the name right, "
        f"is HF_HUB_OFFLINE set?): {error}"
    )


def _check_checkpoint(directory: Path) -> None:
    """Say what is wrong with a directory before transformers does, which would guess."""
    names = sorted(path.name for path in directory.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ValueError(
                f"{directory} holds a PEFT adapter, not a model. Merge it first: "
                "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)."
            )
        files = [name for name in names if name.endswith(".gguf")]
        hint = f"Pass `gguf_file`, one of {files}." if files else "Is it a checkpoint saved by save_pretrained?"
        raise FileNotFoundError(f"No config.json in {directory}. {hint}")
    # Not `adapter_model.safetensors`.
    if any(name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    pickles = [
        name for name in names if name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))
    ]
    if pickles:
        raise ValueError(
            f"{directory / pickles[0]} is a pickle, which can run code when it is read; only safetensors are read. "
            "If you trust it, convert it once: python -c 'from transformers import AutoModelForCausalLM as M; "
            f'M.from_pretrained("{directory}", use_safetensors=False).save_pretrained("{directory}")\''
        )
    raise FileNotFoundError(f"No model.safetensors in {directory}: the checkpoint is incomplete.")


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    choice = _pad_among(special | set(tokenizer.all_special_tokens), tokenizer.unk_token, tokenizer.eos_token)
    if choice is not None:
        return choice
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {source} has neither a pad nor an EOS token; set `pad_token` in its config."
        )
    _warn_once(
        f"{source} has no token to pad with except its EOS {tokenizer.eos_token!r}: mask padding by length or "
        "attention mask, never by token, or the policy does not learn to stop."
    )
    return tokenizer.eos_token


def _pad_among(special: Collection[str], unk: str | None, eos: str | None) -> str | None:
    return next((name for name in (*_PAD_NAMES, unk, "<unk>", "[UNK]") if name in special and name != eos), None)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _set_gguf_pad(model: PreTrainedModel, path: Path) -> None:
    """Give the model the pad token that `load_tokenizer` gives the tokenizer of the same file."""
    generation = model.generation_config
    if generation is None or generation.pad_token_id is not None:
        return
    metadata = read_gguf_metadata(path)
    names = special_tokens(metadata)
    pad = _pad_among(control_tokens(metadata), names.get("unk_token"), names.get("eos_token")) or names.get("eos_token")
    generation.pad_token_id = None if pad is None else metadata["tokenizer.ggml.tokens"].index(pad)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a GGUF file to a directory that `load_policy` and `load_tokenizer` read."""
    parser = argparse.ArgumentParser(prog="python -m rollouts.policy", description=main.__doc__)
    parser.add_argument("--gguf", required=True, help="The GGUF file.")
    parser.add_argument("--output_dir", required=True, type=Path, help="New or empty directory.")
    parser.add_argument("--dtype", default="float32", choices=DTYPES[:3], help="Type of the written weights.")
    parser.add_argument("--tokenizer_name_or_path", help="Take the tokenizer from here instead of the GGUF file.")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir} is not empty; choose another or delete it.")
    # The tokenizer first: it is the quicker one to fail.
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.gguf)
    model = load_policy(args.gguf, dtype=args.dtype)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    logger.info("%s: %.1fM parameters, %d tokens", args.output_dir, model.num_parameters() / 1e6, len(tokenizer))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
