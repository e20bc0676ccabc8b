"""The pocket ImageReward: two steps of training, and its folder in `load_scorer`."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from pocket.drawing import ATTRIBUTES, STYLES, Scene, caption, random_scenes
from pocket.train import image_reward
from pocket.train.pictures import draw_pictures
from pocket.train.preferences import held_out_pairs
from rewards import load_scorer
from rewards.image_reward import MEAN, STD


@pytest.fixture(scope="module")
def held_out():
    return draw_pictures(12, seed=5, held_out=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, held_out):
    folder = tmp_path_factory.mktemp("image_reward")
    image_reward.train(folder, draw_pictures(300, seed=4, styles=("flat",)), held_out, steps=2)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer("image_reward", checkpoint=folder, device="cpu")


def stored_model(folder):
    model = image_reward.new_model().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_scores_are_those_of_the_model_on_padded_texts(folder, scorer, held_out):
    """Tokens looked up in vocab.txt by hand and padded to 30, pixels by torchvision, one pair at a time."""
    model = stored_model(folder)
    numbers = {word: number for number, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = []
    for text, image in zip(held_out.captions, held_out.images, strict=True):
        words = ["[CLS]", *text.replace(",", " ,").split(), "[SEP]"]
        token_ids = torch.tensor([[numbers[word] for word in words] + [0] * (30 - len(words))])
        with torch.no_grad():
            tokens = model.blip.visual_encoder(transform(Image.fromarray(image))[None])
            hidden = model.blip.text_encoder(token_ids, token_ids > 0, tokens, None)
            expected.append((model.mlp(hidden) - MEAN) / STD)
    scores = scorer(held_out.captions, [Image.fromarray(image) for image in held_out.images])
    torch.testing.assert_close(scores, torch.cat(expected), atol=1e-4, rtol=0)
    assert scores.std() > 0.1


def test_training_sees_what_the_scorer_sees(folder, scorer, held_out):
    texts = image_reward.Texts(folder)
    raw = image_reward.score(stored_model(folder), texts, held_out.captions, held_out.images)
    scores = scorer(held_out.captions, [Image.fromarray(image) for image in held_out.images])
    torch.testing.assert_close((raw - MEAN) / STD, scores, atol=1e-4, rtol=0)


def test_scores_of_the_held_out_pairs_have_mean_0_and_deviation_1(scorer, held_out):
    captions, clean, worse = held_out_pairs(held_out)
    images = [Image.fromarray(image) for part in (clean, *worse.values()) for image in part]
    scores = scorer(captions * (1 + len(worse)), images)
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std().item() == pytest.approx(1, abs=1e-3)


def test_calibration_keeps_the_order(folder, held_out):
    torch.manual_seed(1)
    model, texts, pairs = image_reward.new_model().eval(), image_reward.Texts(folder), held_out_pairs(held_out, 6)
    before = image_reward.score(model, texts, pairs.captions, pairs.clean)
    image_reward.calibrate(model, texts, pairs)
    after = image_reward.score(model, texts, pairs.captions, pairs.clean)
    assert before.argsort().tolist() == after.argsort().tolist()


def test_every_part_that_is_read_learns(folder):
    torch.manual_seed(0)  # as in training
    before, after = image_reward.new_model().state_dict(), load_file(folder / "model.safetensors")
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    unread = {f"blip.{side}_proj.{part}" for side in ("vision", "text") for part in ("weight", "bias")}
    # a key's bias shifts all attention logits alike, so that it has no gradient worth the name
    assert still - {name for name in still if name.endswith("key.bias")} == unread | {
        "blip.text_encoder.embeddings.position_ids"
    }


def test_what_it_reached_is_written_and_the_helpers_are_gone(folder):
    done = json.loads((folder / "done.json").read_text())
    assert {"accuracy/mean", "accuracy/clean_over_degraded", "accuracy/right_over_wrong"} < set(done)
    assert not any("heads" in name for name in load_file(folder / "model.safetensors"))
    loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    # log 2 for rankings and for matching, and half of log n for each attribute, before anything is learned
    chance = 2 * np.log(2) + 0.5 * sum(np.log(len(values)) for values in ATTRIBUTES.values())
    assert loss == pytest.approx(chance, rel=0.15)


def test_rival_captions_have_one_attribute_wrong():
    for scene in random_scenes(40, 2):
        right, *others = image_reward.rival_captions(scene, random.Random(0))
        assert right == caption(scene)
        for attribute, text in zip(ATTRIBUTES, others, strict=True):
            rivals = [Scene(**{**vars(scene), attribute: value}) for value in ATTRIBUTES[attribute]]
            assert text in {caption(rival) for rival in rivals if rival != scene}


def test_texts_are_padded_and_masked(folder):
    token_ids, mask = image_reward.Texts(folder)(["a cat", f"a red cat on the grass, {STYLES['neon']}"])
    assert token_ids.shape == mask.shape == (2, 11)
    assert mask.sum(1).tolist() == [4, 11]
    assert (token_ids[~mask] == 0).all()
