"""Shared test settings: offline, one thread, no colour; where the optional real data is."""

import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rollouts.catalog import Catalog, CatalogEntry

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


AWKWARD_NAMES = [
    "Pixel Wave - v1",
    "Pixel Wave - v10",
    "Pixel",
    'Quote "Q" {x} - v2',
    "Back\\slash \\n [y], {z}: - v1",
    '", "type": "LoRA',
    "Süßes 水彩 ✨ - v3",
    "水 - v1",
    "水彩 - v1",
    "مرحبا بالعالم - v1",
    "שלום - v2",
    "👩🏽🎨🦊 - v1",
    "Long " + "m" * 295,
    "Long " + "m" * 294 + "n",
    "{}",
    "512",
]


@pytest.fixture(scope="session")
def awkward_catalog() -> Catalog:
    """Models whose names are hard to write in JSON, in tokens, or beside each other; of both architectures."""
    entries = []
    for number, name in enumerate(AWKWARD_NAMES):
        base_model, side = ("SDXL 1.0", 1024) if number % 5 == 4 else ("SD 1.5", 512)
        parameters = {"width": side, "height": side, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7}
        entries.append(
            CatalogEntry(
                name=name, version_id=number, model_id=number, type="Checkpoint", base_model=base_model,
                description=f'A model, "{name[:20]}". Tags: a, {"b" * number}.', default_parameters=parameters,
            )
        )  # fmt: skip
    return Catalog(entries)


class ToyWorld(NamedTuple):
    """A catalogue and its weights.

    Attributes:
        catalog: 2 SD 1.5 checkpoints with a LoRA each, an SDXL checkpoint with a LoRA.
        folder: What `WeightFolder` takes; `catalog.jsonl` is in it. Shared: copy it before changing a file.
    """

    catalog: Catalog
    folder: Path
    sd: str = "Toy SD 0 - v1"
    other_sd: str = "Toy SD 1 - v1"
    sdxl: str = "Toy XL 0 - v1"
    kohya_lora: str = "Toy SD LoRA 0 - v1"
    """For `sd`, changes its text encoder too."""
    diffusers_lora: str = "Toy SD LoRA 1 - v1"
    """For `other_sd`, changes the denoiser only."""
    sdxl_lora: str = "Toy XL LoRA 0 - v1"
    """For `sdxl`, in kohya's format, with both text encoders."""


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory) -> ToyWorld:
    """Tiny checkpoints and LoRAs with random weights; draw with RenderSettings(resolution_scale=0.125): 64 pixels."""
    from pocket.untrained import save_catalog

    folder = tmp_path_factory.mktemp("toy_world")
    return ToyWorld(save_catalog(folder), folder)


@pytest.fixture(scope="session")
def taught():
    """`taught(dialogue, pairs)`: a toy Llama that answers each prompt with its text, learned by heart in seconds."""

    def make(dialogue, pairs):
        size = ScratchConfig(
            vocab_size=len(dialogue.tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=96, max_position_embeddings=2048,
        )  # fmt: skip
        model = build_from_scratch(size, dialogue.tokenizer)
        encoded = [dialogue.encode(prompt, text) for prompt, text in pairs]
        longest = max(len(item.input_ids) for item in encoded)
        ids = torch.tensor([item.input_ids + [0] * (longest - len(item.input_ids)) for item in encoded])
        labels = torch.tensor([item.labels + [-100] * (longest - len(item.labels)) for item in encoded])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        for _ in range(500):
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if loss.item() < 0.005:
                return model.eval()
        raise AssertionError(f"not learned: {loss.item()}")

    return make


@pytest.fixture(scope="session")
def awkward_dialogue(awkward_catalog):
    """The dialogue of a tokenizer that knows the awkward catalogue's calls, a little."""
    from rollouts.dialogue import Dialogue

    texts = [entry.default_call().to_json() for entry in awkward_catalog.values()] * 2
    return Dialogue(train_bpe_tokenizer(texts, vocab_size=700))
