"""Sampler names in both of A1111's conventions (PR A1111#15333 split name and schedule in 1.9)."""

import pytest

from rollouts.samplers import AUTOMATIC_SCHEDULE, KNOWN_SAMPLERS, SAMPLERS, normalize_sampler


@pytest.mark.parametrize(
    ("name", "schedule", "version", "expected"),
    [
        # One piece, before 1.9
        ("DPM++ 2M Karras", None, None, "DPM++ 2M Karras"),
        ("DPM++ 2M", None, None, "DPM++ 2M"),
        ("DPM++ 2M", None, "v1.6.0", "DPM++ 2M"),
        ("DPM++ 2M", None, "1.8.0-RC", "DPM++ 2M"),
        ("DPM++ SDE Karras", None, "v1.9.4", "DPM++ SDE Karras"),
        # Two fields, since 1.9
        ("DPM++ 2M", "Karras", "v1.9.0", "DPM++ 2M Karras"),
        ("DPM++ 2M", "Uniform", "v1.9.0", "DPM++ 2M"),
        ("DPM++ 2M", "Automatic", "v1.9.0", "DPM++ 2M Karras"),
        ("DPM++ 2M", None, "v1.9.0", "DPM++ 2M Karras"),
        ("DPM++ 2M", None, "v1.10.1", "DPM++ 2M Karras"),  # 1.10 is later than 1.9
        ("Euler", "SGM Uniform", None, "Euler SGM Uniform"),
        ("Euler", "Beta", None, "Euler Beta"),
        ("DPM++ 2M Karras", "Automatic", "v1.9.0", "DPM++ 2M Karras"),
        # What "Automatic" stands for
        ("DPM++ SDE", "Automatic", None, "DPM++ SDE Karras"),
        ("DPM++ 2S a", "Automatic", None, "DPM++ 2S a Karras"),
        ("DPM2", "Automatic", None, "DPM2 Karras"),
        ("DPM2 a", "Automatic", None, "DPM2 a Karras"),
        ("DPM++ 2M SDE", "Automatic", None, "DPM++ 2M SDE Exponential"),
        ("DPM++ 3M SDE", "Automatic", None, "DPM++ 3M SDE Exponential"),
        ("Euler a", "Automatic", None, "Euler a"),
        ("LCM", "Automatic", None, "LCM"),
        # Forge names its own version first and A1111's after it
        ("DPM++ 2M", None, "f2.0.1v1.10.1-previous-669-gdfdcbab6", "DPM++ 2M Karras"),
        ("DPM++ 2M", None, "f0.0.17v1.8.0rc-latest-276-g29be1da7", "DPM++ 2M"),
        ("DPM++ 2M", None, "v1.10.1.5", "DPM++ 2M Karras"),  # the fourth number starts no version of its own
        # Versions of other programs
        ("DPM++ 2M", None, "ComfyUI", "DPM++ 2M"),
        ("DPM++ 2M", None, "", "DPM++ 2M"),
        # Samplers with time steps of their own have no schedule
        ("DDIM", "Karras", "v1.9.0", "DDIM"),
        ("UniPC", "Automatic", None, "UniPC"),
        ("Restart", "Karras", None, "Restart"),
        ("DDIM Karras", None, None, None),
        # Case and spaces
        ("  dpm++  2m\tKARRAS ", None, None, "DPM++ 2M Karras"),
        ("euler A", " automatic ", None, "Euler a"),
        ("EULER", "sgm  uniform", None, "Euler SGM Uniform"),
        # Extensions and typing errors
        ("DPM++ 2M Karras v2", None, None, None),
        ("DPM++ 2M Karras Sharp", None, None, None),
        ("DPM++ 2M alt Karras", None, None, None),
        ("k_euler_a", None, None, None),
        ("Karras", None, None, None),
        ("", None, None, None),
        ("DPM++ 2M", "Align Your Dreams", None, None),
        ("DPM++ 2M", "", None, None),
    ],
)
def test_normalize(name, schedule, version, expected):
    assert normalize_sampler(name, schedule, version) == expected


def test_every_canonical_name_stays_as_it_is():
    assert len(KNOWN_SAMPLERS) > 100
    for name in KNOWN_SAMPLERS:
        assert normalize_sampler(name) == name
        assert normalize_sampler(name.upper(), version="v1.6.0") == name


def test_every_combination_gives_a_canonical_name():
    for sampler in SAMPLERS:
        for schedule in ("Karras", "Automatic", "Uniform", "Simple", "KL Optimal", None):
            assert normalize_sampler(sampler, schedule, "v1.9.0") in KNOWN_SAMPLERS
    assert set(AUTOMATIC_SCHEDULE) <= set(SAMPLERS)
