import json
import logging
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from rewards import load_scorer
from rewards.scorer import Piece, ScoreError, Scorer, ScoringOptions, cut_tokens, pick_device, pick_dtype, score_rows


class Brightness(Scorer):
    """mean(pixels) * (1 + tokens): a scorer whose answers can be worked out by hand."""

    name = "brightness"
    max_tokens = 4

    def __init__(self, **options):
        super().__init__(device=torch.device("cpu"), dtype=torch.float32, options=ScoringOptions(**options))
        self.image_batches, self.text_batches, self.room = [], [], 1_000

    def tokenize(self, prompt):
        return [len(word) for word in prompt.split()]

    def preprocess(self, image):
        return torch.full((3, 1, 1), float(image.convert("RGB").getpixel((0, 0))[0]))

    def encode_texts(self, pieces):
        self.text_batches.append(len(pieces))
        return {piece: 1 + len(piece) for piece in pieces}

    def encode_images(self, pixels):
        self.image_batches.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels.mean((1, 2, 3))

    def score_pairs(self, images, texts, pairs):
        return torch.stack([images[index] * texts[piece] for index, piece in pairs])


def gray(value):
    return Image.new("RGB", (2, 2), (value,) * 3)


def test_scores_by_hand():
    scores = Brightness()(["a", "a b", "a b c"], [gray(10), gray(20), gray(30)])
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.tolist() == [20.0, 60.0, 120.0]


def test_each_image_and_each_prompt_is_encoded_once(tmp_path):
    gray(7).save(tmp_path / "a.png")
    one, other = gray(1), gray(2)
    scorer = Brightness()
    path = tmp_path / "a.png"
    scores = scorer(["a", "b b", "a", "a", "b b", "a"], [one, one, other, path, str(path), other])
    assert scores.tolist() == [2.0, 3.0, 4.0, 14.0, 21.0, 4.0]
    assert scorer.image_batches == [3]
    assert scorer.text_batches == [2]


def test_images_that_a_lazy_sequence_makes_anew_are_not_taken_for_each_other():
    class Lazy(Sequence):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return gray(index)  # freed after use, so that the next one may get its address

    assert Brightness(num_workers=0)(["a"] * 64, Lazy()).tolist() == [2.0 * i for i in range(64)]


def test_a_batch_that_runs_out_of_memory_is_halved_and_nothing_is_lost():
    scorer = Brightness(batch_size=8)
    scorer.room = 3
    assert scorer(["a"] * 20, [gray(i) for i in range(20)]).tolist() == [2.0 * i for i in range(20)]
    assert scorer.image_batches == [8, 4, *[2] * 10]


def test_long_prompts_are_cut_and_counted_or_averaged(caplog):
    prompts, images = ["one two three four five six", "one two three four", "one"], [gray(10)] * 3
    cut = Brightness()
    with caplog.at_level(logging.WARNING):
        assert cut(prompts, images).tolist() == [50.0, 50.0, 20.0]
    assert "brightness reads 4 tokens of a prompt: 1 of 3 prompts are longer" in caplog.text
    assert cut.prompt_count.share == pytest.approx(1 / 3)
    assert cut.truncated_share([*prompts, None]) == pytest.approx(1 / 3)
    pieces = Brightness(long_prompts="chunk")
    # 4 of 6 tokens score 10 * 5, 2 of 6 score 10 * 3
    assert pieces(prompts, images).tolist() == pytest.approx([50 * 4 / 6 + 30 * 2 / 6, 50.0, 20.0])
    assert pieces.prompt_count.truncated == 0


def test_cut_tokens():
    assert cut_tokens([1, 2, 3], 2, "truncate") == [Piece((1, 2), 1.0)]
    assert cut_tokens([1, 2, 3], 2, "chunk") == [Piece((1, 2), 2 / 3), Piece((3,), 1 / 3)]
    assert cut_tokens([], 2, "chunk") == [Piece((), 1.0)]


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["a"], [], "Need one prompt per image, but got 1 prompts and 0 images"),
        ("a", [gray(1)], "must be sequences"),
        (["a"], gray(1), "must be sequences"),
        (["a", ""], [gray(1)] * 2, "Row 1: the prompt is empty"),
        (["a", " \n"], [gray(1)] * 2, "Row 1: the prompt is empty"),
        ([3], [gray(1)], "Row 0: the prompt is 3, not a text"),
        ([["a"]], [gray(1)], r"Row 0: the prompt is \['a'\], not a text"),
        (["a \ud83c"], [gray(1)], r"Row 0: the prompt is 'a \\ud83c', with half a character"),
        (["a"] * 3, [gray(1), "gone.png", b"x"], "Row 1: Can't open the image gone.png.*1 more rows failed"),
    ],
)
def test_what_can_not_be_scored_is_an_error_that_names_the_row(prompts, images, message):
    with pytest.raises(ScoreError, match=message):
        Brightness()(prompts, images)


