"""The pocket world's models with random weights."""

from pathlib import Path

import pytest

from pocket.catalogue import MODELS


def save_untrained_world(folder: Path) -> Path:
    """Write tiny weights in the layout of the pocket world's folder; LoRAs in their formats, one for the wrong base."""
    from pocket.untrained import save_checkpoint, save_lora

    for number, model in enumerate(MODELS):
        if model.defect in ("nsfw", "missing_file"):
            continue
        if model.base is None:
            save_checkpoint(folder / model.uri, base_model=model.base_model, seed=number)
        else:
            real_base = "SDXL 1.0" if model.defect == "wrong_base" else model.base_model
            save_lora(folder / model.uri, base_model=real_base, seed=number, format=model.format)
    return folder


@pytest.fixture(scope="session")
def untrained_world(tmp_path_factory) -> Path:
    """A folder as `pocket.world.build` makes it, without its catalogue. Shared: copy it before changing a file."""
    return save_untrained_world(tmp_path_factory.mktemp("untrained_world"))
