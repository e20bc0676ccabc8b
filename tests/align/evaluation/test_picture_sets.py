"""FID, Eq. 6 and their intervals, against the paper's own table, the definitions, and loops."""

import numpy as np
import pytest
import torch

from align.evaluation.metrics import bootstrap_runs
from align.evaluation.picture_sets import PAPER, PictureSet, frechet, run_values, set_estimates, unify_sets
from rewards.fid import frechet_distance
from rewards.unified import UnifiedMetric, UnifiedMetricError

TABLE_4 = [  # ChatGen Table 4: FID, CLIP Score, HPS v2, ImageReward, Unified
    (32.7, 64.6, 20.2, -34.6, 37.3), (21.3, 69.9, 23.5, 2.4, 59.0), (20.7, 70.0, 23.4, 1.5, 58.7),
    (20.8, 70.7, 23.9, 4.0, 60.7), (19.1, 72.9, 25.1, 8.9, 65.9), (54.4, 63.4, 20.0, -40.2, 29.7),
    (42.8, 69.1, 23.3, -4.8, 51.1), (41.2, 69.4, 23.4, -4.3, 51.9), (41.4, 70.6, 23.4, -3.1, 52.5),
    (40.7, 72.5, 25.0, 5.1, 59.2),
]  # fmt: skip
RNG = np.random.default_rng(0)


def test_the_papers_ranges_give_the_papers_unified_metric():
    fid, clip, hps, reward, unified = np.array(TABLE_4).T
    scores = {"fid": fid, "clip_score": clip / 100, "hps_v2": hps / 100, "image_reward": reward / 100}
    found = 100 * unify_sets(scores, PAPER)
    # Printed to 0.1; HPS v2 weighs 2.5 per printed unit, so that its rounding alone allows for 0.125.
    assert found == pytest.approx(unified, abs=0.1)
    assert np.abs(found - unified).mean() < 0.05


@pytest.mark.parametrize(("n", "m", "d"), [(5, 9, 30), (50, 60, 8), (5, 60, 8), (40, 6, 8), (2, 2, 3)])
def test_fid_without_covariances_is_fid(n, m, d):
    a, b = RNG.normal(size=(n, d)).astype("f4"), (RNG.normal(size=(m, d)) + 0.3).astype("f4")
    moments = [part for x in (a, b) for part in (x.astype(float).mean(0), np.cov(x.astype(float).T))]
    expected = frechet_distance(*(torch.from_numpy(part) for part in moments))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_in_one_dimension_by_hand():
    # Means 1 and 4, deviations (n - 1) sqrt(2) and sqrt(8): 9 + (sqrt 8 - sqrt 2)² = 11.
    assert frechet(np.array([[0.0], [2.0]]), np.array([[2.0], [6.0]])) == pytest.approx(11)


def make_set(n=12, *, shift=0.0, without=(), first=0):
    chats = tuple(f"{i:03}" for i in range(first, first + n))
    scores = RNG.uniform(size=(n, 2))
    position = np.full(n, -1)
    there = [i for i in range(n) if i not in without]
    position[there] = np.arange(len(there))
    shape = (len(there), 2, 3)
    return PictureSet(scores, chats, RNG.normal(size=shape) + shift, RNG.normal(size=shape), position)


METRIC = UnifiedMetric.fit({"a": [0, 1], "b": [-1, 1], "fid": [0, 20]}, population="a test", lower_is_better=["fid"])


def eq_6(a, b, fid):
    return (np.clip(a, 0, 1) + np.clip((b + 1) / 2, 0, 1) + 1 - np.clip(fid / 20, 0, 1)) / 3


