"""LoRAs in and out of a pipeline, beside diffusers' own loading."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pocket.untrained import pipeline, save_lora
from rollouts.loras import LoraSlot, read_lora
from rollouts.requests import RenderError

PARTS = {"SD 1.5": ("unet", "text_encoder"), "SDXL 1.0": ("unet", "text_encoder", "text_encoder_2")}


def outputs(pipe):
    """What the denoiser and the text encoder answer."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    pooled = {"text_embeds": torch.randn(1, 48, generator=generator)}
    with torch.no_grad():
        latents, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.arange(77)[None]
        embedded = [
            getattr(pipe, part)(tokens)[0] for part in ("text_encoder", "text_encoder_2") if hasattr(pipe, part)
        ]
        context = torch.randn(1, 77, pipe.unet.config.cross_attention_dim, generator=generator)
        return [pipe.unet(latents, 500, context, added_cond_kwargs=sizes | pooled).sample, *embedded]


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def by_diffusers(path, base_model, weight):
    pipe = pipeline(base_model)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a")
    pipe.set_adapters("a", weight)
    return outputs(pipe)


@pytest.fixture
def files(tmp_path):
    """Function of a base model: two LoRAs that differ in format, rank and alpha, but not in the layers they change."""

    def make(base_model, text_encoder=True):
        options = {"base_model": base_model, "text_encoder": text_encoder}
        return [
            save_lora(tmp_path / "a.safetensors", seed=1, rank=4, format="diffusers", **options),
            save_lora(tmp_path / "b.safetensors", seed=2, rank=8, format="kohya", **options),
        ]

    return make


@pytest.mark.parametrize("base_model", PARTS)
def test_loras_act_as_in_diffusers_one_after_another_and_leave_no_trace(files, base_model):
    pipe = pipeline(base_model)
    for part in PARTS[base_model]:
        getattr(pipe, part).requires_grad_(False)
    untouched = outputs(pipe)
    slot, made = LoraSlot(pipe), files(base_model)
    for path, weight in zip([*made, *made], (0.8, 0.5, 1.0, -0.3), strict=True):
        slot.use(read_lora(pipe, path, name=path.stem), weight)
        assert slot.name == path.stem
        expected = by_diffusers(path, base_model, weight)
        for found, other, plain in zip(outputs(pipe), expected, untouched, strict=True):
            torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)
            assert (found - plain).abs().max() > 1e-2
        slot.disable()
        assert slot.name == "" and equal(outputs(pipe), untouched)
    slot.clear()
    assert equal(outputs(pipe), untouched)
    assert not any("lora" in name for part in PARTS[base_model] for name, _ in getattr(pipe, part).named_modules())


def test_a_lora_in_place_of_another_has_exactly_the_numbers_that_loading_it_would_give(files):
    (first, second), slots = files("SD 1.5"), []
    for paths in ((first, second), (second,)):
        pipe = pipeline()
        slots.append(LoraSlot(pipe))
        for path in paths:
            slots[-1].use(read_lora(pipe, path, name=path.stem), 0.7)
    exchanged, loaded = ([(n, p.detach()) for n, p in s.pipeline.unet.named_parameters()] for s in slots)
    assert [name for name, _ in exchanged] == [name for name, _ in loaded]
    assert equal([value for _, value in exchanged], [value for _, value in loaded])
    assert equal(outputs(slots[0].pipeline), outputs(slots[1].pipeline))


def test_the_weight_can_be_changed(files):
    path = files("SD 1.5")[1]
    pipe = pipeline()
    slot = LoraSlot(pipe)
    slot.set_weight(0.3)  # there is nothing to change
    lora = read_lora(pipe, path, name="b")
    slot.use(lora, 1.0)
    slot.set_weight(0.3)
    assert equal(outputs(pipe), by_diffusers(path, "SD 1.5", 0.3))


def test_a_lora_for_other_layers_takes_the_place_too(files, tmp_path):
    pipe = pipeline()
    slot = LoraSlot(pipe)
    for path in files("SD 1.5"):
        slot.use(read_lora(pipe, path, name="both"), 1.0)
    path = save_lora(tmp_path / "denoiser.safetensors", seed=3, text_encoder=False)
    slot.use(read_lora(pipe, path, name="denoiser"), 1.0)
    assert equal(outputs(pipe), by_diffusers(path, "SD 1.5", 1.0))


def test_the_file_of_peft_says_more_than_its_weights(tmp_path, files):
    """What diffusers itself saves has PEFT's configuration in its header; alpha is only there."""
    pipe = pipeline()
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=1, target_modules=["to_q"], init_lora_weights="gaussian"))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet), weight_name="peft.safetensors",
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    expected = outputs(pipe)[0]
    fresh = pipeline()
    slot = LoraSlot(fresh)
    for path in (files("SD 1.5")[0], tmp_path / "peft.safetensors"):
        slot.use(read_lora(fresh, path, name=path.stem), 1.0)
    torch.testing.assert_close(outputs(fresh)[0], expected, atol=1e-5, rtol=1e-5)


def refused(pipe, path, reason, match):
    before = outputs(pipe)
    with pytest.raises(RenderError, match=match) as caught:
        read_lora(pipe, path, name="Ink")
    assert caught.value.failure.reason == reason and caught.value.failure.message.startswith("Ink: ")
    assert equal(outputs(pipe), before)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_loras_for_another_architecture_are_refused_and_nothing_is_changed(tmp_path, format):
    path = save_lora(tmp_path / "xl.safetensors", base_model="SDXL 1.0", format=format)
    refused(pipeline(), path, "wrong_architecture", "does not fit|not there or of other sizes")
    path = save_lora(tmp_path / "sd.safetensors", format=format)
    refused(pipeline("SDXL 1.0"), path, "wrong_architecture", "not there or of other sizes, such as unet")
    path = save_lora(tmp_path / "wide.safetensors", width=32, format=format)
    refused(pipeline(), path, "wrong_architecture", r"which is \(32, 32\) in it and \(16, 16\) here")


def test_files_without_anything_that_fits_are_refused(tmp_path):
    save_file({"model.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    refused(pipeline(), tmp_path / "a.safetensors", "wrong_architecture", "not there or of other sizes")
    save_file({}, tmp_path / "b.safetensors")
    refused(pipeline(), tmp_path / "b.safetensors", "wrong_architecture", "0 of its 0 layers|does not fit")
    (tmp_path / "c.safetensors").write_bytes(b"junk")
    refused(pipeline(), tmp_path / "c.safetensors", "corrupt", "no safetensors file")


@pytest.mark.parametrize(
    ("key", "kind"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA")]
)  # fmt: skip
def test_kinds_that_diffusers_would_apply_in_part_are_refused(tmp_path, files, key, kind):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(load_file(files("SD 1.5")[1]) | {f"{layer}.{key}": torch.zeros(4, 4)}, tmp_path / "c.safetensors")
    refused(pipeline(), tmp_path / "c.safetensors", "error", f"is a {kind}, which diffusers can't apply in full")


@pytest.mark.parametrize(
    ("text_encoder", "said"), [(False, "No LoRA keys associated to CLIPTextModel"), (True, "LOAD REPORT")]
)
def test_loading_says_nothing_that_is_harmless(files, caplog, capfd, text_encoder, said):
    path = files("SDXL 1.0", text_encoder=text_encoder)[1]
    pipe = pipeline("SDXL 1.0")
    LoraSlot(pipe).use(read_lora(pipe, path, name="b"), 1.0)
    assert caplog.text == "" and "Loading weights" not in capfd.readouterr().err
    by_diffusers(path, "SDXL 1.0", 1.0)
    assert said in caplog.text
