"""Tiny causal language models of many kinds, rows of candidates, and every sequence scored alone."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mistral": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": LLAMA_LIKE | {"logit_scale": 0.25},
}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="session")
def build():
    """`build(kind, attention="sdpa", dtype=torch.float32, **config)`: a model of that kind, the same at every call.

    Weights have some spread, so that no part of a model is without influence.
    """

    def make(kind: str, attention: str | None = "sdpa", dtype: torch.dtype = torch.float32, **config: Any):
        settings = AutoConfig.for_model(kind, **(SIZES[kind] | TOKENS | config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
            for weight in model.parameters():
                with torch.no_grad():
                    weight.add_(torch.randn_like(weight), alpha=0.15)
        return model.eval().to(dtype)

    return make


@pytest.fixture
def rows():
    """Prompts of 7, 1 and 12 tokens; branches, a single candidate, prefixes of each other, duplicates, one token."""
    return [
        {
            "prompt_ids": [17, 40, 3, 88, 21, 40, 9],
            "responses": [[5, 6, 7, 2], [5, 6, 2], [5, 6, 7, 8, 2], [9, 2]],
            "rewards": [0.1, 0.9, 0.5, 0.3],
        },
        {"prompt_ids": [44], "responses": [[30, 31, 2]], "rewards": [0.5]},
        {
            "prompt_ids": [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61],
            "responses": [[11, 12, 13], [11, 12], [11], [11, 12, 13], [2]],
            "rewards": [0.5, 0.2, 0.9, 0.1, 0.3],
        },
    ]


@pytest.fixture(scope="session")
def naive():
    """`naive(model, rows)`: log-probabilities by prompt and candidate, every sequence alone, nothing but its tokens."""

    def score(model: torch.nn.Module, rows: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
        found = []
        for row in rows:
            found.append([])
            for response in row["responses"]:
                ids = torch.tensor([[*row["prompt_ids"], *response]])
                logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                first = len(row["prompt_ids"]) - 1
                found[-1].append(torch.stack([logps[first + i, token] for i, token in enumerate(response)]))
        return found

    return score
