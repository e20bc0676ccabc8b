"""The toy models are real ones: diffusers loads and draws with them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from pocket.untrained import (
    pipeline,
    save_catalog,
    save_checkpoint,
    save_config,
    save_lora,
    save_single_file,
)
from rollouts.catalog import Catalog
from rollouts.weights import WeightFolder, weights_sha256

CLASSES = {"SD 1.5": StableDiffusionPipeline, "SDXL 1.0": StableDiffusionXLPipeline}
BASE_MODELS = pytest.mark.parametrize("base_model", CLASSES)


def draw(pipe, prompt="a red fox", seed=0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return 255 * pipe(
        prompt, width=64, height=64, num_inference_steps=5, guidance_scale=6.0, generator=generator, output_type="np"
    ).images[0]  # fmt: skip


def mean_difference(one, other):
    """In grey levels."""
    return np.abs(one - other).mean()


@BASE_MODELS
def test_pictures_differ_by_model_seed_and_prompt_and_use_the_range(base_model):
    first, second = pipeline(base_model, seed=0), pipeline(base_model, seed=1)
    picture = draw(first)
    assert np.isfinite(picture).all() and 15 < picture.std() < 80
    assert ((picture <= 0) | (picture >= 255)).mean() < 0.05
    assert mean_difference(picture, draw(second)) > 10
    assert mean_difference(picture, draw(first, seed=1)) > 10
    assert mean_difference(picture, draw(first, prompt="an old lighthouse")) > 2
    assert mean_difference(picture, draw(pipeline(base_model, seed=0))) == 0


@BASE_MODELS
def test_a_checkpoint_is_what_diffusers_loads(tmp_path, base_model):
    folder = save_checkpoint(tmp_path / "model", base_model=base_model, seed=3)
    loaded = CLASSES[base_model].from_pretrained(folder, local_files_only=True, use_safetensors=True)
    assert mean_difference(draw(loaded), draw(pipeline(base_model, seed=3))) < 0.01


@BASE_MODELS
def test_a_single_file_has_the_weights_of_the_folder(tmp_path, base_model):
    path = save_single_file(tmp_path / "model.safetensors", base_model=base_model, seed=3)
    config = save_config(tmp_path / "config", base_model=base_model)
    assert not list(config.rglob("*.safetensors"))
    loaded = CLASSES[base_model].from_single_file(str(path), config=str(config), local_files_only=True)
    expected = pipeline(base_model, seed=3, full=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(expected, name):
            found = getattr(loaded, name).state_dict()
            assert all(torch.equal(found[key], value) for key, value in getattr(expected, name).state_dict().items())


def test_ballast_is_read_but_not_looked_at(tmp_path):
    sizes = []
    for ballast in (0, 3):
        folder = save_checkpoint(tmp_path / str(ballast), ballast_mb=ballast)
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
    assert abs(sizes[1] - sizes[0] - 3e6) < 1000
    heavy = pipeline(ballast_mb=3)
    assert heavy.text_encoder.get_input_embeddings().num_embeddings > len(heavy.tokenizer)
    assert np.isfinite(draw(heavy)).all()


@BASE_MODELS
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_loras_change_the_picture(tmp_path, base_model, format, text_encoder):
    path = save_lora(
        tmp_path / "lora.safetensors", base_model=base_model, format=format, text_encoder=text_encoder, seed=5, rank=2
    )  # fmt: skip
    pipe = pipeline(base_model)
    before = draw(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    changed = {"unet"} | ({"text_encoder", "text_encoder_2"} & pipe.components.keys() if text_encoder else set())
    assert pipe.get_list_adapters() == {name: ["a"] for name in changed}
    assert mean_difference(draw(pipe), before) > 1


def test_both_formats_of_a_lora_say_the_same(tmp_path):
    kohya = load_file(save_lora(tmp_path / "a.safetensors", format="kohya", seed=1, rank=4))
    plain = load_file(save_lora(tmp_path / "b.safetensors", format="diffusers", seed=1, rank=4))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    key, other = "lora_unet_" + name.replace(".", "_"), f"unet.{name}"
    scaled = kohya[f"{key}.alpha"] / 4 * kohya[f"{key}.lora_up.weight"] @ kohya[f"{key}.lora_down.weight"]
    torch.testing.assert_close(scaled, plain[f"{other}.lora_B.weight"] @ plain[f"{other}.lora_A.weight"])


def test_a_catalogue_lists_what_was_written(tmp_path):
    catalog = save_catalog(tmp_path, sd15=3, sdxl=1, loras=2, sdxl_loras=1, seed=10)
    assert list(Catalog.load(tmp_path / "catalog.jsonl")) == list(catalog)
    kinds = [(entry.type, entry.base_model) for entry in catalog.values()]
    assert kinds.count(("Checkpoint", "SD 1.5")) == 3 and kinds.count(("LoRA", "SDXL 1.0")) == 1
    weights = WeightFolder(tmp_path)
    for entry in catalog.values():
        assert weights.find(entry).exists()
        assert catalog.validate(entry.default_call()) == []
    loras = [entry for entry in catalog.values() if entry.type == "LoRA"]
    assert [lora.base_checkpoint for lora in loras] == ["Toy SD 0 - v1", "Toy SD 1 - v1", "Toy XL 0 - v1"]
    assert all(lora.trigger_words and lora.lora_weight for lora in loras)
    assert len({file.sha256 for entry in catalog.values() for file in entry.files}) == len(catalog)


def test_the_same_files_are_written_in_every_process(tmp_path):
    """Tests elsewhere compare pictures between processes."""

    code = f"from pocket.untrained import save_checkpoint; save_checkpoint({str(tmp_path / 'other')!r}, seed=2)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    here = save_checkpoint(tmp_path / "here", seed=2)
    assert weights_sha256(here) == weights_sha256(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (here / "tokenizer" / name).read_text() == (tmp_path / "other" / "tokenizer" / name).read_text()


def test_making_models_leaves_the_random_numbers_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pipeline(seed=7)
    save_lora(tmp_path / "a.safetensors", seed=7)
    assert torch.equal(torch.rand(3), expected)
