"""Shared test settings: offline, one thread, no colour; where the optional real data is."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

from align.scratch import ScratchConfig, train_bpe_tokenizer

TOKENIZER_TEXTS = [
    '{"model": "dreamshaper_8", "width": 512, "cfg scale": 7.5}',
    "a red fox, watercolour",
    "masterpiece, 8k",
] * 4


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 300 tokens at most, with the ChatML template."""
    return train_bpe_tokenizer(TOKENIZER_TEXTS, vocab_size=300)


@pytest.fixture
def tiny():
    """The size of a toy Llama that fits `tokenizer`."""
    return ScratchConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A small DABench of both architectures, built from an invented community of 24 models."""
    from align.bench.config import DABenchConfig
    from align.bench.dabench import build
    from pocket.community import write_dump

    folder = tmp_path_factory.mktemp("bench")
    write_dump(folder / "models.jsonl", num_models=24, images_per_version=16, seed=0)
    build(DABenchConfig(source=str(folder / "models.jsonl"), output=str(folder / "dabench"), plots=False))
    return folder / "dabench"
