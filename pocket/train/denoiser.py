"""Train the general SD 1.5-class model: denoiser and text encoder together, from nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from pocket.tokenizer import CONTEXT_LENGTH, clip_tokenizer
from pocket.train.fitting import fit
from pocket.train.latents import CELLS, CHANNELS
from pocket.train.pictures import Pictures

WIDTHS, TEXT_WIDTH = (32, 64, 72), 96
DROP_PROMPT = 0.1
"""Share of prompts that are left empty, for classifier-free guidance."""


def train(folder: Path, pictures: Pictures, latents: Tensor, *, steps: int, batch_size: int = 32) -> None:
    """Train and save `unet`, `text_encoder`, `tokenizer` and `scheduler`."""
    torch.manual_seed(0)
    unet, text_encoder, noise = new_unet(), new_text_encoder(), new_scheduler()
    token_ids, empty = tokenize(pictures.captions), tokenize([""])[0]

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        ids = token_ids[rows]
        ids[torch.rand(batch_size, generator=generator) < DROP_PROMPT] = empty
        noisy, levels, velocity = noisy_latents(noise, latents[rows].float(), generator)
        return F.mse_loss(unet(noisy, levels, text_encoder(ids).last_hidden_state).sample, velocity)

    fit(
        [unet, text_encoder], step_loss, steps=steps, folder=folder, learning_rate=1.5e-3, decay_share=0.5,
        weight_decay=1e-3, ema=0.999, seed=21,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    noise.save_pretrained(folder / "scheduler")


def noisy_latents(noise: DDIMScheduler, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (n, 8, 16, 16) at random noise levels, the levels (n,), and the velocity that is to be predicted.

    Velocity: https://arxiv.org/abs/2202.00512.
    """
    levels = torch.randint(1000, (len(latents),), generator=generator)
    added = torch.randn(latents.shape, generator=generator)
    noisy = noise.add_noise(latents, added, levels)  # ty: ignore[invalid-argument-type]
    velocity = noise.get_velocity(latents, added, levels)  # ty: ignore[invalid-argument-type]
    return noisy, levels, velocity


def new_unet(**options: Any) -> UNet2DConditionModel:
    """A denoiser with random weights; attention at 8 x 8 and 4 x 4 cells."""
    return UNet2DConditionModel(
        **{
            "sample_size": CELLS, "in_channels": CHANNELS, "out_channels": CHANNELS, "layers_per_block": 1,
            "block_out_channels": WIDTHS, "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": 4,
            "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **options,
        }
    )  # fmt: skip


def new_text_encoder(cls: type = CLIPTextModel, width: int = TEXT_WIDTH, layers: int = 2) -> Any:
    """CLIP's text encoder with random weights for the pocket tokenizer."""
    tokenizer = clip_tokenizer()
    return cls(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
            projection_dim=width, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    """The noise schedule; it ends in more noise than Stable Diffusion's, as small latents need."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02,
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def tokenize(captions: Sequence[str]) -> Tensor:
    """(n, CONTEXT_LENGTH) token ids, padded as diffusers does."""
    tokenizer = clip_tokenizer()
    return tokenizer(
        list(captions), padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
