import json

import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from rewards import load_scorer
from rewards.checkpoints import CheckpointError
from rewards.images import ImageError
from rewards.open_clip_towers import build_model
from rewards.scorer import ScoreError

PROMPTS = ["a cat", "An oil painting of a lighthouse", "x", "a cat", "a cat &amp; a dog"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def official(goldens, pseudo_weights, tmp_path_factory):
    """The small HPS v2 of the goldens, in the official file layout."""
    path = tmp_path_factory.mktemp("golden") / "HPS_v2_compressed.pt"
    torch.save({"state_dict": pseudo_weights("hpsv2_small_keys.json")}, path)
    return load_scorer("hps_v2", checkpoint=path, config=goldens / "hpsv2_small_config.json", device="cpu")


def test_scores_are_those_of_the_official_code(goldens, official):
    golden = json.loads((goldens / "hpsv2_small_golden.json").read_text())
    images = [str(goldens / "images" / name) for name in golden["images"]]
    scores = official([prompt for prompt in golden["prompts"] for _ in images], images * len(golden["prompts"]))
    torch.testing.assert_close(scores.view(-1, len(images)), torch.tensor(golden["scores"]), atol=1e-6, rtol=0)


def test_tokens_are_those_of_the_official_code(goldens, official):
    golden = json.loads((goldens / "hpsv2_small_golden.json").read_text())
    for prompt, ids in zip(golden["prompts"], golden["input_ids"], strict=True):
        assert [49406, *official.tokenize(prompt)[:75], 49407] == ids


def test_takes_exactly_the_official_keys(goldens):
    keys = json.loads((goldens / "hpsv2_keys.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape, _ in keys}
    model = build_model("ViT-H-14", state, "keys")
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {k[0]: k[1] for k in keys}
    with pytest.raises(CheckpointError, match=r"1 unexpected: surplus"):
        build_model("ViT-H-14", state | {"surplus": torch.empty(1)}, "keys")


def naive(config, path, prompts, images):
    """The formula, one pair at a time, through open_clip's own tokenizer and full-length text tower."""
    from safetensors.torch import load_file

    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(path))
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        pixels = TF.to_tensor(image.convert("RGB"))
        scale = 32 / max(pixels.shape[1:])
        height, width = (round(side * scale) for side in pixels.shape[1:])
        pixels = TF.resize(pixels, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
        left, top = (32 - width) // 2, (32 - height) // 2
        pixels = (TF.pad(pixels, [left, top, 32 - width - left, 32 - height - top]) - MEAN) / STD
        with torch.no_grad():
            image_features = model.encode_image(pixels[None], normalize=True)
            text_features = model.encode_text(open_clip.get_tokenizer("ViT-H-14")([prompt]), normalize=True)
        scores.append((image_features * text_features).sum())
    return torch.stack(scores)


def test_agrees_with_the_formula_whatever_the_picture(hps, tiny_clip, tiny_clip_config, pictures):
    expected = naive(tiny_clip_config, tiny_clip, PROMPTS, pictures)
    torch.testing.assert_close(hps(PROMPTS, pictures), expected, atol=1e-6, rtol=0)
    assert expected.std() > 0.01


def test_the_text_tower_stops_at_the_longest_prompt_and_answers_the_same(hps, make_picture):
    """75 tokens fit; the rest is cut. An end token written into a prompt ends it, as in the official code."""
    image = make_picture()
    long = " ".join(f"word{i}" for i in range(60))
    prompts = ["a", long, long + " tail", "a <end_of_text> b", "a"]
    scores = hps(prompts, [image] * 5)
    alone = torch.cat([hps([prompt], [image]) for prompt in prompts])
    torch.testing.assert_close(scores, alone, atol=1e-6, rtol=0)
    assert scores[1] == pytest.approx(scores[2].item(), abs=1e-6)
    assert scores[3] == pytest.approx(scores[0].item(), abs=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGBX"])
def test_every_mode_is_scored_as_its_rgb(hps, make_picture, mode):
    image = make_picture(40, 30, 5).convert(mode) if mode != "LA" else make_picture(40, 30, 5, "RGBA").convert("LA")
    assert hps(["a"], [image]) == hps(["a"], [image.convert("RGB")])


@pytest.mark.parametrize("size", [(1, 1), (32, 20), (20, 32), (32, 32), (33, 1), (7680, 4320)])
def test_sizes(hps, tiny_clip, tiny_clip_config, make_picture, size):
    """(32, 20) already has the model's longest side: the official code fails on it, the formula does not."""
    image = make_picture(*size)
    torch.testing.assert_close(
        hps(["a"], [image]), naive(tiny_clip_config, tiny_clip, ["a"], [image]), atol=1e-5, rtol=0
    )


def test_a_picture_whose_short_side_vanishes_is_refused(hps):
    with pytest.raises(ScoreError, match="Row 0: .*2000x1 is too thin"):
        hps(["a"], [Image.new("RGB", (2000, 1))])
    with pytest.raises(ImageError, match="vanishes at 32 pixels"):
        hps.preprocess(Image.new("RGB", (1, 900)))


def test_options_that_make_no_sense_are_refused(tiny_clip):
    with pytest.raises(ValueError, match=r"`version` must be one of v2.0, v2.1, but got 'v3'"):
        load_scorer("hps_v2", checkpoint=tiny_clip, version="v3")
    with pytest.raises(ValueError, match="`tokenizer` of hps_v2 must be a file of byte-pair merges"):
        load_scorer("hps_v2", checkpoint=tiny_clip, tokenizer="x")
    with pytest.raises(CheckpointError, match="does not fit the model; keys"):
        load_scorer("hps_v2", checkpoint=tiny_clip, config="ViT-B-32")
