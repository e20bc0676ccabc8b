import json
from itertools import product

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from rewards import load_scorer
from rewards.checkpoints import CheckpointError
from rewards.image_reward import MEAN, STD, build_model, official_config

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"]
PROMPTS = ["a cat", "a dog on a hill, far away", "moon", "a cat", "zebra"]


@pytest.fixture(scope="module")
def official(goldens, pseudo_weights, tmp_path_factory):
    """The small ImageReward of the goldens, loaded as a user would."""
    path = tmp_path_factory.mktemp("golden") / "ImageReward.pt"
    torch.save(pseudo_weights("imagereward_small_keys.json"), path)
    made_with = json.loads((goldens / "imagereward_small_ctor.json").read_text())
    config = {
        "vision": made_with["vision"],
        "med": json.loads((goldens / made_with["med_config"]).read_text()),
        "mlp_input_size": made_with["mlp_input_size"],
    }
    return load_scorer("image_reward", checkpoint=path, config=config, tokenizer=goldens / "bert_vocab", device="cpu")


def test_scores_are_those_of_the_official_code(goldens, official):
    golden = json.loads((goldens / "imagereward_small_golden.json").read_text())
    images = [str(goldens / "images" / name) for name in golden["images"]]
    scores = official([prompt for prompt in golden["prompts"] for _ in images], images * len(golden["prompts"]))
    torch.testing.assert_close(scores.view(-1, len(images)), torch.tensor(golden["scores"]), atol=1e-5, rtol=0)


def test_tokens_are_those_of_the_official_code(goldens, official):
    golden = json.loads((goldens / "imagereward_small_golden.json").read_text())
    for prompt, ids, mask, length in zip(
        golden["prompts"], golden["input_ids"], golden["attention_mask"], golden["untruncated_lengths"], strict=True
    ):
        ours = official.tokenize(prompt)
        assert len(ours) + 2 == length
        assert [101, *ours[:33], 102] == ids[: sum(mask)]


def test_takes_exactly_the_official_keys(goldens):
    keys = json.loads((goldens / "imagereward_keys.json").read_text())
    med = json.loads((goldens / "med_config.json").read_text())
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, shape, dtype in keys}
    model, size = build_model({"med": med}, state, "keys")
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {k[0]: k[1] for k in keys}
    assert size == 224
    build_model(official_config(), state, "keys")  # the default sizes are the official ones
    with pytest.raises(CheckpointError, match=r"1 missing: mlp.layers.7.bias"):
        build_model(None, {name: value for name, value in state.items() if name != "mlp.layers.7.bias"}, "keys")


