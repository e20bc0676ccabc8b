import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import load_scorer
from rewards.checkpoints import CheckpointError, find_checkpoint
from rewards.open_clip_towers import load_towers, open_clip_config


@pytest.fixture
def towers(tiny_clip, tiny_clip_config):
    return load_towers(find_checkpoint(tiny_clip), tiny_clip_config, device=torch.device("cpu"), dtype=torch.float32)


def test_shortened_texts_embed_as_padded_ones(towers, tiny_clip, tiny_clip_config):
    model = open_clip.CLIP(**tiny_clip_config).eval()
    model.load_state_dict(load_file(tiny_clip))
    prompts = ["", "a cat", "an old lighthouse, ink on paper", " ".join(["word"] * 80)]
    pieces = [tuple(towers.tokenize(prompt)[:75]) for prompt in prompts]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts))
    torch.testing.assert_close(towers.embed_texts(pieces), expected, atol=1e-6, rtol=0)


def test_models_are_built_on_the_weights_themselves(towers):
    assert all(not value.is_meta and not value.requires_grad for value in towers.model.parameters())
    assert towers.causal_mask.shape == (77, 77)
    assert (towers.max_tokens, towers.image_size) == (75, 32)


def test_the_tokenizers_memory_is_bounded(towers):
    towers.tokenizer.cache |= {f"w{i}": "x" for i in range(100_001)}
    assert towers.tokenize("a cat") == [320, 2368]
    assert len(towers.tokenizer.cache) < 10


def test_a_configuration_by_name_mapping_or_file(tmp_path, tiny_clip_config):
    assert open_clip_config("ViT-H-14")["vision_cfg"]["head_width"] == 80
    (tmp_path / "hub.json").write_text(json.dumps({"model_cfg": tiny_clip_config, "preprocess_cfg": {}}))
    assert open_clip_config(tmp_path / "hub.json") == open_clip_config(tiny_clip_config) == tiny_clip_config


def test_a_configuration_that_is_none_says_so(tiny_clip):
    for config, message in (({"embed_dim": 3}, "no open_clip model configuration"), ("ViT-Z", "no architecture ViT-Z")):
        with pytest.raises(CheckpointError, match=message):
            load_towers(find_checkpoint(tiny_clip), config, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_bfloat16_stays_close(tmp_path, tiny_clip_config, randomize, make_picture, kind):
    config = dict(tiny_clip_config)
    if kind == "resnet":
        config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in randomize(open_clip.CLIP(**config)).state_dict().items()}, path)
    prompts, images = ["a cat", "seven", "!", "a red house"] * 4, [make_picture(seed=i) for i in range(16)]
    full, low = (
        load_scorer("hps_v2", checkpoint=path, config=config, device="cpu", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    scores = full(prompts, images)
    difference = (low(prompts, images) - scores).abs()
    assert 0 < difference.mean() < 0.05 * scores.std()
    kinds = {name: value.dtype for name, value in low.towers.model.named_parameters()}
    assert kinds["transformer.resblocks.0.attn.in_proj_weight"] == torch.bfloat16
    if kind == "vit":  # rounding happens in the matrices only
        assert kinds["token_embedding.weight"] == kinds["visual.ln_post.weight"] == torch.float32
