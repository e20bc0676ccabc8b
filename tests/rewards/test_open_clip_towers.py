import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

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
