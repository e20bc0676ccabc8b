"""The data card: README.md of a ChatGenBench folder, with the paper's Tables 2 and 3 and distributions as plots."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.bench.chatgen import checks, screening
from align.bench.chatgen.config import ChatGenBenchConfig
from align.bench.chatgen.schema import INPUT_TYPES, chat_text
from align.bench.datacard import explanations
from align.bench.funnel import Funnel
from rewards.files import write_atomically

if TYPE_CHECKING:
    from align.bench.chatgen.build import Summary

PLOTS = (
    ("input type", "Input type (rows)"),
    ("words", "Words of the user (rows)"),
    ("age", "Roles by age (rows)"),
    ("generator", "Written by (rows)"),
    ("chats per model", "Chats per model"),
    ("sampler", "Sampling method (rows)"),
    ("steps", "Sampling steps (rows)"),
    ("cfg", "CFG scale (rows)"),
    ("size", "Picture size (rows)"),
    ("clip skip", "Clip skip (rows)"),
    ("type", "Model type (source)"),
    ("availability", "Availability of versions (source)"),
)
_SPLITS = (
    ("train", "TrainSet"),
    ("test_init", "TestSet Init"),
    ("test", "Benchmark"),
    ("supervised", "Supervised"),
    ("few_shot", "Few-Shot"),
)


def row_distributions(rows: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """What the plots show of the rows."""
    counts: dict[str, Counter[str]] = {key: Counter() for key, _ in PLOTS[:10]}
    models: Counter[str] = Counter()
    for row in rows:
        models[row["model"]] += 1
        counts["input type"][row["input_type"]] += 1
        counts["generator"][row["generator"]] += 1
        counts["words"][str(len(chat_text(row["messages"]).split()) // 10 * 10)] += 1
        counts["age"][str(int(row["role"].rsplit(", ", 1)[1]) // 10 * 10)] += 1
        arguments = row["arguments"]
        counts["sampler"][arguments["sampler"]] += 1
        counts["steps"][str(arguments["steps"])] += 1
        counts["cfg"][f"{arguments['cfg_scale']:g}"] += 1
        counts["size"][f"{arguments['width']}x{arguments['height']}"] += 1
        counts["clip skip"][str(arguments["clip_skip"] or "not said")] += 1
    for count in models.values():
        counts["chats per model"][str(2 ** (count.bit_length() - 1))] += 1
    return counts


def write_card(output: Path, config: ChatGenBenchConfig, funnel: Funnel, summary: "Summary") -> None:
    """Write README.md, with front matter that `datasets` and the Hub understand."""
    screens = {"review": "dropped by the reviewers, or not decided and `unreviewed: drop`"}
    meanings = explanations(config) | screening.EXPLANATIONS | screens
    models, demonstrations = summary.models, summary.demonstrations
    text = f"""---
pretty_name: ChatGenBench
task_categories: [text-generation, image-text-to-text]
tags: [text-to-image, chat, civitai]
---
# ChatGenBench

Freestyle chats, each with the prompt, model and arguments that somebody made the wanted picture with, after ChatGen
(CVPR 2025) Sec. 3.1, built by `python -m align.bench.chatgen`. Options are in `config.yaml`, all counts in
`funnel.json`.

{_rows_table(summary)}

{sum(demonstrations.values()):,} demonstrations ({demonstrations.get("train", 0):,} for training, \
{demonstrations.get("test", 0):,} for testing) of {sum(models.values()):,} models, of which \
{models.get("few_shot", 0):,} have fewer than {config.few_shot_below} demonstrations for training: the setting few_shot.

```python
from datasets import load_from_disk

from rollouts.catalog import Catalog

rows = load_from_disk("chats")["train"]  # train | test
catalog = Catalog.load("catalog.jsonl")  # the models
```

A demonstration is on one side only, with all of its chats. Tested on are the {config.test_share:.0%} of each model's
demonstrations that are least like its others (BERTScore to the nearest), and none whose prompt has a near duplicate
(word overlap of {config.near_duplicate:.0%} or more) anywhere.

## Who wrote the chats

{_generators_table(summary)}

{_problems(summary)}

## What was left out, and why
`test chats` are those of the test split, after the role-play.

{funnel.to_markdown(meanings)}
"""
    if summary.reviewed:
        states = ", ".join(f"{name} {count:,}" for name, count in summary.reviewed["states"].items())
        text += f"\nReviewers' decisions: {states}; {summary.reviewed['kept']:,} kept.\n"
    if config.plots:
        text += "\n## Distributions\n\n![Distributions of the rows and of the source](figures/distributions.png)\n"
    text += """
## Terms
The records are public metadata that users of the community wrote, under the community's terms; each model has its own
licence (`license` in the catalogue). Prompts can name living artists or be untrue. Filters rely on the community's
flags. Roles and chats are invented.
"""
    write_atomically(output / "README.md", text.encode(errors="replace"))


def _rows_table(summary: "Summary") -> str:
    lines = ["| | total | single | multimodal | history |", "|---|---:|---:|---:|---:|"]
    for name, title in _SPLITS:
        counts = summary.rows.get(name, {})
        cells = " | ".join(f"{counts.get(kind, 0):,}" for kind in INPUT_TYPES)
        lines.append(f"| {title} | {sum(counts.values()):,} | {cells} |")
    return "\n".join(lines)


def _generators_table(summary: "Summary") -> str:
    lines = ["| generator | rows | answers paid for | tokens in | tokens out | US$ |", "|---|---:|---:|---:|---:|---:|"]
    for name, count in sorted(summary.generators.items(), key=lambda item: -item[1]):
        cost = summary.costs.get(name)
        cells = "| | | " if cost is None else (
            f"{cost['answers']:,} | {cost['prompt_tokens']:,} | {cost['completion_tokens']:,} | {cost['dollars']:.2f}"
        )  # fmt: skip
        lines.append(f"| {name.replace('|', ' ')} | {count:,} | {cells} |")
    return "\n".join(lines)


def _problems(summary: "Summary") -> str:
    found = summary.chats
    lines = [
        f"{found['asked']:,} chats were asked for; {found['given_up']:,} were given up after the last attempt. Chats "
        "that broke a check and were written anew, by the check:",
        "",
        "| check | chats | meaning |",
        "|---|---:|---|",
    ]
    for name, count in sorted(found["problems"].items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {count:,} | {checks.EXPLANATIONS.get(name, '')} |")
    return "\n".join(lines) if found["problems"] else lines[0].replace(" Chats that broke", " No chat broke")
