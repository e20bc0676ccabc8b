"""Both halves against the libraries that BLIP was taken from: timm's ViT and transformers' BLIP text model."""

import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.blip import TextConfig, TextEncoder, VisionConfig, VisionTransformer, pick_fields


def test_the_vision_encoder_is_timms(randomize):
    ours = randomize(VisionTransformer(VisionConfig(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4)))
    timm = TimmViT(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, num_classes=0, global_pool="")
    timm.load_state_dict(ours.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), timm.eval()(pixels), atol=1e-5, rtol=0)


def test_the_text_encoder_is_blips(randomize):
    config = TextConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, vocab_size=50,
        max_position_embeddings=20,
    )  # fmt: skip
    ours = randomize(TextEncoder(config, image_width=24))
    peer = BlipTextModel(
        BlipTextConfig(**vars(config), encoder_hidden_size=24, hidden_act="gelu", attn_implementation="eager"),
        add_pooling_layer=False,
    ).eval()
    peer.load_state_dict(ours.state_dict(), strict=False)
    assert set(peer.state_dict()) <= set(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(50, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1, 1, 0, 0, 0, 0, 0]])
    images = torch.randn(3, 5, 24, generator=generator)
    with torch.no_grad():
        expected = peer(
            input_ids=input_ids, attention_mask=mask, encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(3, 5, dtype=torch.long), is_decoder=False,
        ).last_hidden_state[:, 0]  # fmt: skip
        torch.testing.assert_close(ours(input_ids, mask.bool(), images, None), expected, atol=1e-5, rtol=0)
        row_of = torch.tensor([2, 0, 0])
        expected = ours(input_ids, mask.bool(), images[row_of], None)
        torch.testing.assert_close(ours(input_ids, mask.bool(), images, row_of), expected, atol=1e-6, rtol=0)


def test_a_whole_bert_configuration_is_understood():
    config = pick_fields(TextConfig, {"hidden_size": 8, "architectures": ["BertModel"], "encoder_width": 768})
    assert config == TextConfig(hidden_size=8)
    assert VisionConfig().num_tokens == 197
