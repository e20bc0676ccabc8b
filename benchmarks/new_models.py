"""How well an agent finds models that its policy has never heard of, with 0, 1, 2 or 5 example prompts each.

    python benchmarks/new_models.py --policy runs/from_scratch --dataset data/dabench --json

Takes the models with most training prompts out of the catalogue and puts them back under names that nobody has seen
(`Newcomer 17 - v1`; the old name is struck from the description too). The policy's weights stay as they are. Retrieval
gets k training prompts of each newcomer, and all training prompts of the other models; asked are the newcomers' prompts
in the other splits, which have no near duplicate in training. Right is the newcomer itself, among the whole catalogue.

- `policy`: constrained decoding alone.
- `retrieval`: the most similar model.
- `hybrid`: with the weight of the policy's calibration.json, if it has one.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import machine
from tqdm import tqdm

from align.agents.calibration import Calibration
from align.agents.diffagent import DiffAgent
from align.evaluation.metrics import bootstrap
from align.pairs import load_pairs
from rollouts.catalog import Catalog, CatalogEntry

SHOTS = (0, 1, 2, 5)
ALONE = 1e4  # nats: retrieval decides


def renamed(entry: CatalogEntry, number: int) -> CatalogEntry:
    """The model under a name that nobody has seen."""
    title = entry.name.rsplit(" - ", 1)[0]
    description = entry.description.replace(entry.name, "").replace(title, "")
    return entry.model_copy(update={"name": f"Newcomer {number} - v1", "description": " ".join(description.split())})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--dataset", required=True, help="DABench folder")
    parser.add_argument("--architecture", default="SD 1.5")
    parser.add_argument("--calibration", help="folder of calibration.json; none: the policy's")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    arguments = parser.parse_args()

    catalog = Catalog.load(Path(arguments.dataset) / "catalog.jsonl")
    prompts: defaultdict[str, list[str]] = defaultdict(list)
    pairs = load_pairs(arguments.dataset, arguments.architecture)
    for row in pairs["sft"]:
        prompts[row["api"]["model"]].append(row["instruction"]["prompt"])
    bases = {entry.base_checkpoint for entry in catalog.values()}
    eligible = [name for name, own in prompts.items() if len(own) >= max(SHOTS) and name not in bases]
    chosen = sorted(eligible, key=lambda name: (-len(prompts[name]), name))[: arguments.models]
    new = {name: renamed(catalog[name], number) for number, name in enumerate(chosen)}
    changed = Catalog([new.get(entry.name, entry) for entry in catalog.values()])
    asked = [
        (row["instruction"]["prompt"], new[row["api"]["model"]].name)
        for split in ("rrhf", "eval")
        for row in pairs[split]
        if row["api"]["model"] in new
    ]
    known = [(text, name) for name, own in prompts.items() if name not in new for text in own]

    agent = DiffAgent.from_pretrained(arguments.policy, changed, architecture=arguments.architecture, dtype="float32")
    weight = Calibration.load(arguments.calibration or arguments.policy).retrieval_weight
    ways = {"policy": 0.0, "retrieval": ALONE} | ({"hybrid": weight} if weight else {})
    rows: list[dict[str, Any]] = []
    for shots in SHOTS:
        agent.reload(changed, known + [(text, new[name].name) for name in chosen for text in prompts[name][:shots]])
        for way, value in ways.items():
            if way == "policy" and shots:
                continue  # examples mean nothing to it
            agent.calibration = Calibration(retrieval_weight=value)
            calls = []
            for start in tqdm(range(0, len(asked), arguments.batch_size), desc=f"{way}, {shots} prompts", leave=False):
                calls += agent.call([text for text, _ in asked[start : start + arguments.batch_size]])
            hits = [float(call.model == name) for call, (_, name) in zip(calls, asked, strict=True)]
            rows.append({"way": way, "shots": shots, **bootstrap(hits)._asdict()})
            print(rows[-1], file=sys.stderr)
    result = {"name": "new_models", "machine": machine(), "models": len(chosen), "catalog": len(changed), "rows": rows}
    if arguments.json:
        print(json.dumps(result))
        return
    for row in rows:
        share = f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        print(f"{row['way']:<10} {row['shots']} prompts  {share} of {row['n']}")


if __name__ == "__main__":
    main()
