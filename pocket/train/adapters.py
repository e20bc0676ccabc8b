"""Fine-tune a general model, as a whole or with a LoRA; LoRAs are written as people publish them, in two formats."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.train.denoiser import noisy_latents
from pocket.train.fitting import fit
from pocket.train.latents import Latents, encode_all
from pocket.train.recipes import Recipe, draw_for
from pocket.train.text import TextConditions

BATCH = 16
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out")


def train(folder: Path, pipeline: Any, latents: Latents, recipe: Recipe) -> None:
    """Train the denoiser of a pipeline, or a LoRA for it.

    A LoRA is saved as `lora.safetensors` in diffusers' format, and the pipeline is left as it was; a whole denoiser as
    the folder `unet`, and the pipeline has it.

    Args:
        folder: Of this stage.
        pipeline: The general model.
        latents: Of the autoencoder.
        recipe: What it learns.
    """
    pictures = draw_for(recipe)
    encoded = encode_all(latents, pictures)
    conditions = TextConditions(pipeline, pictures.captions)
    unet = pipeline.unet.requires_grad_(recipe.rank == 0)
    if recipe.rank:
        torch.manual_seed(recipe.seed)
        targets = [*_ATTENTION, *(_CONVOLUTIONS if recipe.layers == "all" else ())]
        unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=targets))

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(encoded), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < recipe.drop_prompt
        noisy, levels, velocity = noisy_latents(pipeline.scheduler, encoded[rows].float(), generator)
        if recipe.guidance != 1:
            velocity = velocity + (recipe.guidance - 1) * _guidance(unet, noisy, levels, conditions, rows, dropped)
        return F.mse_loss(unet(noisy, levels, **conditions.rows(rows, dropped)).sample, velocity)

    fit(
        [unet], step_loss, steps=recipe.steps, folder=folder, learning_rate=recipe.learning_rate, warmup=10,
        decay_share=0.6, weight_decay=0.0, seed=recipe.seed,
    )  # fmt: skip
    if recipe.rank == 0:
        unet.save_pretrained(folder / "unet")
        return
    save_file(lora_state(unet), folder / "lora.safetensors")
    unet.unload_lora()


@torch.no_grad()
def _guidance(
    unet: Any, noisy: Tensor, levels: Tensor, conditions: TextConditions, rows: Tensor, dropped: Tensor
) -> Tensor:
    """What the general model's guidance adds per unit of scale; nothing where the prompt is dropped."""
    unet.disable_adapters()
    both = [unet(noisy, levels, **conditions.rows(rows, empty)).sample for empty in (False, True)]
    unet.enable_adapters()
    return (both[0] - both[1]) * ~dropped.view(-1, 1, 1, 1)


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The adapter of a denoiser as diffusers writes it: `unet.<layer>.lora_A.weight`, `…lora_B.weight`."""
    state = {}
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            state["unet." + name.replace(".default.", ".")] = parameter.detach().clone().contiguous()
    return state


def as_published(state: dict[str, Tensor], format: Literal["diffusers", "kohya"]) -> dict[str, Tensor]:
    """A LoRA of `lora_state` in float16, in one of the two formats (kohya's has an alpha, here the rank)."""
    if format == "diffusers":
        return {name: value.half() for name, value in state.items()}
    published = {}
    for name, value in state.items():
        layer, _, matrix = name.removeprefix("unet.").rpartition(".lora_")
        key = "lora_unet_" + layer.replace(".", "_")
        if matrix == "A.weight":
            published[f"{key}.lora_down.weight"] = value.half()
            published[f"{key}.alpha"] = torch.tensor(float(value.shape[0])).half()
        else:
            published[f"{key}.lora_up.weight"] = value.half()
    return published
