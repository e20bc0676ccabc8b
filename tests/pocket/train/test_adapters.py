"""LoRAs as they are trained, written and read by diffusers; captions as the renderer encodes them."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from pocket.tokenizer import clip_tokenizer
from pocket.train import adapters
from pocket.train.denoiser import new_scheduler, new_text_encoder, new_unet
from pocket.train.fitting import fit
from pocket.train.latents import Latents
from pocket.train.pictures import draw_pictures
from pocket.train.recipes import Recipe
from pocket.train.text import TextConditions
from pocket.world import merged
from rollouts.prompt_encoding import encode_prompts

RECIPE = Recipe(7, ("flat",), steps=3, rank=2, pictures=40, guidance=2.0)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=None, text_encoder=new_text_encoder().eval(), tokenizer=clip_tokenizer(), unet=new_unet().eval(),
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def latents():
    return Latents.fit(draw_pictures(40, 1).images)


@pytest.fixture(scope="module")
def trained(pipeline, latents, tmp_path_factory):
    """The LoRA's file, and what the denoiser answered with it in place before it was taken out."""
    folder = tmp_path_factory.mktemp("lora")
    adapters.train(folder, pipeline, latents, RECIPE)
    return folder / "lora.safetensors"


def answer(unet):
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 4, 96, generator=generator)
    with torch.no_grad():
        return unet(noisy, 300, text).sample


def test_training_leaves_the_general_model_as_it_was(pipeline, trained):
    torch.manual_seed(0)
    # the text encoder is made first, as in the fixture
    new_text_encoder()
    fresh = new_unet().eval()
    assert torch.equal(answer(pipeline.unet), answer(fresh))


def test_every_layer_is_saved_and_stock_diffusers_takes_all_of_them(pipeline, trained):
    state = load_file(trained)
    layers = {key.partition(".lora_")[0] for key in state}
    targets = {
        f"unet.{name}" for name, module in pipeline.unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and any(
            name.endswith(f".{end}") for end in
            ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
             "proj_in", "proj_out")
        )
    }  # fmt: skip
    assert layers == targets and len(state) == 2 * len(targets)
    before = answer(pipeline.unet)
    pipeline.load_lora_weights(trained)
    with_lora = answer(pipeline.unet)
    pipeline.unload_lora_weights()
    assert not torch.allclose(with_lora, before, atol=1e-4)
    # W + up @ down by hand, in a denoiser of its own
    by_hand = new_unet().eval()
    by_hand.load_state_dict(merged(pipeline.unet.state_dict(), state))
    torch.testing.assert_close(answer(by_hand), with_lora, atol=1e-5, rtol=1e-4)


def test_both_formats_say_the_same(pipeline, trained, tmp_path):
    answers = []
    for format in ("diffusers", "kohya"):
        path = tmp_path / f"{format}.safetensors"
        save_file(adapters.as_published(load_file(trained), format), path)
        pipeline.load_lora_weights(path)
        answers.append(answer(pipeline.unet))
        pipeline.unload_lora_weights()
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers[0], answer(pipeline.unet), atol=1e-4)


def test_a_killed_training_goes_on_to_the_same_weights(pipeline, latents, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "fit", lambda *a, **k: fit(*a, **k, save_every=2))
    stopped = []

    def stop_after_two(optimizer_step, *args, **kwargs):
        stopped.append(1)
        if len(stopped) == 3:
            raise KeyboardInterrupt
        return optimizer_step(*args, **kwargs)

    step = torch.optim.AdamW.step
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: stop_after_two(step, self, *a, **k))
        with pytest.raises(KeyboardInterrupt):
            adapters.train(tmp_path, pipeline, latents, RECIPE)
    pipeline.unet.unload_lora()
    adapters.train(tmp_path, pipeline, latents, RECIPE)
    for name, value in load_file(tmp_path / "lora.safetensors").items():
        assert torch.equal(value, load_file(trained)[name]), name


def test_attention_only(pipeline, latents, tmp_path):
    adapters.train(tmp_path, pipeline, latents, replace(RECIPE, layers="attention", steps=1, guidance=1.0))
    assert all("attentions" in key for key in load_file(tmp_path / "lora.safetensors"))


def test_captions_are_heard_as_the_renderer_says_them(pipeline):
    captions = ["a red cat at night", "a blue star, neon glow", "a red cat at night"]
    conditions = TextConditions(pipeline, captions)
    expected = encode_prompts(pipeline, captions[:2], ["", ""])
    rows = conditions.rows(torch.tensor([2, 1, 0]), torch.tensor([False, False, True]))["encoder_hidden_states"]
    torch.testing.assert_close(rows[0], expected.prompt_embeds[0])
    torch.testing.assert_close(rows[1], expected.prompt_embeds[1])
    torch.testing.assert_close(rows[2], expected.negative_prompt_embeds[0])
