"""The unified metric: numbers worked out by hand, failed scores, saving, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

from rewards.unified import CallScore, Clipped, UnifiedMetric, UnifiedMetricError, per_call

NAN = math.nan


@pytest.fixture
def metric():
    """Ranges 0 to 2, -1 to 3 and 0.2 to 0.4, each a third."""
    scores = {"clip_score": [0.0, 2.0, 1.0], "image_reward": [3.0, -1.0], "hps_v2": [0.2, 0.3, 0.4]}
    return UnifiedMetric.fit(scores, population="three toy calls")


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-6, equal_nan=True)


def test_mean_of_three_normalised_scores(metric):
    # Image 0: 0.5/2, (1+1)/4, 0.1/0.2 -> (0.25 + 0.5 + 0.5) / 3. Image 1: all at the top. Image 2: all at the bottom.
    scored = metric(
        {"clip_score": [0.5, 2.0, 0.0], "image_reward": torch.tensor([1.0, 3.0, -1.0]), "hps_v2": [0.3, 0.4, 0.2]}
    )
    close(scored.values, [1.25 / 3, 1.0, 0.0])
    close(scored.parts["clip_score"], [0.25, 1.0, 0.0])
    close(scored.parts["image_reward"], [0.5, 1.0, 0.0])
    assert scored.values.dtype == torch.float32
    assert scored.failed == 0
    assert set(scored.clipped.values()) == {Clipped(0, 0)}


def test_values_outside_are_clipped_and_counted(metric):
    scored = metric(
        {"clip_score": [-5.0, 9.0, 2.5], "image_reward": [-1.5, 3.0, NAN], "hps_v2": np.array([0.3, 0.3, 0.5])}
    )
    # (0 + 0 + 0.5) / 3 and (1 + 1 + 0.5) / 3; image 2 lacks a score.
    close(scored.values, [0.5 / 3, 2.5 / 3, NAN])
    assert scored.clipped == {
        "clip_score": Clipped(below=1, above=2),
        "image_reward": Clipped(below=1, above=0),
        "hps_v2": Clipped(below=0, above=1),
    }
    assert scored.failed == 1


def test_a_failed_score_never_becomes_a_number(metric):
    for name in metric.scales:
        scores = {other: [1.0, 1.0] for other in metric.scales} | {name: [None, 1.0]}
        scored = metric(scores)
        assert scored.values.isnan().tolist() == [True, False]
        assert scored.parts[name].isnan().tolist() == [True, False]
        assert scored.failed == 1
    assert metric.normalize("clip_score", torch.tensor([NAN, 1.0])).isnan().tolist() == [True, False]


def test_fid_counts_upside_down():
    # ChatGen Eq. 6 on three methods: (1 - norm(FID) + norm(CLIP) + norm(HPS) + norm(ImageReward)) / 4.
    table = {
        "fid": [20.0, 30.0, 60.0],
        "clip_score": [0.7, 0.8, 0.6],
        "hps_v2": [0.25, 0.24, 0.20],
        "image_reward": [0.0, 1.0, -1.0],
    }
    metric = UnifiedMetric.fit(table, population="three methods", lower_is_better=["fid"])
    # Method 0: (1 + 0.5 + 1 + 0.5) / 4; method 1: (0.75 + 1 + 0.8 + 1) / 4; method 2 is the worst everywhere.
    close(metric(table).values, [0.75, 3.55 / 4, 0.0])
    close(metric.normalize("fid", [20.0, 60.0, 10.0, 100.0]), [1.0, 0.0, 1.0, 0.0])
    assert metric(table | {"fid": [10.0, 100.0, 30.0]}).clipped["fid"] == Clipped(below=1, above=1)


def test_weights_are_scaled_to_one():
    scores = {"a": [0.0, 1.0], "b": [0.0, 1.0]}
    metric = UnifiedMetric.fit(scores, population="p", weights={"b": 1, "a": 3})
    assert {name: scale.weight for name, scale in metric.scales.items()} == {"a": 0.75, "b": 0.25}
    close(metric({"a": [1.0, 0.0], "b": [0.0, 1.0]}).values, [0.75, 0.25])


def test_quantiles_keep_outliers_from_squeezing_the_rest():
    # 0, 1, ..., 99 and an outlier: the 1% and 99% quantiles of 101 values are the second and the last but one.
    population = [*range(100), 1e6]
    metric = UnifiedMetric.fit({"a": population}, population="p", quantiles=(0.01, 0.99))
    scale = metric.scales["a"]
    assert (scale.low, scale.high, scale.min, scale.max) == (1.0, 99.0, 0.0, 1e6)
    scored = metric({"a": population})
    close(scored.values[[0, 1, 50, 99, 100]], [0.0, 0.0, 0.5, 1.0, 1.0])
    assert scored.clipped["a"] == Clipped(below=1, above=1)


def test_fitting_leaves_failed_scores_out_and_counts_them():
    metric = UnifiedMetric.fit({"a": torch.tensor([NAN, 1.0, 3.0, NAN], dtype=torch.bfloat16)}, population="p")
    scale = metric.scales["a"]
    assert (scale.low, scale.high, scale.n, scale.missing) == (1.0, 3.0, 2, 2)


def test_order_and_the_company_of_other_images_change_nothing(metric):
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=20) for name in metric.scales}
    together = metric(scores).values
    order = rng.permutation(20)
    assert torch.equal(metric({name: scores[name][order] for name in reversed(scores)}).values, together[order])
    alone = [metric({name: values[i : i + 1] for name, values in scores.items()}).values for i in range(20)]
    assert torch.equal(torch.cat(alone), together)


def test_a_saved_metric_is_the_same(tmp_path):
    rng = np.random.default_rng(0)
    population = {"fid": rng.random(7), "bild-güte": rng.random(30) / 3}
    metric = UnifiedMetric.fit(
        population,
        population="Läufe",
        quantiles=(0.1, 0.9),
        weights={"fid": 1, "bild-güte": 2},
        lower_is_better=["fid"],
    )
    path = tmp_path / "new folder" / "unified.json"
    metric.save(path)
    assert UnifiedMetric.load(path) == metric
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["version"], content["population"], content["quantiles"]) == (1, "Läufe", [0.1, 0.9])
    fid = content["scales"]["fid"]
    assert (fid["n"], fid["missing"], fid["lower_is_better"]) == (7, 0, True)
    assert (fid["min"], fid["max"]) == (population["fid"].min(), population["fid"].max())
    assert (fid["low"], fid["high"]) == tuple(np.quantile(population["fid"], [0.1, 0.9]))


def test_mean_and_standard_error_of_a_call():
    values = torch.tensor([0.1, 0.9, 0.4, NAN, 0.7, NAN])
    scores = per_call(values, ["x", "y", "x", "x", "x", "z"])
    assert list(scores) == ["x", "y", "z"]
    # x: 0.1, 0.4 and 0.7 have mean 0.4, sample variance (0.09 + 0 + 0.09) / 2, and the error is 0.3 / sqrt(3).
    assert scores["x"] == pytest.approx(CallScore(0.4, 0.3 / math.sqrt(3), 3, 1))
    assert scores["y"] == pytest.approx(CallScore(0.9, NAN, 1, 0), nan_ok=True)
    assert scores["z"] == pytest.approx(CallScore(NAN, NAN, 0, 1), nan_ok=True)
    assert per_call([], []) == {}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"hps": [0.5, 0.5, 0.5]}, {}, r"hps: .*range from 0\.5 to 0\.5"),
        ({"hps": [0, 1, 1, 1, 9]}, {"quantiles": (0.25, 0.75)}, "range from 1 to 1 .extremes 0 and 9.*wider quantiles"),
        ({"hps": [-1e308, 1e308]}, {}, "hps: .*can't be scaled"),
        ({"hps": [0.5, NAN]}, {}, r"hps: the population 'p' has 1 usable values \(2 in all\)"),
        ({"hps": []}, {}, r"hps: the population 'p' has 0 usable values"),
        ({"hps": [0.0, 1.0, -math.inf]}, {}, "hps: the score of row 2 is -inf"),
        ({"hps": [[0.0, 1.0]]}, {}, r"hps: scores must have one dimension, but have shape \(1, 2\)"),
        ({"hps": ["good", "bad"]}, {}, "hps: scores must be a sequence of numbers"),
        ({"hps": 3.0}, {}, "hps: scores must be a sequence of numbers"),
        ({}, {}, "at least one scorer"),
        ({"hps": [0, 1]}, {"population": " "}, "`population` must say"),
        ({"hps": [0, 1]}, {"weights": {"hps": 0}}, "hps: the weight must be positive, but is 0"),
        ({"hps": [0, 1]}, {"weights": {"hps": NAN}}, "hps: the weight must be positive, but is nan"),
        ({"hps": [0, 1], "b": [0, 1]}, {"weights": {"hps": 1}}, "one weight per scorer; b has only one"),
        ({"hps": [0, 1]}, {"lower_is_better": ["fid"]}, "`lower_is_better` names fid, which has no scores"),
        ({"hps": [0, 1]}, {"lower_is_better": "hps"}, "put 'hps' in a list"),
        ({"hps": [0, 1]}, {"quantiles": (0.9, 0.1)}, r"`quantiles` must be two increasing numbers .* \(0\.9, 0\.1\)"),
        ({"hps": [0, 1]}, {"quantiles": (0, 99)}, "`quantiles` must be two increasing numbers"),
    ],
)
def test_populations_that_can_not_be_fitted(scores, options, message):
    with pytest.raises(UnifiedMetricError, match=message):
        UnifiedMetric.fit(scores, **{"population": "p"} | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hps_v2": None}, "no scores of hps_v2"),
        ({"pick_score": [1.0, 1.0]}, "not fitted on pick_score; it knows clip_score, image_reward, hps_v2"),
        ({"hps_v2": [0.3]}, "clip_score: 2, image_reward: 2, hps_v2: 1"),
        ({"hps_v2": [0.3, math.inf]}, "hps_v2: the score of row 1 is inf"),
    ],
)
def test_scores_that_do_not_fit_the_metric(metric, changes, message):
    scores = {name: [1.0, 1.0] for name in metric.scales} | changes
    with pytest.raises(UnifiedMetricError, match=message):
        metric({name: values for name, values in scores.items() if values is not None})


def test_other_calls_that_are_refused(metric):
    with pytest.raises(UnifiedMetricError, match="not fitted on fid; it knows clip_score"):
        metric.normalize("fid", [1.0])
    with pytest.raises(UnifiedMetricError, match="got 1 calls and 2 values"):
        per_call([0.5, 0.5], ["x"])
    with pytest.raises(UnifiedMetricError, match="values: the score of row 0 is inf"):
        per_call([math.inf], ["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("format"), "no saved unified metric"),
        (lambda content: content.update(version=2), "version 2, but this program reads 1"),
        (lambda content: content.pop("population"), "`population`: Field required"),
        (lambda content: content.update(extra=1), "`extra`: Unexpected keyword argument"),
        (lambda content: content["scales"]["hps_v2"].pop("low"), "`scales.hps_v2.low`: Field required"),
        (lambda content: content["scales"]["hps_v2"].update(low="0"), "`scales.hps_v2.low`: .*valid number"),
        (lambda content: content["scales"]["hps_v2"].update(low=NAN), "hps_v2: .*range from nan"),
        (lambda content: content["scales"]["hps_v2"].update(low=0.4), "hps_v2: .*range from 0.4 to 0.4"),
        (lambda content: content["scales"]["hps_v2"].update(weight=-1.0), "hps_v2: the weight must be positive"),
        (lambda content: content["scales"].pop("hps_v2"), "weights must add up to 1, but add up to 0.66"),
    ],
)
def test_files_that_are_damaged(metric, tmp_path, change, message):
    path = tmp_path / "unified.json"
    metric.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UnifiedMetricError, match=rf"unified\.json.*{message}"):
        UnifiedMetric.load(path)


def test_files_that_are_none(metric, tmp_path):
    path = tmp_path / "unified.json"
    with pytest.raises(UnifiedMetricError, match=r"Can't read .*unified\.json: No such file"):
        UnifiedMetric.load(path)
    metric.save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UnifiedMetricError, match=r"unified\.json is not JSON"):
        UnifiedMetric.load(path)
    path.write_text("[1]")
    with pytest.raises(UnifiedMetricError, match=r"unified\.json is no saved unified metric"):
        UnifiedMetric.load(path)
