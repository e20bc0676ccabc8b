"""The data card: README.md of a DABench folder, with the distributions of DiffAgent Fig. 2 as plots."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.bench.config import CollectionConfig, DABenchConfig
from align.bench.filters import availability_rules, model_rules, quality_rules
from align.bench.funnel import Funnel
from rewards.files import write_atomically

# Rules that are no `Rule` objects, because they need more than one record.
EXPLANATIONS = {
    "invalid_json": "the line or file is not JSON, or nests too deep",
    "malformed_record": "not the shape of a Civitai model",
    "malformed_version": "not the shape of a Civitai model version",
    "malformed_image": "not the shape of a Civitai image",
    "image_nsfw": "the image is flagged above safe",
    "not_a_picture": "a video",
    "meta_missing": "no generation data",
    "prompt_missing": "no prompt, or not text",
    "prompt_too_long": "the prompt is longer than `max_prompt_chars`",
    "sampler_missing": "no sampler",
    "sampler_unknown": "not an A1111 sampler (one of an extension, mostly)",
    "steps_invalid": "steps missing, no whole number, or out of bounds",
    "cfg_invalid": "cfg scale missing, no number, or out of bounds",
    "size_missing": "no picture size",
    "size_out_of_range": "a size the architecture gives no good pictures at",
    "image_to_image": "made from another image, not from text alone",
    "other_network": "also uses a hypernetwork",
    "several_loras": "several LoRAs: evidence for none of them",
    "other_lora": "made with another LoRA than its gallery's",
    "lora_not_named": "a LoRA gallery's image that names no LoRA",
    "checkpoint_with_lora": "a checkpoint's image that also uses a LoRA",
    "checkpoint_hash_missing": "does not say which checkpoint it was made with",
    "base_unresolved": "made with a checkpoint that is not in the source",
    "base_unavailable": "made with a checkpoint that can't be called (pickle only, failed scan, ...)",
    "base_ambiguous": "its short hash fits several checkpoints",
    "base_of_other_architecture": "LoRA and checkpoint are of different architectures",
    "outdated": "newer versions of the model are there (`newest_versions`)",
    "below_quality": "its version broke a quality rule",
    "duplicate": "same prompt, same version",
}
PLOTS = (
    ("type", "Model type"),
    ("base model", "Base model of versions"),
    ("nsfw", "NSFW flag of models"),
    ("availability", "Availability of versions"),
    ("downloads", "Downloads (available versions)"),
    ("likes", "Likes (models of available versions)"),
    ("ratings", "Number of ratings (available versions)"),
    ("sampler", "Sampling method (rows)"),
    ("steps", "Sampling steps (rows)"),
    ("cfg", "CFG scale (rows)"),
    ("size", "Picture size (rows)"),
)
MAX_BARS = 12


def explanations(config: CollectionConfig) -> dict[str, str]:
    """What each rule of the funnel means."""
    rules = [*model_rules(config), *availability_rules(config), *quality_rules(config, {})]
    return EXPLANATIONS | {rule.name: rule.text for rule in rules}


def row_distributions(rows: Any) -> dict[str, Counter[str]]:
    """Samplers, steps, cfg scales and sizes of the kept rows."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("sampler", "steps", "cfg", "size")}
    for row in rows:
        counts["sampler"][row["sampler"]] += 1
        counts["steps"][str(row["steps"])] += 1
        counts["cfg"][f"{row['cfg_scale']:g}"] += 1
        counts["size"][f"{row['width']}x{row['height']}"] += 1
    return counts


def draw_distributions(
    distributions: dict[str, Counter[str]], path: Path, plots: Sequence[tuple[str, str]] = PLOTS
) -> None:
    """All distributions as one PNG of bar charts; bars beyond the most frequent ones are summed up.

    Raises:
        ImportError: Without matplotlib, naming the extra to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "t2i-align[bench]", or set `plots: false`.') from error
    import io

    shown = [(key, title) for key, title in plots if distributions.get(key)]
    columns = 3
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (key, title) in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, position)
        labels, values = zip(*_bars(distributions[key]), strict=True)
        positions = range(len(labels))
        axes.barh(positions, values, color="#4c72b0")
        # "$" would start a formula, and the labels come from the internet.
        axes.set_yticks(positions, [label.replace("$", r"\$") for label in labels])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    write_atomically(path, buffer.getvalue())


def _bars(counts: Counter[str]) -> list[tuple[str, int]]:
    """Bars of one chart: numbers and magnitudes in their order, names by frequency."""
    top = counts.most_common(MAX_BARS)
    rest = sum(counts.values()) - sum(value for _, value in top)
    with contextlib.suppress(ValueError):  # names: by frequency, as they are
        top.sort(key=lambda item: -1.0 if item[0] == "hidden" else float(item[0]))
    return [(label[:28], value) for label, value in top] + ([("others", rest)] if rest else [])


def write_data_card(
    output: Path, config: DABenchConfig, funnel: Funnel, summary: dict[str, Any], has_plots: bool
) -> None:
    """Write README.md, with front matter that `datasets` and the Hub understand."""
    splits = "\n".join(
        f"| {name} | {values['rows']:,} | {values['splits']['sft']:,} | {values['splits']['rrhf']:,} | "
        f"{values['splits']['eval']:,} | {values['versions']:,} |"
        for name, values in summary["architectures"].items()
    )
    described = ", ".join(f"{count:,} {source}" for source, count in summary["descriptions"].items())
    text = f"""---
pretty_name: DABench
task_categories: [text-generation]
tags: [text-to-image, tool-use, civitai]
---
# DABench

Instruction-call pairs for text-to-image model selection, after DiffAgent (CVPR 2024) Sec. 3.1, built by
`python -m align.bench.dabench`. Options are in `config.yaml`, all counts in `funnel.json`.

| architecture | pairs | sft | rrhf | eval | versions |
|---|---:|---:|---:|---:|---:|
{splits}

```python
from datasets import load_from_disk
rows = load_from_disk("sd15")["sft"]      # sft | rrhf | eval
from rollouts.catalog import Catalog
catalog = Catalog.load("catalog.jsonl")   # {summary["catalog"]:,} callable versions
```

Each row: `id`, `instruction` (prompt, negative prompt), `api` (the nine fields of a call), `base_model`, `split`,
`source`. Prompts whose words overlap by {config.near_duplicate:.0%} or more (Jaccard) are in one split. Model
descriptions: {described}.

## What was left out, and why
Quality rules are counted under versions; an image made with a version that broke one is counted as `below_quality`.

{funnel.to_markdown(explanations(config))}
"""
    if has_plots:
        text += "\n## Distributions\n\n![Distributions of the source and of the rows](figures/distributions.png)\n"
    text += """
## Terms
The records are public metadata that users of the community wrote, under the community's terms; each model has its own
licence (`license` in the catalogue). Prompts can name living artists or be untrue. Filters rely on the community's
flags.
"""
    write_atomically(output / "README.md", text.encode())
