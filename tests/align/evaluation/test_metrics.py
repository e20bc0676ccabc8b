"""Numbers of the evaluation tables, against closed forms and against sums worked out by hand."""

import math

import numpy as np
import pytest

from align.evaluation.metrics import (
    argument_accuracy,
    bootstrap,
    bootstrap_runs,
    hallucination,
    selection_accuracy,
    selection_entropy,
)
from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogEntry, Judged

DEFAULTS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7}


@pytest.fixture
def catalog():
    """Two versions of model 1, one of model 2, an SDXL checkpoint."""

    def entry(name, version_id, model_id, **changes):
        row = {"name": name, "version_id": version_id, "model_id": model_id, "type": "Checkpoint"}
        return CatalogEntry.model_validate(row | {"base_model": "SD 1.5", "default_parameters": DEFAULTS} | changes)

    xl = {"base_model": "SDXL 1.0", "default_parameters": DEFAULTS | {"width": 1024, "height": 1024}}
    return Catalog([entry("A - v1", 1, 1), entry("A - v2", 2, 1), entry("B - v1", 3, 2), entry("XL - v1", 4, 3, **xl)])


def api(model="A - v1", **changes):
    names = {"method": "sampling method", "steps": "sampling steps", "cfg": "cfg scale", "base": "base Model"}
    fields = {"model": model, "type": "Checkpoint", "base Model": "SD 1.5", **DEFAULTS, "model description": ""}
    return fields | {names.get(key, key): value for key, value in changes.items()}


def good(**changes):
    return Judged(APICall.from_dict(api(**changes)), None)


@pytest.mark.parametrize("n", [1, 2, 30, 1501])
def test_interval_against_a_loop(n):
    data = np.random.default_rng(n).normal(size=n)
    rng = np.random.default_rng(0)
    means = [data[rng.integers(0, n, n)].mean() for _ in range(2000)]
    assert bootstrap(data.tolist()) == (data.mean(), *np.quantile(means, [0.025, 0.975]), n)


@pytest.mark.parametrize(("ones", "n"), [(120, 400), (500, 1000), (20, 1000)])
def test_interval_of_a_share_against_the_normal_approximation(ones, n):
    """mean +- 1.96 sqrt(p (1 - p) / n); the quantiles of 2,000 resamples are good to a few per cent of its width."""
    estimate = bootstrap([1.0] * ones + [0.0] * (n - ones))
    p = ones / n
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert (estimate.value, estimate.n) == (p, n)
    assert estimate.low == pytest.approx(p - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(p + half, abs=0.15 * half)


def test_interval_of_a_mean_against_the_normal_approximation():
    values = np.random.default_rng(3).normal(5.0, 2.0, 500)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(500)
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.08)
    assert bootstrap(values * 10 + 1).low == pytest.approx(estimate.low * 10 + 1)  # moves and scales with the data


def test_degenerate_means():
    assert bootstrap([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0, 3)
    assert bootstrap([0.25]) == (0.25, 0.25, 0.25, 1)
    assert bootstrap([0, 1]) == (0.5, 0.0, 1.0, 2)  # resamples of two: a quarter are 0, a quarter 1
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_the_same_values_have_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.3, 0.9] * 10
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)


def test_hallucination_share_and_reasons():
    reasons = [None, "not_json", None, "unknown_model", "not_json", None, None, None]
    share, counts = hallucination([Judged(None, reason) for reason in reasons])
    assert (share.value, share.n) == (3 / 8, 8)
    assert share.low < 3 / 8 < share.high
    assert list(counts.items()) == [("not_json", 2), ("unknown_model", 1)]  # most frequent first
    assert hallucination([Judged(None, None)] * 4) == ((0.0, 0.0, 0.0, 4), {})
    with pytest.raises(ValueError, match="no values"):
        hallucination([])


def test_selection_accuracy(catalog):
    judged = [
        good(model="A - v1"),  # the very version
        good(model="A - v2"),  # another version of the same model
        good(model="B - v1"),  # another model
        Judged(APICall.from_dict(api("A - v1", type="LoRA")), "model_type_mismatch"),  # a hallucination misses
        Judged(None, "not_json"),
        good(model="B - v1"),  # asked for one that is gone from the catalogue
        good(model="B - v1"),
        good(model="B - v1"),
    ]
    wanted = ["A - v1", "A - v1", "A - v1", "A - v1", "A - v1", "Gone - v1", "B - v1", "A - v2"]
    accuracy = selection_accuracy(judged, [api(name) for name in wanted], catalog)
    assert accuracy["version"].value == 2 / 8
    assert accuracy["model"].value == 3 / 8
    assert accuracy["version"].n == accuracy["model"].n == 8
    with pytest.raises(ValueError):
        selection_accuracy(judged, [], catalog)  # one reference per answer


