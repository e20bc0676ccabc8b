"""Toy models for tests that draw."""

from pathlib import Path
from typing import NamedTuple

import pytest

from rollouts.catalog import Catalog


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
