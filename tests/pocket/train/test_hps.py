"""The pocket HPS v2: two steps of training, and its folder in `load_scorer` and in stock open_clip."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file

from pocket.train import clip, hps
from pocket.train.pictures import Pictures, draw_pictures
from rewards import load_scorer
from rewards.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    clip.save(open_clip.CLIP(**clip.CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def held_out():
    return draw_pictures(12, seed=5, held_out=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip_folder, held_out):
    folder = tmp_path_factory.mktemp("hps")
    hps.train(folder, clip_folder, draw_pictures(300, seed=4, styles=("flat",)), held_out, steps=2)
    return folder


def stock_cosines(folder, prompts, images):
    """open_clip's model, tokenizer and preprocessing, one pair at a time."""
    model = open_clip.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "merges.txt.gz"), context_length=model.context_length)
    transform = open_clip.image_transform(64, is_train=False)
    with torch.no_grad():
        pairs = [
            (model.encode_image(transform(image)[None]), model.encode_text(tokenizer([prompt])))
            for prompt, image in zip(prompts, images, strict=True)
        ]
    return torch.cat([torch.cosine_similarity(image, text) for image, text in pairs])


def test_scores_are_those_of_stock_open_clip_and_of_training(folder, held_out):
    prompts = [*held_out.captions[:8], "sharp, a blue cat", "an unknown word", "zebra, 42!", "a"]
    images = [Image.fromarray(image) for image in held_out.images]
    scores = load_scorer("hps_v2", checkpoint=folder, device="cpu")(prompts, images)
    torch.testing.assert_close(scores, stock_cosines(folder, prompts, images), atol=1e-5, rtol=0)
    assert scores.std() > 0.003

    model = open_clip.CLIP(**clip.CONFIG).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(hps.score(model, prompts, held_out.images), scores, atol=1e-5, rtol=0)


def test_the_clip_it_starts_from_is_a_clip_scorer(clip_folder, held_out):
    prompts, images = held_out.captions, [Image.fromarray(image) for image in held_out.images]
    scores = load_scorer("clip_score", checkpoint=clip_folder, device="cpu")(prompts, images)
    torch.testing.assert_close(
        scores, 2.5 * stock_cosines(clip_folder, prompts, images).clamp(min=0), atol=2e-5, rtol=0
    )
    assert (scores > 0).any()


def test_training_moves_the_weights_a_little_and_says_what_it_reached(folder, clip_folder):
    before, after = load_file(clip_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for tower in ("visual.conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight", "logit_scale"):
        assert 0 < (before[tower] - after[tower]).abs().max() < 1e-3  # two steps of warm-up
    done = json.loads((folder / "done.json").read_text())
    assert set(done) > {f"accuracy/wrong_{name}" for name in ("subject", "color", "background", "style")}
    assert all(0 <= value <= 1 for value in done.values())
    assert np.isfinite(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
    assert not (folder / "state.pt").exists()


def test_the_loss_is_that_of_the_untrained_clip(folder, clip_folder):
    """Before anything is learned all cosines are about equal, and a pair costs log 2."""
    loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss == pytest.approx(np.log(2), abs=0.15)


def test_a_clip_that_is_not_there(tmp_path):
    empty = Pictures(np.zeros((0, 64, 64, 3), np.uint8), [], [])
    with pytest.raises(CheckpointError, match="There is no checkpoint at .*clip"):
        hps.train(tmp_path / "hps", tmp_path / "clip", empty, empty)
