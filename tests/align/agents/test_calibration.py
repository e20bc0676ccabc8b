"""Thresholds beside a naive search, and files that can't be used."""

import random

import pytest

from align.agents.calibration import Calibration, CalibrationError, threshold_for


def test_the_lowest_threshold_that_is_good_enough():
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randint(1, 12)
        confidences = [generator.choice([0.1, 0.2, 0.4, 0.5, 0.8, 0.9]) for _ in range(n)]
        right = [generator.random() < 0.6 for _ in range(n)]
        target = generator.choice([0.3, 0.5, 0.75, 1.0])
        good = []
        for threshold in set(confidences):
            given = [r for c, r in zip(confidences, right, strict=True) if c >= threshold]
            if sum(given) / len(given) >= target:
                good.append(threshold)
        assert threshold_for(confidences, right, target) == min(good, default=1.0)


def test_kept_with_the_policy(tmp_path):
    assert Calibration.load(tmp_path) == Calibration(0.0, 0.0)
    Calibration(0.3, 12.0, 4.0, {"rows": 40}).save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded == Calibration(0.3, 12.0, 4.0) and loaded.measured == {"rows": 40}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no calibration"),
        ("[]", "is no calibration"),
        ('{"treshold": 1}', "is no calibration.*treshold"),
        ('{"threshold": 2}', "`threshold` must be 0 to 1, but is 2"),
        ('{"threshold": "0.5"}', "`threshold` must be a number"),
        ('{"retrieval_weight": -1}', "`retrieval_weight` must be a number of at least 0"),
        ('{"temperature": 0}', "`temperature` must be above 0"),
        ('{"retrieval_weight": NaN}', "`retrieval_weight` must be a number of at least 0"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(CalibrationError, match=f"calibration.json.*{message}"):
        Calibration.load(tmp_path)
