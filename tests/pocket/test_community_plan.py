"""The plan of the synthetic community; what comes of it is tested with the records."""

import pytest

from pocket.community_plan import apportion, plan


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [(10, [1, 1, 1], [4, 3, 3]), (7, [0.5, 0.3, 0.2], [4, 2, 1]), (0, [1, 2], [0, 0]), (3, [0, 1], [0, 3])],
)
def test_apportion_by_largest_remainder(total, shares, counts):
    # 7 * (.5, .3, .2) = 3.5, 2.1, 1.4: floors 3 + 2 + 1, the seventh goes to .5.
    assert apportion(total, shares) == counts


@pytest.mark.parametrize("kind", ["Checkpoint", "LORA"])
def test_quality_is_spread_evenly_and_downloads_evenly_in_log(kind):
    models = [model for model in plan(60, 1, 0) if model.role.in_scope and model.role.type == kind]
    n = len(models)
    # Quantiles (i + 1/2) / n, and as many models on each side of the geometric mean of 300 and 300 * 500 downloads.
    assert sorted(model.quality for model in models) == pytest.approx([(i + 0.5) / n for i in range(n)])
    assert all(280 < model.downloads < 160_000 for model in models)
    popular = sum(model.downloads > 300 * 500**0.5 for model in models)
    assert abs(popular - n / 2) <= 1


def test_a_repeat_has_an_earlier_prompt_to_repeat():
    for model in plan(60, 8, 3):
        for version in model.versions:
            visible = [image.prompt for image in version.images if image.visibility == "visible"]
            if "repeat" in visible or "near_duplicate" in visible:
                first = min(visible.index(kind) for kind in ("repeat", "near_duplicate") if kind in visible)
                assert "fresh" in visible[:first]
            if "cross_version_repeat" in visible:
                assert version is not model.versions[0]


@pytest.mark.parametrize(
    ("num_models", "images_per_version", "match"),
    [(11, 1, "`num_models` must be at least 12"), (12, 0, "`images_per_version` must be at least 1")],
)
def test_too_small_a_community_is_refused(num_models, images_per_version, match):
    with pytest.raises(ValueError, match=match):
        plan(num_models, images_per_version, 0)
