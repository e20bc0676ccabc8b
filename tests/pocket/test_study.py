"""What the study says, on rewards made up such that every answer can be worked out by hand."""

import json

import numpy as np
import pytest

from pocket.catalogue import BY_SLUG
from pocket.drawing import STYLES, Scene, draw, random_scenes
from pocket.study import (
    SETTINGS,
    Choice,
    Drawn,
    StudyConfig,
    _calls_table,
    agreement,
    community_shares,
    compare,
    right_captions,
    to_markdown,
)
from pocket.world import build
from rollouts.calls_table import ask, read_calls
from rollouts.requests import RenderSettings

SCENES = [Scene("cat", "red", "sky", "pixel"), Scene("star", "blue", "night", "neon")]
SLUGS = ["pocket_diffusion", "dreamy_everything", "pixel_wave", "neon_nights"]
CHOICES = [Choice(BY_SLUG[slug], setting) for slug in SLUGS for setting in SETTINGS]
N = len(SETTINGS)


def drawn(rewards):
    return Drawn(SCENES, CHOICES, rewards, {"clip_score": rewards, "hps_v2": -rewards}, [])


@pytest.fixture
def rewards():
    """Two prompts, 16 choices, 4 pictures: 0.5 everywhere but where a test says otherwise."""
    return np.full((2, len(CHOICES), 4), 0.5)


def test_the_oracle_is_not_rewarded_for_luck_with_seeds(rewards):
    rewards[0, 3] = (0.9, 0.1, 0.9, 0.1)  # the best on even pictures only
    rewards[0, 9] = 0.7
    ways = compare(drawn(rewards))["ways"]
    # prompt 0: chosen on even pictures it is choice 3 (0.1 on the odd ones), chosen on odd ones choice 9; prompt 1: 0.5
    assert ways["oracle: best call per prompt"]["value"] == pytest.approx(((0.1 + 0.7) / 2 + 0.5) / 2)


def test_the_best_call_for_all_is_chosen_on_the_other_prompts(rewards):
    rewards[0, 5], rewards[1, 6] = 0.9, 0.8
    # for prompt 0 the other prompt says choice 6 (0.5 here), for prompt 1 choice 5 (0.5 there)
    assert compare(drawn(rewards))["ways"]["best single call for all prompts"]["value"] == pytest.approx(0.5)


def test_fixed_choices(rewards):
    rewards[:, 0], rewards[:, N] = 0.3, 0.2  # the general model and the most downloaded one, default parameters
    ways = compare(drawn(rewards))["ways"]
    assert ways["general model, default parameters"]["value"] == pytest.approx(0.3)
    assert BY_SLUG["dreamy_everything"].downloads == max(model.downloads for model in BY_SLUG.values())
    assert ways["default call (of the most popular model)"]["value"] == pytest.approx(0.2)
    assert ways["any call"]["value"] == pytest.approx((14 * 0.5 + 0.3 + 0.2) / 16)


def test_which_model_is_best_for_what(rewards):
    rewards[0, 2 * N + 1], rewards[1, 3 * N + 2] = 0.9, 0.8
    report = compare(drawn(rewards))
    names = [BY_SLUG[slug].catalog_name for slug in SLUGS]
    assert report["best_model_by_prompt"] == {names[2]: 1, names[3]: 1}
    assert report["settings_on_own_style"][names[2]]["best"] == "DPM++ 2M Karras, 20 steps, cfg 3"
    assert report["settings_on_own_style"][names[3]]["best"] == "DPM++ 2M Karras, 20 steps, cfg 1.5"


def test_the_community_calls_what_it_downloads_for_the_style(rewards):
    shares = community_shares(SCENES, CHOICES)
    np.testing.assert_allclose(shares.sum(1), 1)
    pixel, neon = shares.reshape(2, len(SLUGS), N).sum(2)
    downloads = {slug: BY_SLUG[slug].downloads for slug in SLUGS}
    assert pixel[3] == 0 and neon[2] == 0  # nobody calls the neon model for pixel art
    total = downloads["pocket_diffusion"] + downloads["dreamy_everything"] + downloads["pixel_wave"]
    assert pixel[2] == pytest.approx(downloads["pixel_wave"] / total)


def test_agreement_is_kendalls_tau_over_models(rewards):
    quality = rewards.copy()
    for row, value in enumerate((0.1, 0.4, 0.3, 0.2)):
        rewards[:, row * N : row * N + N] = 0.2 * row
        quality[:, row * N : row * N + N] = value
    # 6 pairs of models: 0-1, 0-2, 0-3 agree, 1-2, 1-3, 2-3 don't
    assert agreement(drawn(rewards), quality) == {"clip_score": 0.0, "hps_v2": 0.0, "unified": 0.0}
    assert agreement(drawn(quality), quality) == {"clip_score": 1.0, "hps_v2": -1.0, "unified": 1.0}


def test_right_captions_are_asked_of_the_half_that_did_not_choose():
    """The first of two calls is the better one on even pictures, where captions don't count."""
    scenes = [scene for style in STYLES for scene in random_scenes(2, 5, held_out=True, styles=(style,))]
    right, wrong = draw(scenes, 1), draw(random_scenes(len(scenes), 77), 2)
    rewards = np.tile(np.array([[0.9, 0.1], [0.5, 0.5]]), (len(scenes), 1, 1))
    pictures = np.stack([np.stack([[wrong[i], right[i]], [wrong[i], wrong[i]]]) for i in range(len(scenes))])
    found = right_captions(Drawn(scenes, CHOICES[:2], rewards, {}, []), pictures)
    assert min(found.values()) >= 11 / 12
    swapped = right_captions(Drawn(scenes, CHOICES[:2], rewards[:, ::-1], {}, []), pictures)
    assert max(swapped.values()) < 0.6


def test_the_calls_are_callable(tmp_path):
    catalog = build(tmp_path / "world")
    path = tmp_path / "calls.jsonl"
    path.write_text(_calls_table(SCENES, CHOICES, catalog))
    prompts = read_calls(path)
    assert prompts[0].prompt == "a red cat in the sky, pixel art"
    asked = ask(prompts, catalog, RenderSettings(native_side=64), num_images=2)
    assert len(asked) == 2 * len(CHOICES) and not any(entry.failure for entry in asked)
    assert {job.batch_key.width for entry in asked for job in entry.jobs} == {64}


def test_the_report_is_a_table(rewards):
    report = compare(drawn(rewards)) | {"agreement": {"hps_v2": 0.5}, "right_caption": {"subject": 0.8}}
    table = to_markdown(json.loads(json.dumps(report)))
    assert (
        "| any call | 0.500 [0.500, 0.500] |" in table and "| hps_v2 | 0.50 |" in table and "| subject | 80% |" in table
    )


def test_an_odd_number_of_pictures_is_refused():
    with pytest.raises(ValueError, match="`num_images` must be even"):
        StudyConfig(world="w", output="o", num_images=3)
