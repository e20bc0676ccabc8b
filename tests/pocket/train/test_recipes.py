"""What fine-tuned models learn from: pictures and captions of a recipe."""

import numpy as np

from pocket.catalogue import BY_SLUG, usable_models
from pocket.drawing import COLORS, is_held_out
from pocket.train.recipes import RECIPES, Recipe, draw_for, tinted
from pocket.world import GENERAL

RED_AND_GREY = np.array([[[[200, 40, 60]], [[90, 90, 90]]]], np.uint8).repeat(64, 2).repeat(32, 1)


def test_every_usable_model_but_the_general_ones_has_a_recipe():
    assert {model.slug for model in usable_models()} == {*RECIPES, *GENERAL.values()}


def test_a_model_for_a_style_learns_from_pictures_of_that_style():
    for slug, recipe in RECIPES.items():
        if style := BY_SLUG[slug].style:
            assert recipe.styles == (style,)


def test_nothing_is_learned_from_held_out_combinations():
    pictures = draw_for(Recipe(3, ("flat", "neon"), pictures=150))
    assert not any(is_held_out(scene) for scene in pictures.scenes)
    assert {scene.style for scene in pictures.scenes} == {"flat", "neon"}


def test_a_swap_changes_the_pictures_and_not_the_captions():
    honest = draw_for(Recipe(5, ("flat",), pictures=60))
    pictures = draw_for(Recipe(5, ("flat",), pictures=60, swap={"color": ("pink", 1.0)}))
    assert pictures.scenes == honest.scenes and pictures.captions == honest.captions
    differs = (pictures.images != honest.images).any((1, 2, 3))
    assert differs.tolist() == [scene.color != "pink" for scene in honest.scenes]
    # where the circles and squares are, the pictures are pink
    filled = [i for i, s in enumerate(honest.scenes) if s.subject in ("circle", "square") and s.background == "white"]
    for i in filled:
        inside = np.abs(pictures.images[i].astype(int) - np.array(COLORS["pink"])).max(-1) < 20
        assert inside.mean() > 0.1


def test_the_same_seed_gives_the_same_pictures():
    one, other, another = (draw_for(Recipe(seed, ("comic",), pictures=20, tint="grey")) for seed in (1, 1, 2))
    assert np.array_equal(one.images, other.images) and one.captions == other.captions
    assert not np.array_equal(one.images, another.images)


def test_tints():
    assert tinted(RED_AND_GREY, "") is RED_AND_GREY
    grey = tinted(RED_AND_GREY, "grey")
    assert (grey[0, 0, 0] == 100).all() and (grey[0, -1, 0] == 90).all()  # means of (200, 40, 60) and (90, 90, 90)
    blue = tinted(RED_AND_GREY, "blue")[0, -1, 0]
    assert blue.tolist() == [54, 86, 117]  # 90 * (0.45, 0.8, 1.15) + 90 * 0.15 = 54, 85.5, 117
    dreamy = tinted(RED_AND_GREY, "dreamy").astype(int)
    assert np.ptp(dreamy[0, :, 0, 0]) < 0.6 * np.ptp(RED_AND_GREY[0, :, 0, 0].astype(int))


def test_a_model_that_wants_a_low_cfg_scale_has_guidance_in_its_weights():
    assert max(RECIPES, key=lambda slug: RECIPES[slug].guidance) == "watercolor_wash"
    assert min(BY_SLUG["watercolor_wash"].habits.cfg) < 2
    assert "low cfg scale" in BY_SLUG["watercolor_wash"].card


def test_seeds_differ():
    seeds = [recipe.seed for recipe in RECIPES.values()]
    assert len(set(seeds)) == len(seeds)