def test_a_batch_scores_as_its_pairs_one_by_one(image_reward, pictures):
    together = image_reward(PROMPTS, pictures)
    alone = torch.cat([image_reward([p], [i]) for p, i in zip(PROMPTS, pictures, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 0.01  # the scores differ, so that equality says something


def test_order_and_duplicates_change_nothing(image_reward, pictures):
    prompts, images = PROMPTS * 3, [pictures[i] for i in (0, 0, 0, 1, 2, 3, 4, 4, 1, 0, 2, 2, 3, 1, 0)]
    scores = image_reward(prompts, images)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = image_reward([prompts[i] for i in order], [images[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], atol=1e-5, rtol=0)
    assert scores[0] == scores[0] and abs(scores[0] - scores[1]) > 1e-4


def test_many_prompts_of_one_image_need_one_pass_of_the_vision_encoder(image_reward, monkeypatch, make_picture):
    passes = []
    encode = image_reward.encode_images
    monkeypatch.setattr(image_reward, "encode_images", lambda pixels: passes.append(len(pixels)) or encode(pixels))
    image = make_picture()
    scores = image_reward([f"cat {letter}" for letter in "abcdefghij"], [image] * 10)
    assert passes == [1]
    assert len(set(scores.tolist())) == 10


def test_the_head_is_linear_and_normalised(image_reward):
    """From the hidden state on, by hand: matrices without activations, then the published mean and deviation."""
    features = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    expected = features
    for index in (0, 2, 4, 6, 7):
        layer = image_reward.model.mlp.layers[index]
        expected = expected @ layer.weight.T + layer.bias
    torch.testing.assert_close(image_reward.model.mlp(features), expected[:, 0])
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_only_33_pieces_of_a_prompt_count_and_that_is_counted(tiny_blip, vocabulary, tiny_blip_config, make_picture):
    scorer = load_scorer(
        "image_reward", checkpoint=tiny_blip, config=tiny_blip_config, tokenizer=vocabulary, device="cpu"
    )
    fits, longer = "abcdefghijklmnopqrstuvwxyzabcdefg", "abcdefghijklmnopqrstuvwxyzabcdefg, and more"
    scores = scorer([fits, longer, "short"], [make_picture()] * 3)
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-6)
    assert (scorer.prompt_count.prompts, scorer.prompt_count.truncated) == (3, 1)
    assert scorer.truncated_share([fits, longer, longer, "short"]) == 0.5


def test_chunks_of_a_long_prompt_are_averaged_by_length(
    tiny_blip, vocabulary, image_reward, tiny_blip_config, make_picture
):
    scorer = load_scorer(
        "image_reward",
        checkpoint=tiny_blip,
        config=tiny_blip_config,
        tokenizer=vocabulary,
        device="cpu",
        long_prompts="chunk",
    )
    head, tail = " ".join("abcdefghijk" * 3), "x y z"
    parts = image_reward([head, tail], [make_picture()] * 2)
    expected = (33 * parts[0] + 3 * parts[1]) / 36
    torch.testing.assert_close(scorer([f"{head} {tail}"], [make_picture()])[0], expected, atol=1e-5, rtol=0)
    assert scorer.prompt_count.truncated == 0


def test_the_resize_comes_before_the_conversion_to_rgb(image_reward, make_picture):
    image = make_picture(60, 40, 7, "RGBA")
    pixels = image_reward.preprocess(image)
    expected = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32)).convert("RGB")
    torch.testing.assert_close(
        pixels[0] * 0.26862954 + 0.48145466, torch.tensor(list(expected.getdata(0))).view(32, 32) / 255
    )
    assert pixels.sub(image_reward.preprocess(image.convert("RGB"))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("mode", "size"),
    [*product(MODES, [(60, 40), (31, 77), (1, 1)]), ("RGB", (7680, 4320)), ("L", (7680, 4320))],
)
def test_every_mode_is_preprocessed_as_by_the_official_pipeline(image_reward, make_picture, mode, size):
    image = make_picture(*size, seed=7, mode="RGBA")
    image = image if mode == "RGBA" else image.convert("LA" if mode in ("LA", "PA") else "RGB").convert(mode)
    official = Compose(
        [
            Resize(32, InterpolationMode.BICUBIC),
            CenterCrop(32),
            lambda picture: picture.convert("RGB"),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    torch.testing.assert_close(image_reward.preprocess(image), official(image), atol=1e-6, rtol=0)


def test_bfloat16_stays_close(tiny_blip, vocabulary, image_reward, pictures, tiny_blip_config):
    low = load_scorer(
        "image_reward",
        checkpoint=tiny_blip,
        config=tiny_blip_config,
        tokenizer=vocabulary,
        device="cpu",
        dtype="bfloat16",
    )
    scores = low(PROMPTS, pictures)
    assert scores.dtype == torch.float32
    full = image_reward(PROMPTS, pictures)
    assert (scores - full).abs().max() < 0.1 * full.abs().max()
    assert F.cosine_similarity(scores, full, dim=0) > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": {}}, "unknown keys \\['visual'\\]"),
        ({"mlp_input_size": 8}, "`mlp_input_size` is 8, but the text encoder is 16 wide"),
        ({"vision": {"depth": 3}}, "visual_encoder.blocks.2.norm1.weight"),
        ({"med": {"vocab_size": 121}}, r"\(120, 16\) instead of \(121, 16\)"),
    ],
)
def test_a_configuration_that_does_not_fit_says_where(tiny_blip, vocabulary, tiny_blip_config, change, message):
    config = dict(tiny_blip_config)
    for key, value in change.items():
        config[key] = config[key] | value if key in ("vision", "med") else value
    with pytest.raises(CheckpointError, match=message):
        load_scorer("image_reward", checkpoint=tiny_blip, config=config, tokenizer=vocabulary)


def test_a_folder_without_a_vocabulary_is_named(tiny_blip, tmp_path, tiny_blip_config):
    with pytest.raises(CheckpointError, match="neither vocab.txt nor tokenizer.json"):
        load_scorer("image_reward", checkpoint=tiny_blip, config=tiny_blip_config, tokenizer=tmp_path)


def test_the_vocabulary_may_be_named_itself(tiny_blip, tiny_blip_config, vocabulary, image_reward, make_picture):
    scorer = load_scorer(
        "image_reward", checkpoint=tiny_blip, config=tiny_blip_config, tokenizer=vocabulary / "vocab.txt", device="cpu"
    )
    assert scorer(["a cat"], [make_picture()]) == image_reward(["a cat"], [make_picture()])


def test_the_vocabulary_beside_the_weights_is_found(
    tiny_blip, vocabulary, image_reward, tmp_path, tiny_blip_config, make_picture
):
    (tmp_path / "ImageReward.pt").write_bytes(tiny_blip.read_bytes())
    (tmp_path / "vocab.txt").write_bytes((vocabulary / "vocab.txt").read_bytes())
    scorer = load_scorer("image_reward", checkpoint=tmp_path / "ImageReward.pt", config=tiny_blip_config, device="cpu")
    assert scorer(["a cat"], [make_picture()]) == image_reward(["a cat"], [make_picture()])


def test_weights_saved_in_float16_score_as_themselves_in_float32(
    tmp_path, tiny_blip, tiny_blip_config, vocabulary, pictures
):
    rounded = {
        name: value.half() if value.is_floating_point() else value for name, value in torch.load(tiny_blip).items()
    }
    torch.save(rounded, tmp_path / "half.pt")
    torch.save({name: value.float() if value.is_floating_point() else value for name, value in rounded.items()},
               tmp_path / "full.pt")  # fmt: skip
    half, full = (
        load_scorer("image_reward", checkpoint=tmp_path / name, config=tiny_blip_config, tokenizer=vocabulary,
                    device="cpu")
        for name in ("half.pt", "full.pt")
    )  # fmt: skip
    assert torch.equal(half(PROMPTS, pictures), full(PROMPTS, pictures))
    assert {value.dtype for value in half.model.parameters()} == {torch.float32}
