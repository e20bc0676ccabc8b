"""Loading policies. What concerns GGUF files is in test_gguf_weights.py."""

import json
import logging
import re
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from align.scratch import build_from_scratch
from rollouts.policy import load_policy, load_tokenizer, policy_fingerprint


@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    """A saved policy: model and tokenizer in one directory."""
    directory = tmp_path / "policy"
    build_from_scratch(tiny, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tokenizer(directory, special, **names):
    """A word-level tokenizer of the given special tokens and the words a, b."""
    vocab = {token: index for index, token in enumerate([*special, "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=names.get("unk_token", "a")))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("special", "names", "expected"),
    [
        # LLaMA-2: <unk>, <s>, </s> and no padding token.
        (["<unk>", "<s>", "</s>"], {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<unk>"),
        # Llama 3 Instruct has one but does not declare it.
        (
            ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"],
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "<|finetune_right_pad_id|>",
        ),
        (["<unk>", "</s>", "<pad>"], {"unk_token": "<unk>", "eos_token": "</s>"}, "<pad>"),
        # What the model declares is kept, even where it is EOS.
        (["<unk>", "</s>"], {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
    ],
)
def test_pad_token_of_published_kinds(tmp_path, special, names, expected):
    loaded = load_tokenizer(save_tokenizer(tmp_path, special, **names))
    assert loaded.pad_token == expected
    assert len(loaded) == len(special) + 2, "padding must not grow the vocabulary past the embedding"
    assert loaded(["a", "a b a"], padding=True)["input_ids"][0].count(special.index(expected)) == 2


def test_pad_token_is_eos_as_the_last_resort_and_said_once(tmp_path, caplog):
    # GPT-2: one token is BOS, EOS and unknown.
    path = save_tokenizer(tmp_path, ["<|endoftext|>"], unk_token="<|endoftext|>", eos_token="<|endoftext|>")
    with caplog.at_level(logging.WARNING, logger="align.policy"):
        assert load_tokenizer(path).pad_token == load_tokenizer(path).pad_token == "<|endoftext|>"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert path in caplog.text and "<|endoftext|>" in caplog.text


def test_tokenizer_without_pad_and_eos_is_an_error(tmp_path):
    path = save_tokenizer(tmp_path, ["<s>"], bos_token="<s>")
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        load_tokenizer(path)


def test_load_gives_what_was_saved(checkpoint, tokenizer):
    stored = load_file(checkpoint / "model.safetensors")
    model = load_policy(str(checkpoint))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(stored) == 2 + 2 * 9  # embedding, last norm; 7 matrices and 2 norms a layer
    for name, weight in stored.items():
        assert torch.equal(model.state_dict()[name], weight), name
    text = "a red fox, 8k<|im_end|>"
    assert load_tokenizer(str(checkpoint))(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtype(tiny, tokenizer, tmp_path, dtype, expected):
    build_from_scratch(tiny, tokenizer).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_policy(str(tmp_path), dtype=dtype).parameters()} == {expected}


def test_attention_implementation_is_passed_on(checkpoint):
    assert load_policy(str(checkpoint), attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", ["fp32", "int8", "layout", ""])
def test_unknown_dtype_is_an_error(checkpoint, dtype):
    with pytest.raises(ValueError, match="`dtype` must be one of .*float32"):
        load_policy(str(checkpoint), dtype=dtype)


def test_pickle_is_refused_and_the_named_conversion_works(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*only safetensors"):
        load_policy(str(checkpoint))
    AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=False).save_pretrained(checkpoint)
    assert load_policy(str(checkpoint)).num_parameters() > 0


def test_pickle_beside_other_safetensors_is_not_read_either(checkpoint):
    weights = checkpoint / "model.safetensors"
    torch.save(load_file(weights), checkpoint / "pytorch_model.bin")
    weights.rename(checkpoint / "model.fp16.safetensors")  # a variant transformers does not take unasked
    with pytest.raises(OSError, match=r"Can't load the model in .*model\.safetensors"):
        load_policy(str(checkpoint))
    (checkpoint / "model.fp16.safetensors").rename(checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        load_policy(str(checkpoint))


def test_code_in_a_checkpoint_is_not_run(checkpoint):
    (checkpoint / "evil.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert type(load_policy(str(checkpoint))).__name__ == "LlamaForCausalLM"
    assert not (checkpoint / "ran").exists()


def test_directories_that_are_no_checkpoint(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No config\.json in .*empty"):
        load_policy(str(tmp_path / "empty"))
    (tmp_path / "empty" / "model.Q4.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"Pass `gguf_file`, one of \['model\.Q4\.gguf'\]"):
        load_policy(str(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="PEFT adapter.*merge_and_unload"):
        load_policy(str(tmp_path / "empty"))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors in"):
        load_policy(str(checkpoint))


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_paths_that_do_not_exist(tmp_path, checkpoint, load):
    with pytest.raises(FileNotFoundError, match="No model directory at .*nowhere"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="No model directory at './runs/sft'"):
        load("./runs/sft")
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file"):
        load(str(checkpoint / "config.json"))
    # Could be a Hub id; the tests are offline.
    with pytest.raises(OSError, match="`no-such-owner/no-such-model` is not a directory here"):
        load("no-such-owner/no-such-model")


def test_directory_without_a_tokenizer(tiny, tokenizer, tmp_path):
    build_from_scratch(tiny, tokenizer).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_fingerprint_is_of_the_weights_wherever_they_lie(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    weights = bytes(range(256)) * 40_000  # 10 MB: read in pieces
    (folder / "model-00001-of-00002.safetensors").write_bytes(weights)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"small")
    first = policy_fingerprint(str(folder))
    assert re.fullmatch("[0-9a-f]{16}", first)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text("{}")
    (tmp_path / "copy/training_args.bin").write_bytes(b"another run")
    assert policy_fingerprint(str(tmp_path / "copy")) == first
    changes = {
        "the first byte": ("model-00001-of-00002.safetensors", b"\1" + weights[1:]),
        "the last byte": ("model-00001-of-00002.safetensors", weights[:-1] + b"\0"),
        "the length": ("model-00001-of-00002.safetensors", weights + b"\0"),
        "a small file": ("model-00002-of-00002.safetensors", b"smell"),
        "all but the head": ("model-00001-of-00002.safetensors", weights[:4096] + bytes(len(weights) - 4096)),
    }
    for what, (name, data) in changes.items():
        shutil.copytree(folder, tmp_path / what)
        (tmp_path / what / name).write_bytes(data)
        assert policy_fingerprint(str(tmp_path / what)) != first, what
    gguf = tmp_path / "policy.gguf"
    gguf.write_bytes(weights)
    assert re.fullmatch("[0-9a-f]{16}", policy_fingerprint(str(gguf))) and policy_fingerprint(str(gguf)) != first


def test_fingerprint_of_what_is_not_here(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No weights .* the checkpoint is incomplete"):
        policy_fingerprint(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No model directory at"):
        policy_fingerprint(str(tmp_path / "gone"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert policy_fingerprint("nobody/nothing") == "nobody/nothing"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--nobody--nothing/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--nobody--nothing/refs").mkdir()
    (tmp_path / "models--nobody--nothing/refs/main").write_text(commit)
    assert policy_fingerprint("nobody/nothing") == f"nobody/nothing@{commit}"
