"""The near-duplicate search against all pairs, and splits that keep clusters whole."""

import random
from collections import Counter, defaultdict

import pytest

from align.bench.near_duplicates import assign_splits, near_duplicate_clusters, word_set


def jaccard(a, b):
    """Overlap of two texts' word sets, by definition; two texts without words are equal."""
    a, b = word_set(a), word_set(b)
    return len(a & b) / len(a | b) if a | b else 1.0


def clusters_of_all_pairs(texts, threshold):
    """Connected components over every pair, by breadth-first search."""
    links = defaultdict(set)
    for i, a in enumerate(texts):
        for j in range(i):
            if jaccard(a, texts[j]) >= threshold - 1e-12:
                links[i].add(j)
                links[j].add(i)
    cluster = {}
    for i in range(len(texts)):
        queue = [] if i in cluster else [i]
        while queue:
            j = queue.pop()
            cluster[j] = i
            queue += [k for k in links[j] if k not in cluster]
    return [cluster[i] for i in range(len(texts))]


def random_prompts(count, seed):
    """Prompts of 0 to 12 words out of 60; half of them are another one with a few words changed."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    prompts = [" ".join(rng.choices(words, k=rng.randrange(13))) for _ in range(count // 2)]
    for _ in range(count - len(prompts)):
        changed = rng.choice(prompts).split()
        for _ in range(rng.randrange(3)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.choice(words)
        rng.shuffle(changed)
        prompts.append(", ".join(changed).upper())
    rng.shuffle(prompts)
    return prompts


@pytest.mark.parametrize("threshold", [0.5, 2 / 3, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_finds_exactly_what_all_pairs_find(threshold, seed):
    prompts = random_prompts(400, seed)
    found = near_duplicate_clusters(prompts, threshold)
    assert found == clusters_of_all_pairs(prompts, threshold)
    assert len(set(found)) < len(prompts)


def test_hand_computed_overlaps():
    texts = ["a b c d e", "a b c d f", "E, d; C b A!", "x", "", "...", "狐 猫"]
    # 4 of 6 words in common: 0.67. The third has the words of the first.
    assert near_duplicate_clusters(texts, 0.7) == [0, 1, 0, 3, 4, 4, 6]
    assert near_duplicate_clusters(texts, 4 / 6) == [0, 0, 0, 3, 4, 4, 6]


def test_clusters_are_chains():
    texts = ["a b c d", "b c d e", "c d e f", "z"]  # neighbours share 3 of 5, the ends 2 of 6
    assert near_duplicate_clusters(texts, 0.6) == [0, 0, 0, 3]


def test_no_texts():
    assert near_duplicate_clusters([], 0.8) == []
    assert assign_splits([], [], sft_share=0.8, rrhf_share=0.1) == []


# Splits


def many_rows(count=3000, seed=0):
    """Row ids and clusters of 1 to 6 rows."""
    rng = random.Random(seed)
    clusters = []
    while len(clusters) < count:
        clusters += [len(clusters)] * rng.choice((1, 1, 1, 2, 3, 6))
    clusters = clusters[:count]
    rng.shuffle(clusters)
    return [f"id-{i}" for i in range(count)], clusters


def split(ids, clusters, seed=0, **shares):
    return assign_splits(ids, clusters, **({"sft_share": 0.8, "rrhf_share": 0.1} | shares), seed=seed)


@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.6, 0.2), (1.0, 0.0), (0.0, 0.0), (0.5, 0.5)])
def test_shares_hold_within_one_percent_and_clusters_stay_whole(shares):
    ids, clusters = many_rows()
    splits = split(ids, clusters, sft_share=shares[0], rrhf_share=shares[1])
    counts = Counter(splits)
    for name, share in zip(("sft", "rrhf", "eval"), (*shares, 1 - sum(shares)), strict=True):
        assert abs(counts[name] / len(ids) - share) <= 0.01
    assert len({(cluster, name) for cluster, name in zip(clusters, splits, strict=True)}) == len(set(clusters))


def test_order_of_rows_and_names_of_clusters_do_not_matter():
    ids, clusters = many_rows()
    expected = dict(zip(ids, split(ids, clusters), strict=True))
    order = list(range(len(ids)))
    random.Random(1).shuffle(order)
    shuffled = [ids[i] for i in order]
    renamed = [10_000 - clusters[i] for i in order]
    assert dict(zip(shuffled, split(shuffled, renamed), strict=True)) == expected


def test_a_seed_is_a_split():
    ids, clusters = many_rows()
    assert split(ids, clusters, seed=1) == split(ids, clusters, seed=1)
    differing = sum(a != b for a, b in zip(split(ids, clusters, seed=1), split(ids, clusters, seed=2), strict=True))
    # Independent 8:1:1 splits agree on 0.64 + 0.01 + 0.01 of the rows.
    assert 0.29 < differing / len(ids) < 0.39


def test_new_rows_move_few_others():
    ids, clusters = many_rows()
    before = split(ids, clusters)
    after = split([*ids, "new-1", "new-2"], [*clusters, 90_001, 90_002])[: len(ids)]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 0.01 * len(ids)


def test_a_giant_cluster_trains():
    ids = [f"id-{i}" for i in range(1000)]
    clusters = [0] * 11 + list(range(11, 1000))
    for seed in range(30):
        splits = split(ids, clusters, seed=seed)
        assert set(splits[:11]) == {"sft"}
        assert Counter(splits) == {"sft": 800, "rrhf": 100, "eval": 100}


def test_one_cluster_is_one_split():
    assert split(["a", "b", "c"], [0, 0, 0]) == ["sft"] * 3
    assert split(["a"], [0]) == ["sft"]