def test_a_hallucinated_model_is_not_the_one_that_is_gone(catalog):
    """Neither is in the catalogue, and nothing is not equal to nothing."""
    accuracy = selection_accuracy([Judged(APICall.from_dict(api("X")), "unknown_model")], [api("Gone")], catalog)
    assert (accuracy["version"].value, accuracy["model"].value) == (0.0, 0.0)


def test_argument_accuracy():
    reference = api(cfg=7.0)
    judged = [
        good(),  # 5 of 5; 7 equals 7.0
        good(model="B - v1", width=640, height=640),  # 3 of 5, whatever the model
        good(method="Euler", steps=21, cfg=7.5),  # 2 of 5
        Judged(APICall.from_dict(api("C - v1", steps=25)), "unknown_model"),  # 4 of 5: still a call
        Judged(None, "unknown_sampler"),  # no call: 0 of 5
    ]
    estimate = argument_accuracy(judged, [reference] * 5)
    assert estimate.value == pytest.approx((5 + 3 + 2 + 4 + 0) / 25)
    assert estimate.n == 5
    assert argument_accuracy(judged[:1], [reference]).value == 1.0


def test_runs_are_drawn_before_their_items():
    # Two runs without spread inside: a resample is (0, 0), (0, 1), (1, 0) or (1, 1).
    estimate = bootstrap_runs([[0.0, 0.0], [1.0]])
    assert estimate == (0.5, 0.0, 1.0, 3)
    assert bootstrap_runs([[1.0, 2.0, 6.0]]) == bootstrap([1.0, 2.0, 6.0])
    # A normal approximation of the same: variance of the mean of 30 run means, each over 50 items.
    rng = np.random.default_rng(0)
    runs = rng.normal(0, 1, (30, 1)) + rng.normal(0, 1, (30, 50))
    estimate = bootstrap_runs(runs.tolist())
    spread = np.sqrt((runs.mean(1).var() + (runs.var(1) / 50).mean()) / 30)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * spread, rel=0.06)
    for empty in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="A mean of no values"):
            bootstrap_runs(empty)


def test_items_that_runs_share_are_drawn_for_all_of_them():
    values = np.random.default_rng(0).normal(size=200).tolist()
    names = [str(i) for i in range(200)]
    # The same run five times says no more of other items than it says once.
    width = 2 * 1.96 * np.std(values) / np.sqrt(200)
    for count in (2, 5):
        estimate = bootstrap_runs([values] * count, items=[names] * count)
        assert estimate.high - estimate.low == pytest.approx(width, rel=0.06)
        alone = bootstrap_runs([values] * count)
        assert alone.high - alone.low == pytest.approx(width / np.sqrt(count), rel=0.06)
    # What the items are called and how they are ordered is nothing to it, nor is it a single run's.
    turned = bootstrap_runs([values, values[::-1]], items=[names, names[::-1]])
    assert turned == pytest.approx(bootstrap_runs([values] * 2, items=[names] * 2))
    assert bootstrap_runs([values], items=[names]) == bootstrap(values)


def test_partly_shared_items_against_a_loop():
    runs = [{"a": 1.0, "b": 5.0, "c": 2.0}, {"d": 9.0, "b": 4.0}]
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, 2, (400, 2))
    means = []
    for slots, times in zip(drawn, rng.multinomial(4, [1 / 4] * 4, 400), strict=True):
        chosen = [name for name, count in zip("abcd", times, strict=True) for _ in range(count)]
        of_slots = [[runs[run][name] for name in chosen if name in runs[run]] for run in slots]
        means.append(np.mean([np.mean(found or [*runs[r].values()]) for r, found in zip(slots, of_slots, strict=True)]))
    expected = (np.mean([8 / 3, 6.5]), *np.quantile(means, [0.025, 0.975]), 5)
    values, items = [[*run.values()] for run in runs], [[*run] for run in runs]
    assert bootstrap_runs(values, items=items, seed=3, resamples=400) == pytest.approx(expected)


def test_selection_entropy():
    assert selection_entropy(["a", "b", "c", "d"]) == pytest.approx(np.log(4))
    assert selection_entropy(["a", "a", "a", "b"]) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert str(selection_entropy(["a", "a"])) == "0.0" and selection_entropy([]) == 0
