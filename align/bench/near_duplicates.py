"""Near-duplicate prompts and splits that keep them together (DESIGN 4, step 7).

People reuse prompts: a random split would put copies of a training prompt into the evaluation set. Two prompts are near
duplicates if the Jaccard overlap of their word sets reaches a threshold; clusters are the connected components. The
search is exact (an AllPairs/PPJoin prefix filter, Bayardo et al. 2007), not probabilistic as MinHash is, so "splits are
disjoint" is a fact one can check.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
# A cluster with more than this share of all rows would upset the shares of the small splits.
MAX_SPLIT_CLUSTER = 0.01


def word_set(text: str) -> frozenset[str]:
    """The distinct lower-case words of a text."""
    return frozenset(_WORD.findall(text.lower()))


def near_duplicate_clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """Cluster texts whose word sets overlap.

    Args:
        texts: Any number; memory is proportional to their distinct words.
        threshold: Jaccard overlap from which two texts are linked, in (0, 1].

    Returns:
        A cluster number per text: the index of the cluster's first text.
    """
    parent = list(range(len(texts)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def union(i: int, j: int) -> None:
        i, j = sorted((find(i), find(j)))
        parent[j] = i

    first_with: dict[frozenset[str], int] = {}
    for i, text in enumerate(texts):
        union(i, first_with.setdefault(word_set(text), i))
    frequency = Counter(word for words in first_with for word in words)
    # Rare words first: two sets that overlap enough share at least one word of such a short prefix.
    rank = {word: r for r, (word, _) in enumerate(sorted(frequency.items(), key=lambda item: (item[1], item[0])))}
    by_size = sorted((sorted(rank[word] for word in words), i) for words, i in first_with.items() if words)
    by_size.sort(key=lambda item: len(item[0]))
    sets = [set(words) for words, _ in by_size]
    seen_with: defaultdict[int, list[int]] = defaultdict(list)
    for k, (words, i) in enumerate(by_size):
        smallest = math.ceil(threshold * len(words) - 1e-9)
        prefix = words[: len(words) - smallest + 1]
        for other in {other for word in prefix for other in seen_with[word]}:
            if len(sets[other]) < smallest or find(by_size[other][1]) == find(i):
                continue
            shared = len(sets[k] & sets[other])
            if shared >= threshold * (len(sets[k]) + len(sets[other]) - shared) - 1e-9:
                union(i, by_size[other][1])
        for word in prefix:
            seen_with[word].append(k)
    return [find(i) for i in range(len(texts))]


def assign_splits(
    ids: Sequence[str], clusters: Sequence[int], *, sft_share: float, rrhf_share: float, seed: int = 0
) -> list[str]:
    """Assign `sft`, `rrhf` or `eval` to each row, whole clusters at a time.

    Clusters stand in the order of a hash of their smallest row id; the first ones fill `eval`, the next ones `rrhf`,
    the rest is `sft`. So the split does not depend on the order of the rows, and adding rows moves few others. Very
    large clusters go to `sft` at once.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, cluster in enumerate(clusters):
        members[cluster].append(i)

    def key(rows: list[int]) -> bytes:
        return hashlib.sha256(f"{seed}\0{min(ids[i] for i in rows)}".encode()).digest()

    quota = {"eval": round((1 - sft_share - rrhf_share) * len(ids)), "rrhf": round(rrhf_share * len(ids))}
    splits = ["sft"] * len(ids)
    for rows in sorted(members.values(), key=key):
        if len(rows) > max(1, MAX_SPLIT_CLUSTER * len(ids)) and len(members) > 1:
            continue
        # A cluster that would overshoot is left for the next split, so shares hold to within one cluster.
        name = next((name for name, left in quota.items() if len(rows) <= left), None)
        if name is not None:
            quota[name] -= len(rows)
            for i in rows:
                splits[i] = name
    return splits
