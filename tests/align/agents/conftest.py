"""A policy that has learned some calls by heart, and agents that use it."""

import pytest

from align.agents import BaseAgent, DiffAgent
from align.chat_dialogue import ChatDialogue, ChatFormat
from align.scratch import train_bpe_tokenizer
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.costs import CPU, CostModel
from rollouts.dialogue import Dialogue
from rollouts.policy import load_policy, load_tokenizer

LEARNED = {
    "a fox in pixel art": "Pixel Wave - v10",
    "a watercolour of a lake": "水彩 - v1",
    "a quoted house": 'Quote "Q" {x} - v2',
    "letters": "שלום - v2",
}
"""What the policy was taught: prompt -> model."""


@pytest.fixture(scope="session")
def shop(awkward_catalog) -> Catalog:
    """The awkward catalogue with licences, LoRAs, files, and a model for adults."""
    entries = []
    for number, entry in enumerate(awkward_catalog.values()):
        change = {
            "license": {"allow_commercial_use": '"None"' if number % 2 else '["Image", "Sell"]'},
            "stats": {"downloads": 1000.0 - number},
            "files": [{"uri": f"https://example.org/models/file-{number}.safetensors", "format": "SafeTensor",
                       "sha256": f"{number:064X}"}],
            "nsfw": entry.name == "512",
        }  # fmt: skip
        if entry.name == "水彩 - v1":
            change |= {"type": "LoRA", "base_checkpoint": "Pixel Wave - v1", "lora_weight": 0.8,
                       "trigger_words": ["wet paint"]}  # fmt: skip
        entries.append(CatalogEntry.model_validate(entry.model_dump(by_alias=True) | change))
    return Catalog(entries)


@pytest.fixture(scope="session")
def dialogue(shop) -> Dialogue:
    """Of the policy."""
    texts = [entry.default_call().to_json() for entry in shop.values()] * 2
    return Dialogue(train_bpe_tokenizer([*texts, *LEARNED], vocab_size=700))


@pytest.fixture(scope="session")
def policy(dialogue, shop, taught):
    """Answers LEARNED as it was taught."""
    return taught(dialogue, [(prompt, shop[name].default_call().to_json()) for prompt, name in LEARNED.items()])


@pytest.fixture
def agent_of(policy, dialogue, shop):
    """`agent_of(**options)`: an agent with the learned policy."""

    def make(catalog: Catalog = shop, **options) -> DiffAgent:
        return DiffAgent(policy, dialogue, catalog, **({"costs": CostModel(CPU)} | options))

    return make


@pytest.fixture
def agent_folder(policy, dialogue, shop, tmp_path):
    """A policy's folder with the catalogue beside it, as commands take them."""
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    dialogue.tokenizer.save_pretrained(folder)
    dialogue.form.save(folder)
    shop.save(tmp_path / "catalog.jsonl")
    return folder


@pytest.fixture(scope="module")
def base(chat_policy, chat_bench) -> BaseAgent:
    """An untrained Base, on the catalogue of `chat_bench`."""
    policy = load_policy(str(chat_policy), dtype="float32").eval()
    dialogue = ChatDialogue(load_tokenizer(str(chat_policy)), ChatFormat.load(chat_policy))
    return BaseAgent(policy, dialogue, Catalog.load(chat_bench / "catalog.jsonl"), max_plan_tokens=20)
