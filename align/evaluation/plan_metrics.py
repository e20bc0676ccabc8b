"""How good plans are, step by step (ChatGen Sec. 4.1, "Metrics for Step-wise Evaluation")."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.bench.chatgen.schema import ARGUMENTS
from align.evaluation.bert_score import BertScorer
from align.evaluation.metrics import Estimate, bootstrap
from rollouts.catalog import Catalog

METRICS = {
    "prompt": "prompt BERTScore",
    "version": "right version",
    "version_top5": "in the first 5",
    "model": "right model",
    "arguments": "arguments",
}
"""Means over rows, all from 0 to 1 but the BERTScore, which can be below 0 where it is rescaled."""

Row = Mapping[str, Any]


def stepwise(
    plans: Sequence[Mapping[str, Any]], rows: Sequence[Row], scorer: BertScorer, catalog: Catalog
) -> dict[str, list[float]]:
    """Values of each row, for every metric and for each argument (`arguments/steps`, ...).

    A model counts as chosen if the policy named it: the default one that stands in for a name that does not exist is
    wrong even where it happens to be right. Arguments that the row does not know are left out of its mean.

    Args:
        plans: `Plan.to_dict`, one of each row.
        rows: Of ChatGenBench.
        scorer: BERTScore, with a baseline for rescaled values.
        catalog: For models, of which the rows' names are versions.
    """
    found = scorer([plan["prompt"] for plan in plans], [row["prompt"] for row in rows])
    values: dict[str, list[float]] = {"prompt": found.f1.tolist()}
    for plan, row in zip(plans, rows, strict=True):
        named = [name for name in chosen_models(plan) if isinstance(name, str)]
        first = named[0] if named else None
        values.setdefault("version", []).append(float(first == row["model"]))
        values.setdefault("version_top5", []).append(float(row["model"] in named[:5]))
        same = first in catalog and catalog[first].model_id == row["source"]["model_id"] if first else False
        values.setdefault("model", []).append(float(same))
        known = [name for name in ARGUMENTS if row["arguments"][name] is not None]
        right = {name: float(plan["arguments"].get(name) == row["arguments"][name]) for name in known}
        values.setdefault("arguments", []).append(sum(right.values()) / len(right) if right else float("nan"))
        for name in ARGUMENTS:
            values.setdefault(f"arguments/{name}", []).append(right.get(name, float("nan")))
    return values


def chosen_models(plan: Mapping[str, Any]) -> list[Any]:
    """What the policy named, most probable first; not what stood in for it."""
    return next((list(step["raw"]) for step in plan["trail"] if step["name"] == "model"), [])


def estimates(values: Mapping[str, Sequence[float]], rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """Means with intervals, for all rows and by setting and input type.

    Args:
        values: Of `stepwise`; NaN: not known of this row.
        rows: The same rows.
    """
    groups: dict[str, list[int]] = {"all": list(range(len(rows)))}
    for key in ("setting", "input_type"):
        for index, row in enumerate(rows):
            groups.setdefault(str(row[key]), []).append(index)
    return {
        group: {
            name: bootstrap(known)
            for name, of_metric in values.items()
            if (known := [of_metric[i] for i in indices if of_metric[i] == of_metric[i]])
        }
        for group, indices in groups.items()
    }


def to_markdown(found: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> str:
    """One table for each group of rows, a line for each agent; per cent with 95% intervals.

    Args:
        found: Agent -> group -> metric.
    """
    groups = dict.fromkeys(group for of_agent in found.values() for group in of_agent)
    parts = []
    for group in groups:
        lines = [f"### {group}", "", f"| | n | {' | '.join(METRICS.values())} |", "|---|---:|" + "---:|" * len(METRICS)]
        for agent, of_agent in found.items():
            metrics = of_agent.get(group)
            if metrics is None:
                continue
            cells = " | ".join(_cell(metrics.get(name)) for name in METRICS)
            lines.append(f"| {agent.replace('|', ' ')} | {metrics['version'].n:,} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
