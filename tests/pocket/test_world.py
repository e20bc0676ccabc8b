"""From a training folder to what is shipped, and from there to a folder of models: with random weights."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from pocket.catalogue import BY_SLUG, MODELS, usable_models
from pocket.judge import Judge, new_model
from pocket.train import autoencoder, clip, image_reward
from pocket.train.adapters import lora_state
from pocket.train.denoiser import new_text_encoder, new_unet
from pocket.train.denoiser_xl import SECOND_WIDTH, new_unet_xl
from pocket.train.publishing import publish
from pocket.train.recipes import RECIPES
from pocket.world import GENERAL, NATIVE_SIDE, WorldError, build, merged
from rewards import load_scorer
from rollouts.catalog import Catalog
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.weights import WeightFolder

SETTINGS = RenderSettings(native_side=NATIVE_SIDE, batch_size=4)


def untrained_run(folder):
    """What `python -m pocket.train` leaves, with random weights."""
    import open_clip
    from peft import LoraConfig
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    autoencoder.new_autoencoder().save_pretrained(folder / "vae")
    new_unet().save_pretrained(folder / "general" / "pocket_diffusion" / "unet")
    new_text_encoder().save_pretrained(folder / "base" / "text_encoder")
    second = new_text_encoder(CLIPTextModelWithProjection, SECOND_WIDTH, 3)
    second.save_pretrained(folder / "xl" / "text_encoder_2")
    new_unet_xl(new_unet()).save_pretrained(folder / "general" / "pocket_xl" / "unet")
    for name in ("clip", "hps"):
        (folder / name).mkdir()
        clip.save(open_clip.CLIP(**clip.CONFIG), folder / name)
    image_reward.Texts(folder / "image_reward")
    image_reward.save(image_reward.new_model(), folder / "image_reward")
    judge = new_model()
    judge.config.drawn_sharpness = [20.0] * 6
    judge.save_pretrained(folder / "judge")
    states = {}
    for base_model, unet in (("SD 1.5", new_unet()), ("SDXL 1.0", new_unet_xl(new_unet()))):
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_v", "to_out.0"]))
        states[base_model] = lora_state(unet)
    for slug in RECIPES:
        (folder / "adapters" / slug).mkdir(parents=True)
        save_file(states[BY_SLUG[slug].base_model], folder / "adapters" / slug / "lora.safetensors")
        (folder / "adapters" / slug / "done.json").write_text('{"judge/quality": 0.5}')
    for stage in ("base", "xl", "vae/decoder", "clip", "hps", "image_reward", "judge", "general/pocket_xl"):
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "metrics.jsonl").write_text('{"step": 7, "seconds": 90, "loss": 0.25}\n')
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def weights(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("shipped") / "weights"
    publish(run, output)
    return output


@pytest.fixture(scope="module")
def world(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    build(folder, weights=weights)
    return folder


def test_what_is_shipped_is_in_float16_and_listed_with_its_digests(weights):
    import hashlib

    listed = json.loads((weights / "weights.json").read_text())
    files = sorted(weights.rglob("*.safetensors"))
    assert sorted(listed["files"]) == sorted(str(path.relative_to(weights)) for path in files)
    assert listed["bytes"] == sum(path.stat().st_size for path in files) < 15_000_000
    for path in files:
        assert (
            listed["files"][str(path.relative_to(weights))]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        )
        dtypes = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
        assert dtypes == {torch.float16}, path


def test_every_folder_has_a_card_that_says_what_was_reached(weights):
    for folder in ("pocket_diffusion", "pocket_xl", "clip", "hps", "image_reward", "judge"):
        assert "0.25" in (weights / folder / "README.md").read_text()
    table = (weights / "adapters" / "README.md").read_text()
    assert all(f"| {slug}.safetensors | {BY_SLUG[slug].catalog_name} |" in table for slug in RECIPES)


def test_weights_that_are_too_large_are_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pocket.train.publishing.LIMIT", 1_000_000)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "kept").touch()
    with pytest.raises(ValueError, match="more than 1,000,000"):
        publish(run, tmp_path / "weights")
    assert (tmp_path / "weights" / "kept").exists()


def test_the_catalogue_lists_all_models_but_the_withheld_one(world):
    catalog = Catalog.load(world / "catalog.jsonl")
    assert list(catalog) == [model.catalog_name for model in MODELS if model.defect != "nsfw"]
    folder = WeightFolder(world)
    for model in usable_models():
        assert folder.find(catalog[model.catalog_name]) == world / model.uri  # digests are compared


def test_checkpoints_open_in_stock_diffusers_without_our_code(world):
    code = """
