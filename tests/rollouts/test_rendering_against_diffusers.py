"""The renderer's pictures against those of pipelines that are used by hand, without our loading code.

Equal to the last bit, since what is computed at once has the same shapes: two pictures, two texts.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.schedulers import Deviation, scheduler_table, time_steps
from rollouts.weights import WeightFolder

# Of a rounding error in torchsde's time, which it corrects; the pipelines used by hand don't silence it.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")

PROMPT, NEGATIVE, SEEDS, STEPS, CFG = "an old lighthouse, ink on paper", "blurry", [3, 7], 3, 6.0
EXACT = [row.sampler for row in scheduler_table().values() if row.deviation == Deviation.EXACT]
WITH_OTHER_NOISE = [row.sampler for row in scheduler_table().values() if row.deviation == Deviation.DISTRIBUTION]


@pytest.fixture(scope="module")
def renderer(toy_world):
    """Ours."""
    return DiffusersRenderer(
        toy_world.catalog,
        WeightFolder(toy_world.folder),
        RenderSettings(resolution_scale=0.125, trigger_words="none"),
    )


@pytest.fixture(scope="module")
def by_hand(toy_world):
    """Function of a base model and whether there is a LoRA: diffusers' pipeline; each is made once."""
    pipelines = {}

    def make(base_model, with_lora):
        if (base_model, with_lora) not in pipelines:
            if base_model == "SD 1.5":
                folder, lora = toy_world.folder / "checkpoints" / "sd_0", "sd_0.safetensors"
                pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
            else:
                folder, lora = toy_world.folder / "checkpoints" / "xl_0", "xl_0.safetensors"
                pipe = StableDiffusionXLPipeline.from_pretrained(folder)
            if with_lora:
                pipe.load_lora_weights(toy_world.folder / "loras", weight_name=lora, adapter_name="ink")
                pipe.set_adapters("ink", 0.8)
            pipe.set_progress_bar_config(disable=True)
            # PyTorch adds up in another order, to the last bit, in layers whose weights could be trained.
            for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
                part and part.requires_grad_(False)
            pipelines[base_model, with_lora] = pipe
        return pipelines[base_model, with_lora]

    return make


def scheduler_by_hand(sampler):
    row = scheduler_table()[sampler]
    cls = getattr(diffusers, row.scheduler)
    if "Beta" in sampler:

        class FromTheFirst(cls):
            """Time steps that repeat at its beginning would else make it begin with the second."""

            def set_timesteps(self, *args, **options):
                super().set_timesteps(*args, **options)
                self.set_begin_index(0)

        cls = FromTheFirst
    options = dict(row.config)
    if row.scheduler == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = SEEDS
    return cls(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    ), row.time_steps  # fmt: skip


def draw_by_hand(pipe, sampler, negative=NEGATIVE):
    pipe.scheduler, explicit = scheduler_by_hand(sampler)
    steps = {"timesteps": time_steps(explicit, STEPS)} if explicit else {"num_inference_steps": STEPS}
    images = pipe(
        [PROMPT] * 2, negative_prompt=None if negative is None else [negative] * 2, width=64,
        height=64, guidance_scale=CFG, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **steps,
    ).images  # fmt: skip
    return [np.asarray(image).astype(int) for image in images]


def draw(renderer, model, sampler, negative=NEGATIVE):
    information = {"model": model} | {"sampling method": sampler, "sampling steps": STEPS, "cfg scale": CFG}
    call = renderer.catalog.reconstruct(model, information)
    requests = [RenderRequest(call, PROMPT, negative, seed) for seed in SEEDS]
    results = renderer.render([resolve(request, renderer.catalog, renderer.settings) for request in requests])
    assert [result.failure for result in results] == [None] * 2
    return [np.asarray(result.image).astype(int) for result in results]


def worst(found, expected):
    """Largest difference in grey levels."""
    return max(np.abs(one - other).max() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("with_lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("base_model", ["SD 1.5", "SDXL 1.0"])
@pytest.mark.parametrize("sampler", EXACT)
def test_exact_rows(renderer, by_hand, toy_world, sampler, base_model, with_lora):
    checkpoint, lora = {
        "SD 1.5": (toy_world.sd, toy_world.kohya_lora),
        "SDXL 1.0": (toy_world.sdxl, toy_world.sdxl_lora),
    }[base_model]
    found = draw(renderer, lora if with_lora else checkpoint, sampler)
    assert worst(found, draw_by_hand(by_hand(base_model, with_lora), sampler)) == 0


@pytest.mark.parametrize("base_model", ["SD 1.5", "SDXL 1.0"])
@pytest.mark.parametrize("sampler", WITH_OTHER_NOISE)
def test_rows_with_noise_of_their_own(renderer, by_hand, toy_world, sampler, base_model):
    if scheduler_table()[sampler].seeded:
        pytest.importorskip("torchsde")
    found = draw(renderer, toy_world.sd if base_model == "SD 1.5" else toy_world.sdxl, sampler)
    assert worst(found, draw_by_hand(by_hand(base_model, False), sampler)) == 0


def test_sdxl_without_a_negative_prompt(renderer, by_hand, toy_world):
    found = draw(renderer, toy_world.sdxl, "Euler", negative="")
    assert worst(found, draw_by_hand(by_hand("SDXL 1.0", False), "Euler", negative=None)) == 0


def test_another_model_sampler_seed_prompt_or_a_lora_would_be_noticed(renderer, by_hand, toy_world):
    plain = by_hand("SD 1.5", False)
    expected = draw_by_hand(plain, "Euler")
    assert worst(draw(renderer, toy_world.other_sd, "Euler"), expected) > 30
    assert worst(draw(renderer, toy_world.sd, "Heun"), expected) > 1
    assert worst(draw(renderer, toy_world.sd, "Euler", negative="oil"), expected) > 1
    assert worst(draw(renderer, toy_world.sd, "Euler")[::-1], expected) > 30
    assert worst(draw_by_hand(by_hand("SD 1.5", True), "Euler"), expected) > 5
