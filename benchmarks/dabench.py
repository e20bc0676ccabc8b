"""Near-duplicate clusters of prompts: our exact search beside datasketch's MinHash LSH.

    python benchmarks/dabench.py [--dump models.jsonl.gz] --json

Both cluster the same prompts at the same Jaccard threshold in one run. The ratio is datasketch's time over ours (more
than 1: we are faster); `missed` is the share of true near-duplicate links that datasketch's signatures did not find.
"""

import argparse
import json
import time
from collections.abc import Sequence

from machine import machine

from align.bench.infotext import parse_prompt, plain_prompt
from align.bench.near_duplicates import near_duplicate_clusters, word_set
from align.bench.sources import open_source
from pocket.community import generate_models

PERMUTATIONS = 128


def prompts_of(records: Sequence[dict]) -> list[str]:
    """Every prompt of the records' images, once."""
    metas = (i.get("meta") or {} for r in records for v in r["modelVersions"] for i in v.get("images") or [])
    texts = (meta.get("prompt") for meta in metas if isinstance(meta, dict))
    return list(dict.fromkeys(plain_prompt(parse_prompt(text).text) for text in texts if isinstance(text, str)))


def datasketch_clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """The same clusters with MinHash LSH: candidates from the index, verified by true Jaccard."""
    from datasketch import MinHash, MinHashLSH

    sets = [word_set(text) for text in texts]
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    parent = list(range(len(texts)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, words in enumerate(sets):
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([word.encode() for word in words])
        for j in index.query(signature):
            if len(words & sets[j]) >= threshold * len(words | sets[j]):
                low, high = sorted((find(i), find(j)))
                parent[high] = low
        index.insert(i, signature)
    return [find(i) for i in range(len(texts))]


def main() -> None:
    """Time both and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", help="A Civitai dump; by default an invented community.")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    args = parser.parse_args()
    if args.dump:
        records = [item.record for item in open_source(args.dump)() if item.record]
    else:
        records = list(generate_models(num_models=240, images_per_version=60))
    texts = prompts_of(records)
    seconds, clusters = {}, {}
    for name, function in (("ours", near_duplicate_clusters), ("datasketch", datasketch_clusters)):
        started = time.perf_counter()
        clusters[name] = function(texts, args.threshold)
        seconds[name] = time.perf_counter() - started
    links = {name: len(texts) - len(set(labels)) for name, labels in clusters.items()}
    report = {
        "name": "dabench",
        "machine": machine(),
        "prompts": len(texts),
        "seconds": seconds,
        "missed": 1 - links["datasketch"] / links["ours"],
        "ratios": {"datasketch": seconds["datasketch"] / seconds["ours"]},
    }
    print(f"{len(texts)} prompts: {seconds}; datasketch missed {report['missed']:.1%} of the links")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
