"""A policy from nothing: a byte-level BPE tokenizer trained on the data and a small Llama with random weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, BOS, IM_START, IM_END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML; `{% generation %}` marks what the assistant writes, its `<|im_end|>` included, for assistant-only losses."""


def train_bpe_tokenizer(
    texts: Iterable[str], *, vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text comes back exactly, digits are one token each.

    The same texts give the same tokenizer.json, byte for byte. Specials are `<|pad|>` (0), `<|bos|>` (1),
    `<|im_start|>` (2) and `<|im_end|>` (3, EOS); none is added unasked, and the template starts with `<|im_start|>`, so
    `<|bos|>` is only for generation from nothing. It pads on the left, as batched generation needs.

    **Text of users must be tokenized with `tokenizer(text, split_special_tokens=True)`**: otherwise a literal
    "<|im_end|>" in it becomes the control token and ends the turn. `apply_chat_template` renders before it tokenizes
    and can't tell the two apart, so code that takes untrusted text puts the ids of the markers around it by itself.

    Args:
        texts: At least one that is not empty.
        vocab_size: Number of tokens at most, at least 260 (256 bytes and 4 specials). Few texts give fewer.
        chat_template: Jinja template; `None` takes `CHATML_TEMPLATE`.

    Raises:
        ValueError: No text, or `vocab_size` below 260.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be an iterable of strings, but got one string; wrap it in a list.")
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), (PAD, BOS, IM_START, IM_END)
    smallest = len(alphabet) + len(special)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} (every byte and special token), got {vocab_size}.")
    remaining = iter(texts)
    first = next((text for text in remaining if text), None)
    if first is None:
        raise ValueError("`texts` must hold some text to train on, but it is empty or has only empty strings.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(chain([first], remaining), trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=[IM_START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHATML_TEMPLATE if chat_template is None else chat_template
    return tokenizer


@dataclass
class ScratchConfig:
    """A small Llama to be trained from nothing; the defaults make 6.5M parameters."""

    vocab_size: int = field(default=8192, metadata={"help": "Rows of the embedding; at least the tokenizer's length."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Transformer blocks."})
    num_attention_heads: int = field(default=8, metadata={"help": "Query heads; divides `hidden_size`."})
    num_key_value_heads: int = field(default=4, metadata={"help": "Key-value heads; divides `num_attention_heads`."})
    intermediate_size: int = field(default=704, metadata={"help": "Width of the gated feed-forward layer."})
    max_position_embeddings: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Use the embedding as output layer as well."})
    rope_theta: float = field(default=10000.0, metadata={"help": "Base of the rotary position frequencies."})

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "tie_word_embeddings" and value <= 0:
                raise ValueError(f"`{name}` must be positive, but got {value}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of 2 * `num_attention_heads` (rotary embeddings turn pairs), but "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, but got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )


def build_from_scratch(config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random float32 weights on the CPU; equal seeds give equal weights, the caller's RNG is left alone.

    Weights are N(0, 0.02^2); those that write to the residual stream (`o_proj`, `down_proj`) N(0, 0.02^2 / 2L) with L
    layers, two writes each, so that its variance does not grow with depth (GPT-2, Radford et al. 2019, Sec. 2.3).

    Raises:
        ValueError: The tokenizer has more tokens than the model rows, or lacks an EOS token.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`vocab_size` must be at least the tokenizer's {len(tokenizer)}, but got {config.vocab_size}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer needs an EOS token, or generation never ends; set `eos_token`.")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        initializer_range=0.02,
        dtype="float32",
        **ids,
    )
    # Not torch.manual_seed, which would also reseed every GPU and leave it so.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(llama)
        std = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=std)
    model.generation_config = GenerationConfig(**ids)
    return model.eval()