def test_values_by_hand():
    some = make_set(without=(3, 7))
    found = set_estimates([some], ["a", "b"], METRIC, resamples=10)
    fid = frechet(some.features.reshape(-1, 3), some.references.reshape(-1, 3))
    assert (found["fid"].value, found["fid"].n) == (pytest.approx(fid), 10)
    assert found["a"] == bootstrap_runs([some.scores[:, 0]])
    expected = eq_6(*some.scores.mean(0), fid)
    assert (found["unified"].value, found["unified"].n) == (pytest.approx(expected, abs=1e-6), 12)
    assert run_values(some, ["a", "b"], METRIC)["unified"] == pytest.approx(expected, abs=1e-6)


def test_a_part_of_the_chats():
    some = make_set(without=(3, 7))
    part = some.take(np.array([2, 3, 9]))
    rows = [some.position[2], some.position[9]]
    assert part.num_compared == 2 and len(part) == 3 and part.chats == ("002", "003", "009")
    assert part.fid() == frechet(some.features[rows].reshape(-1, 3), some.references[rows].reshape(-1, 3))
    assert np.isnan(some.take(np.array([3, 9])).fid())  # a single chat that has a reference


@pytest.mark.parametrize("first", [0, 5, 12])  # all of the first run's chats in the second, some, none
def test_two_level_bootstrap_against_a_loop(first):
    """Runs are drawn, and chats for all of them; FIDs of a run are moved by the bias of its resamples; all parts have
    one resample."""
    runs = [make_set(), make_set(20, shift=1.0, first=first)]
    found = set_estimates(runs, ["a", "b"], METRIC, resamples=60)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2, (60, 2))
    names = sorted({*runs[0].chats, *runs[1].chats})
    resampled = {}
    for i, slots in enumerate(drawn):
        chosen = [names[n] for n in rng.integers(0, len(names), len(names))]
        for slot, run in enumerate(slots):
            some = runs[run].take(np.array([runs[run].chats.index(name) for name in chosen if name in runs[run].chats]))
            resampled[i, slot] = (run, some.scores.mean(0), some.fid())
    values = [part.fid() for part in runs]
    bias = [np.mean([fid for r, _, fid in resampled.values() if r == run]) - values[run] for run in (0, 1)]
    assert min(bias) > 0  # why they are moved
    fids, unified = [], []
    for i in range(60):
        moved = [(means, fid - bias[r]) for r, means, fid in (resampled[i, j] for j in (0, 1))]
        fids.append(np.mean([max(0, fid) for _, fid in moved]))
        unified.append(np.mean([eq_6(*means, max(0, fid)) for means, fid in moved]))
    assert found["fid"][:3] == pytest.approx((np.mean(values), *np.quantile(fids, [0.025, 0.975])))
    expected = np.mean([eq_6(*part.scores.mean(0), fid) for part, fid in zip(runs, values, strict=True)])
    assert found["unified"][:3] == pytest.approx((expected, *np.quantile(unified, [0.025, 0.975])), abs=1e-6)
    assert found["unified"].n == 32 and found["fid"].low <= found["fid"].value <= found["fid"].high


def test_without_fid():
    some = PictureSet(RNG.uniform(size=(5, 2)), tuple("abcde"))
    metric = UnifiedMetric.fit({"a": [0, 1], "b": [-1, 1]}, population="a test")
    found = set_estimates([some], ["a", "b"], metric, resamples=10)
    assert set(found) == {"a", "b", "unified"}
    a, b = some.scores.mean(0)
    assert found["unified"].value == pytest.approx((a + (b + 1) / 2) / 2, abs=1e-6)
    assert set(set_estimates([some], ["a", "b"], METRIC, resamples=10)) == {"a", "b"}  # which needs FID
    with pytest.raises(ValueError, match="have no features"):
        some.fid()


def test_the_papers_metric_can_be_saved(tmp_path):
    PAPER.save(tmp_path / "paper.json")
    assert UnifiedMetric.load(tmp_path / "paper.json") == PAPER
    with pytest.raises(UnifiedMetricError, match="not fitted on lpips"):
        PAPER.normalize("lpips", [1.0])