import sys, torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
world = sys.argv[1]
for slug, cls in (("pixel_wave", StableDiffusionPipeline), ("pocket_xl", StableDiffusionXLPipeline)):
    pipeline = cls.from_pretrained(f"{world}/checkpoints/{slug}", torch_dtype=torch.float32)
    if slug == "pocket_xl":
        pipeline.load_lora_weights(f"{world}/loras/xl_aqua.safetensors")
    images = pipeline("a red cat", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
assert not any(name.split(".")[0] in ("pocket", "rewards", "rollouts", "align") for name in sys.modules)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code, str(world)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_renderer_draws_every_usable_model_and_says_why_it_cannot_draw_others(world):
    catalog = Catalog.load(world / "catalog.jsonl")
    renderer = DiffusersRenderer(catalog, WeightFolder(world), SETTINGS, device="cpu")
    calls = [entry.default_call().model_copy(update={"sampling_steps": 2}) for entry in catalog.values()]
    jobs = [resolve(RenderRequest(call, "a red cat", seed=1), catalog, SETTINGS) for call in calls]
    results = dict(zip(catalog, renderer.render(jobs), strict=True))
    for model in MODELS:
        if model.defect == "nsfw":
            continue
        result = results[model.catalog_name]
        if model.defect:
            expected = {"missing_file": "missing_file", "wrong_base": "wrong_architecture"}[model.defect]
            assert result.failure is not None and result.failure.reason == expected, model.slug
        else:
            assert result.failure is None, (model.slug, result.failure)
            assert result.image.size == (64, 64)


def test_merging_equals_what_diffusers_fuses(weights, world):
    general, changed = world / "checkpoints" / GENERAL["SD 1.5"], world / "checkpoints" / "crisp_shapes"
    pipeline = StableDiffusionPipeline.from_pretrained(general, torch_dtype=torch.float32)
    pipeline.load_lora_weights(weights / "adapters" / "crisp_shapes.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours = StableDiffusionPipeline.from_pretrained(changed, torch_dtype=torch.float32).unet.state_dict()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=2e-3)  # ours is rounded to float16


def test_a_change_for_another_model_is_refused():
    with pytest.raises(WorldError, match="no layer nowhere"):
        merged({"here.weight": torch.zeros(2, 2)}, {"unet.nowhere.lora_A.weight": torch.zeros(1, 2)})


def test_scorers_load_from_their_folders(weights):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    from PIL import Image

    for name, folder in (("clip_score", "clip"), ("hps_v2", "hps"), ("image_reward", "image_reward")):
        scores = load_scorer(name, checkpoint=weights / folder)(["a red cat"], [Image.fromarray(image)])
        assert scores.shape == (1,) and torch.isfinite(scores).all()
    assert Judge.load(weights / "judge").predict(image[None]).shape == (1, 4)


def test_a_world_is_built_once(world, weights):
    catalog = world / "catalog.jsonl"
    before = catalog.stat().st_mtime_ns
    build(world, weights=weights)
    assert catalog.stat().st_mtime_ns == before


def test_other_weights_build_it_again(world, weights, tmp_path):
    other, folder = tmp_path / "weights", tmp_path / "world"
    shutil.copytree(weights, other)
    shutil.copytree(world, folder)
    state = load_file(other / "adapters" / "pixel_wave.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, other / "adapters" / "pixel_wave.safetensors")
    before = Catalog.load(folder / "catalog.jsonl")
    after = build(folder, weights=other)
    changed = {name for name in before if before[name].files != after[name].files}
    assert changed == {BY_SLUG["pixel_wave"].catalog_name}
    assert WeightFolder(folder).find(after[BY_SLUG["pixel_wave"].catalog_name])


@pytest.mark.parametrize("content", ["somebody.txt", "catalog.jsonl"])
def test_somebody_elses_folder_is_left_alone(weights, tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(WorldError, match="not empty and no pocket world"):
        build(tmp_path, weights=weights)
    assert (tmp_path / content).read_text() == "mine"


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WorldError, match="no folder `adapters`"):
        build(tmp_path / "world", weights=tmp_path)


def test_xl_shares_what_sdxl_shares(world):
    xl = StableDiffusionXLPipeline.from_pretrained(world / "checkpoints" / "pocket_xl", torch_dtype=torch.float32)
    sd = StableDiffusionPipeline.from_pretrained(world / "checkpoints" / "pocket_diffusion", torch_dtype=torch.float32)
    for part in ("text_encoder", "vae"):
        theirs = getattr(sd, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(xl, part).state_dict().items())
    assert xl.config.force_zeros_for_empty_prompt
