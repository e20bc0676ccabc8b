"""Train the general SDXL-class model: the SD 1.5-class one, taught to listen to a second text encoder.

As in SDXL the first text encoder is that of SD 1.5, frozen; the second one is trained with the denoiser, which starts
from the SD 1.5-class denoiser's weights wherever both have the same layer.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pocket.tokenizer import clip_tokenizer
from pocket.train.denoiser import (
    DROP_PROMPT,
    TEXT_WIDTH,
    new_scheduler,
    new_text_encoder,
    new_unet,
    noisy_latents,
    tokenize,
)
from pocket.train.fitting import fit
from pocket.train.pictures import Pictures
from pocket.train.text import TIME_IDS

SECOND_WIDTH = 64
_TIME_WIDTH = 8


def train(folder: Path, base: Path, pictures: Pictures, latents: Tensor, *, steps: int, batch_size: int = 32) -> None:
    """Train and save `unet`, `text_encoder_2`, `tokenizer` and `scheduler`.

    Args:
        folder: Of this stage.
        base: Folder of the SD 1.5-class stage.
        pictures: Training set.
        latents: Of the pictures.
        steps: In all.
        batch_size: Pictures a step.
    """
    torch.manual_seed(1)
    first = CLIPTextModel.from_pretrained(base / "text_encoder").requires_grad_(False)
    second = new_text_encoder(CLIPTextModelWithProjection, SECOND_WIDTH, layers=3)
    unet = new_unet_xl(UNet2DConditionModel.from_pretrained(base / "unet"))
    noise = new_scheduler()
    token_ids = tokenize(pictures.captions)
    time_ids = torch.tensor(TIME_IDS).expand(batch_size, -1)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        ids = token_ids[rows]
        with torch.no_grad():
            from_first = first(ids, output_hidden_states=True).hidden_states[-2]
        output = second(ids, output_hidden_states=True)
        # an empty prompt is nothing but zeros: `force_zeros_for_empty_prompt`
        heard = (torch.rand(batch_size, generator=generator) >= DROP_PROMPT).float()
        text = torch.cat([from_first, output.hidden_states[-2]], -1) * heard.view(-1, 1, 1)
        added = {"text_embeds": output.text_embeds * heard[:, None], "time_ids": time_ids}
        noisy, levels, velocity = noisy_latents(noise, latents[rows].float(), generator)
        return F.mse_loss(unet(noisy, levels, text, added_cond_kwargs=added).sample, velocity)

    fit(
        [unet, second], step_loss, steps=steps, folder=folder, learning_rate=1e-3, decay_share=0.7, weight_decay=1e-3,
        ema=0.998, seed=22,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    second.save_pretrained(folder / "text_encoder_2")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    noise.save_pretrained(folder / "scheduler")


def new_unet_xl(base: Any) -> UNet2DConditionModel:
    """An SDXL denoiser that draws what an SD 1.5 one does until it is trained."""
    unet = new_unet(
        cross_attention_dim=TEXT_WIDTH + SECOND_WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_WIDTH, projection_class_embeddings_input_dim=6 * _TIME_WIDTH + SECOND_WIDTH,
    )  # fmt: skip
    old = base.state_dict()
    state = unet.state_dict()
    for name, value in state.items():
        if name not in old:  # only the added embedding is new; its last layer starts at nothing
            state[name] = torch.zeros_like(value) if "linear_2" in name else value
        elif old[name].shape == value.shape:
            state[name] = old[name]
        elif old[name].ndim == 4:  # a 1 x 1 convolution became linear
            state[name] = old[name].flatten(1)
        else:  # keys and values of the second text encoder
            state[name] = F.pad(old[name], (0, value.shape[1] - old[name].shape[1]))
    unet.load_state_dict(state)
    return unet
