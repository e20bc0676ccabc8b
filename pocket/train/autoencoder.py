"""Train the autoencoder: a decoder for the fixed latents, and an encoder that computes them."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from pocket.train.fitting import finish, fit
from pocket.train.latents import CHANNELS, Latents
from pocket.train.pictures import Pictures, as_pixels

ENCODER_STEPS, DECODER_STEPS, BATCH = 500, 3_000, 16
_NOISE = 0.03  # on latents, as a denoiser's are never exact


def train(folder: Path, pictures: Pictures, latents: Latents, held_out: Pictures) -> None:
    """Train and save an AutoencoderKL in diffusers' layout; `done.json` has its PSNR on held-out drawings."""
    torch.manual_seed(0)
    vae = new_autoencoder()

    def decoder_loss(step: int, generator: torch.Generator) -> Tensor:
        images = pictures.images[torch.randint(len(pictures), (BATCH,), generator=generator).numpy()]
        z = latents.encode(images)
        z = z + _NOISE * torch.randn(z.shape, generator=generator)
        wanted, got = as_pixels(images), vae.decode(z).sample
        # edges count: differences of neighbours, beside the pixels themselves
        edges = sum(F.l1_loss(got.diff(dim=side), wanted.diff(dim=side)) for side in (2, 3))
        return F.l1_loss(got, wanted) + F.mse_loss(got, wanted) + edges

    def encoder_loss(step: int, generator: torch.Generator) -> Tensor:
        images = pictures.images[torch.randint(len(pictures), (BATCH,), generator=generator).numpy()]
        return F.mse_loss(vae.encode(as_pixels(images)).latent_dist.mean, latents.encode(images))

    decoder = [vae.decoder, vae.post_quant_conv]
    fit(
        decoder, decoder_loss, steps=DECODER_STEPS, folder=folder / "decoder", learning_rate=2e-3, decay_share=0.7,
        ema=0.998, seed=31,
    )  # fmt: skip
    fit(
        [vae.encoder, vae.quant_conv], encoder_loss, steps=ENCODER_STEPS, folder=folder / "encoder",
        learning_rate=3e-3, decay_share=0.7, seed=32,
    )  # fmt: skip
    vae.save_pretrained(folder)
    with torch.inference_mode():
        images = held_out.images[:300]
        z = latents.encode(images)
        wanted = as_pixels(images)
        decoded, again = vae.decode(z).sample.clamp(-1, 1), vae.encode(wanted).latent_dist.mean
        finish(
            folder,
            {
                "held_out/psnr_db": round(float(10 * torch.log10(4 / F.mse_loss(decoded, wanted))), 2),
                "held_out/encoder_rmse": round(float(F.mse_loss(again, z).sqrt()), 4),
            },
        )


def new_autoencoder() -> Any:
    """An autoencoder with random weights and no variance; its encoder is small, since nothing is drawn with it."""
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 40), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=8,
        sample_size=64, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip
    # the second half of what the encoder answers are log variances: as good as none
    torch.nn.init.zeros_(vae.quant_conv.weight[CHANNELS:])
    torch.nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -20.0)
    return vae
