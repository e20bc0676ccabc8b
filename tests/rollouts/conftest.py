"""Toy models for tests that draw."""

from pathlib import Path
from typing import NamedTuple

import pytest

from rollouts.catalog import Catalog, CatalogEntry


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
