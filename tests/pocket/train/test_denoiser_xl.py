"""The SDXL-class denoiser starts as the SD 1.5-class one."""

import torch

from pocket.train.denoiser import CELLS, CHANNELS, TEXT_WIDTH, new_unet
from pocket.train.denoiser_xl import SECOND_WIDTH, new_unet_xl


def test_before_training_it_draws_what_the_other_one_does_whatever_the_second_encoder_says():
    torch.manual_seed(0)
    base = new_unet().eval()
    xl = new_unet_xl(base).eval()
    noisy, levels = torch.randn(2, CHANNELS, CELLS, CELLS), torch.tensor([10, 900])
    text, second = torch.randn(2, 5, TEXT_WIDTH), torch.randn(2, 5, SECOND_WIDTH)
    added = {"text_embeds": torch.randn(2, SECOND_WIDTH), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        expected = base(noisy, levels, text).sample
        found = xl(noisy, levels, torch.cat([text, second], -1), added_cond_kwargs=added).sample
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_it_can_learn_to_listen():
    """The new weights get gradients: zeros in one layer must not hold back those before and after it for good."""
    torch.manual_seed(0)
    xl = new_unet_xl(new_unet())
    added = {"text_embeds": torch.randn(2, SECOND_WIDTH), "time_ids": torch.full((2, 6), 64.0)}
    text = torch.randn(2, 5, TEXT_WIDTH + SECOND_WIDTH)
    xl(torch.randn(2, CHANNELS, CELLS, CELLS), 500, text, added_cond_kwargs=added).sample.square().mean().backward()
    keys = xl.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    assert keys.grad[:, TEXT_WIDTH:].abs().max() > 0
    assert xl.add_embedding.linear_2.weight.grad.abs().max() > 0
