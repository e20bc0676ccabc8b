import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file

from rewards import load_scorer
from rewards.checkpoints import CheckpointError

PROMPTS = ["a cat", "a red square", "noise", "a cat", "text"]


def naive(config, path, prompts, images):
    """open_clip as its README uses it, one pair at a time."""
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(path))
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        with torch.no_grad():
            features = model.encode_image(transform(image)[None]), model.encode_text(tokenizer([prompt]))
        scores.append(torch.cosine_similarity(*features))
    return torch.cat(scores)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_is_the_clipped_cosine_times_two_and_a_half(tiny_clip, tiny_clip_config, make_picture, mode):
    scorer = load_scorer("clip_score", checkpoint=tiny_clip, config=tiny_clip_config, device="cpu")
    images = [make_picture(37 + 11 * i, 60 - 7 * i, i, mode) for i in range(5)]
    cosine = naive(tiny_clip_config, tiny_clip, PROMPTS, images)
    torch.testing.assert_close(scorer(PROMPTS, images), 2.5 * cosine.clamp(min=0), atol=2e-6, rtol=0)


def test_negative_cosines_are_zero(tiny_clip, tiny_clip_config, make_picture):
    scorer = load_scorer("clip_score", checkpoint=tiny_clip, config=tiny_clip_config, device="cpu", weight=1.0)
    prompts = ["cat", "a very long story", "seven", "!", "a blue house", "x y z", "noise", "42"] * 3
    images = [make_picture(seed=i) for i in range(24)]
    scores = scorer(prompts, images)
    cosine = naive(tiny_clip_config, tiny_clip, prompts, images)
    assert (cosine < 0).any() and (cosine > 0).any()
    assert ((scores == 0) == (cosine <= 0)).all()


def test_the_prefix_is_part_of_the_prompt(tiny_clip, tiny_clip_config, make_picture):
    plain = load_scorer("clip_score", checkpoint=tiny_clip, config=tiny_clip_config, device="cpu")
    prefixed = load_scorer(
        "clip_score", checkpoint=tiny_clip, config=tiny_clip_config, device="cpu", prefix="A photo depicts "
    )
    prompts, images = ["cat", "seven", "!", "42"] * 4, [make_picture(seed=i) for i in range(16)]
    scores = prefixed(prompts, images)
    assert torch.equal(scores, plain([f"A photo depicts {prompt}" for prompt in prompts], images))
    assert not torch.equal(scores, plain(prompts, images))


def test_only_clips_own_text_tower_is_taken(tiny_clip, tiny_clip_config):
    config = tiny_clip_config | {"text_cfg": {"hf_model_name": "roberta-base"}}
    with pytest.raises(CheckpointError, match="own text tower"):
        load_scorer("clip_score", checkpoint=tiny_clip, config=config)
    with pytest.raises(CheckpointError, match="no architecture ViT-Z"):
        load_scorer("clip_score", checkpoint=tiny_clip, config="ViT-Z")