def test_no_rows_have_no_scores():
    assert Brightness()([], []).shape == (0,)


def test_a_bad_row_costs_one_row():
    scored = Brightness()(["a"] * 4, [gray(1)] * 4)
    assert scored.tolist() == [2.0] * 4
    scored = Brightness().score(["a", "", "a", None], ["gone.png", gray(1), gray(3), gray(1)])
    assert scored.scores[2] == 6.0
    assert torch.isnan(scored.scores[[0, 1, 3]]).all()
    assert list(scored.errors) == [0, 1, 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    class Broken(Brightness):
        def score_pairs(self, images, texts, pairs):
            return torch.full((len(pairs),), value)

    with pytest.raises(ScoreError, match="Row 0: the score in torch.float32 is not finite"):
        Broken()(["a"], [gray(1)])


def test_a_very_long_prompt_is_no_problem(hps, image_reward, make_picture):
    for prompt in ("word " * 2_000, "a" * 10_000, "\u0301" * 10_000, "<" * 10_000):
        for scorer in (hps, image_reward):
            assert torch.isfinite(scorer([prompt], [make_picture()])).all()
            assert scorer.prompt_count.prompts > 0


MEASURE = """
import json, resource, sys
from rewards import load_scorer
checkpoint, config, picture, *numbers = sys.argv[1:]
scorer = load_scorer("hps_v2", checkpoint=checkpoint, config=json.loads(config), device="cpu", batch_size=4)
peaks = []
for n in map(int, numbers):
    scorer(["a"] * n, [picture.replace("0.png", f"{i}.png") for i in range(n)])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, tiny_clip, tiny_clip_config, make_picture):
    """Peak memory of a process that scores 40 and then 400 pictures, each 0.8 MB when decoded and 3 MB as floats."""
    make_picture(512, 512).save(tmp_path / "0.png")
    for i in range(1, 400):
        (tmp_path / f"{i}.png").symlink_to(tmp_path / "0.png")
    arguments = [str(tiny_clip), json.dumps(tiny_clip_config), str(tmp_path / "0.png"), "40", "400"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    few, many = json.loads(done.stdout)
    assert many < few + 60  # the other 360 would be 270 MB, or 1,130 as floats


def test_rows_of_a_plain_function_are_tried_one_by_one_when_they_fail_together():
    def bright(prompts, images):
        if any(prompt == "bad" for prompt in prompts):
            raise ValueError("no such thing")
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])

    scored = score_rows(bright, ["a", "bad", "b"], [gray(1), gray(2), gray(3)])
    assert scored.scores[[0, 2]].tolist() == [1.0, 3.0]
    assert scored.errors == {1: "no such thing"}
    assert score_rows(bright, [], []).scores.shape == (0,)
    with pytest.raises(ValueError, match="no such thing"):
        score_rows(bright, ["bad", "bad"], [gray(1), gray(2)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` must be 0 or more, but got -1"),
        ({"long_prompts": "drop"}, "`long_prompts` must be `truncate` or `chunk`, but got 'drop'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_clip, tiny_clip_config, option, message):
    with pytest.raises(ValueError, match=message):
        load_scorer("hps_v2", checkpoint=tiny_clip, config=tiny_clip_config, **option)


def test_device_and_precision():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (pick_dtype(None), pick_dtype("bfloat16"), pick_dtype(torch.float16)) == (
        torch.float32, torch.bfloat16, torch.float16,
    )  # fmt: skip
    for wrong in ("int8", "half precision"):
        with pytest.raises(ValueError, match="`dtype` must be float32, bfloat16 or float16"):
            pick_dtype(wrong)
