import gzip
import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
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


SMALL_VOCABULARY = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>"]
SMALL_SIZE = 256 * 2 + 4 + 2  # bytes, bytes at the end of a word, merges, start and end


def write_merges(path):
    path.write_bytes(gzip.compress("\n".join(SMALL_VOCABULARY).encode()))
    return path


@pytest.fixture
def small_clip(tmp_path, tiny_clip_config, randomize):
    """Folder as open_clip writes it, of a model with few words and short texts, with float16 weights."""
    config = tiny_clip_config | {
        "text_cfg": tiny_clip_config["text_cfg"] | {"vocab_size": SMALL_SIZE, "context_length": 16}
    }
    folder = tmp_path / "small"
    folder.mkdir()
    model = randomize(open_clip.CLIP(**config))
    save_file({name: value.half() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    write_merges(folder / "merges.txt.gz")
    return folder


def stock_cosines(folder, prompts, images, mean, std):
    """open_clip by itself, in float32, one pair at a time."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "merges.txt.gz"), context_length=16)
    transform = open_clip.image_transform(32, is_train=False, mean=mean, std=std)
    with torch.no_grad():
        pairs = [
            (model.encode_image(transform(image)[None]), model.encode_text(tokenizer([prompt])))
            for prompt, image in zip(prompts, images, strict=True)
        ]
    return torch.cat([torch.cosine_similarity(image, text) for image, text in pairs])


WORDS = ["a cat", "dog", "", "cat dog cat", "a long story about a cat and a dog"]


def test_a_folder_of_open_clip_brings_its_configuration_words_and_normalisation(small_clip, make_picture):
    images = [make_picture(32, 32, seed) for seed in range(5)]
    prompts = [prompt or "x" for prompt in WORDS]
    scorer = load_scorer("clip_score", checkpoint=small_clip, device="cpu")
    assert scorer.tokenize("A cat dog") == [ord("a") - ord("!") + 256, 512 + 1, 512 + 3]
    assert scorer.max_tokens == 14
    cosines = stock_cosines(small_clip, prompts, images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.testing.assert_close(scorer(prompts, images), 2.5 * cosines.clamp(min=0), atol=2e-6, rtol=0)
    assert (cosines > 0.01).any()


def test_hps_has_its_own_normalisation_whatever_the_folder_says(small_clip, make_picture):
    images = [make_picture(32, 32, seed) for seed in range(5)]
    prompts = [prompt or "x" for prompt in WORDS]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    scores = load_scorer("hps_v2", checkpoint=small_clip, device="cpu")(prompts, images)
    torch.testing.assert_close(scores, stock_cosines(small_clip, prompts, images, mean, std), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_saved_in_float16_are_computed_as_asked(small_clip, dtype):
    towers = load_scorer("hps_v2", checkpoint=small_clip, device="cpu", dtype=dtype).towers
    kinds = {name: value.dtype for name, value in towers.model.named_parameters()}
    assert kinds["token_embedding.weight"] == torch.float32
    assert kinds["transformer.resblocks.0.mlp.c_fc.weight"] == getattr(torch, dtype)
    assert torch.float16 not in kinds.values()


def test_open_clips_own_file_name_and_a_converted_folder_do_as_well(small_clip, tmp_path, make_picture):
    images = [make_picture(seed=seed) for seed in range(3)]
    expected = load_scorer("hps_v2", checkpoint=small_clip, device="cpu")(WORDS[:2] + ["x"], images)
    (small_clip / "model.safetensors").rename(small_clip / "open_clip_model.safetensors")
    scorer = load_scorer("hps_v2", checkpoint=small_clip, device="cpu")
    assert torch.equal(scorer(WORDS[:2] + ["x"], images), expected)
    config = json.loads((small_clip / "open_clip_config.json").read_text())["model_cfg"]
    (small_clip / "open_clip_config.json").unlink()
    (small_clip / "scorer.json").write_text(json.dumps({"config": config}))
    scorer = load_scorer("hps_v2", checkpoint=small_clip / "open_clip_model.safetensors", device="cpu")
    assert torch.equal(scorer(WORDS[:2] + ["x"], images), expected)


def test_merges_can_be_given(small_clip, tmp_path):
    config = small_clip / "open_clip_config.json"
    with pytest.raises(CheckpointError, match="CLIP's own vocabulary has 49408 tokens, .*vocab_size is 518"):
        load_scorer("hps_v2", checkpoint=small_clip, config=config, device="cpu")
    merges = write_merges(tmp_path / "mine.txt.gz")
    scorer = load_scorer("hps_v2", checkpoint=small_clip, config=config, tokenizer=merges, device="cpu")
    assert scorer.tokenize("dog") == [515]


@pytest.mark.parametrize("given", ["google/bert", 7, "vocabulary.json"])
def test_another_tokenizer_is_refused(small_clip, given):
    with pytest.raises(ValueError, match=r"`tokenizer` of clip_score must be a file of byte-pair merges \(.txt.gz\)"):
        load_scorer("clip_score", checkpoint=small_clip, tokenizer=given)


def test_merges_that_do_not_fit_or_cannot_be_read(small_clip, tmp_path):
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress("\n".join([*SMALL_VOCABULARY, "a b"]).encode()))
    (tmp_path / "plain.txt.gz").write_text("\n".join(SMALL_VOCABULARY))
    packed = (small_clip / "merges.txt.gz").read_bytes()
    (tmp_path / "cut.txt.gz").write_bytes(packed[:30])
    for name, message in (
        ("long", "long.txt.gz has 519 tokens, but the model's text_cfg.vocab_size is 518"),
        ("plain", "plain.txt.gz can't be read as gzipped byte-pair merges"),
        ("cut", "cut.txt.gz can't be read as gzipped byte-pair merges"),
        ("none", "there is no file .*none.txt.gz"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_scorer("clip_score", checkpoint=small_clip, tokenizer=tmp_path / f"{name}.txt.gz", device="cpu")
