"""DiffAgent's Tables 1 and 2 from compared rows, as JSON, Markdown and CSV, with bootstrap intervals.

Of several runs (training seeds) the mean over the runs is given with a two-level interval, and each run's own value.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.evaluation.comparison import (
    METRIC_FILE,
    NOBODY,
    Comparison,
    save_comparison,
    unify,
    usable,
)
from align.evaluation.metrics import bootstrap_runs, selection_entropy
from rewards.files import write_atomically

LABELS = {
    "clip_score": "CLIP Score",
    "image_reward": "ImageReward",
    "hps_v2": "HPS v2",
    "unified": "Unified",
    "sampled_hallucination": "sampled",
}
"""Headings; scores of these names are shown times 100, as in the paper."""


def write_tables(folder: str | Path, comparison: Comparison) -> dict[str, Any]:
    """Fit the unified metric and write `table1` and `table2` (.json, .md, .csv), per_prompt.parquet and unified.json.

    Args:
        folder: Where to.
        comparison: With raw scores.

    Returns:
        `{"table1": ..., "table2": ...}`, what the JSON files hold.

    Raises:
        ComparisonError, UnifiedMetricError: Nothing was drawn, or scores have no spread.
    """
    folder, about = Path(folder), comparison.about
    compared, metric = unify(comparison, f"pictures of {', '.join(about.methods)} in {', '.join(about.runs)}")
    metric.save(folder / METRIC_FILE)
    save_comparison(folder, compared)
    tables = {"table1": table1(compared), "table2": table2(compared)}
    for name, table, markdown in (("table1", tables["table1"], markdown1), ("table2", tables["table2"], markdown2)):
        write_atomically(folder / f"{name}.json", json.dumps(table, indent=1, ensure_ascii=False).encode())
        write_atomically(folder / f"{name}.md", markdown(table).encode())
        write_atomically(folder / f"{name}.csv", to_csv(table).encode())
    return tables


def table1(comparison: Comparison) -> dict[str, Any]:
    """Hallucination by method and prompt set, with how many answers for each reason (DiffAgent Table 1)."""
    about = comparison.about
    rows = []
    for prompts in about.prompt_sets:
        for method in about.answering:
            of = comparison.of(method, prompts)
            reasons = Counter(row["reason"] for row in of if row["hallucinated"])
            share = _estimate(of, about.runs, lambda row: float(row["hallucinated"]))
            sampled = [row for row in of if row.get("sampled_hallucination") is not None]
            of_samples = _estimate(sampled, about.runs, lambda row: row["sampled_hallucination"])
            rows.append(
                {"method": method, "prompts": prompts, "hallucination": share, "reasons": dict(reasons.most_common()),
                 "sampled_hallucination": of_samples}
            )  # fmt: skip
    estimates = ["hallucination", "sampled_hallucination"]
    return {
        "architecture": about.architecture, "catalog": about.catalog, "runs": about.runs, "rows": rows,
        "estimates": estimates[: 2 if any(row["sampled_hallucination"] for row in rows) else 1],
    }  # fmt: skip


def table2(comparison: Comparison) -> dict[str, Any]:
    """Scores by method and prompt set (DiffAgent Table 2), paired differences, and how varied the chosen models are."""
    about = comparison.about
    estimates = [*about.scorers, "unified"]
    rows, differences, selection = [], [], []
    for prompts in about.prompt_sets:
        of = {method: comparison.of(method, prompts) for method in about.methods}
        asked = {method: [row for row in rows if row["drawn_from"] != NOBODY] for method, rows in of.items()}
        rows += [_scores_row(method, prompts, asked[method], comparison) for method in about.methods]
        first = next(iter(about.agents))
        pairs = [(method, about.baseline) for method in about.methods if method != about.baseline]
        pairs += [(agent, first) for agent in about.agents if agent != first]
        differences += [_difference(a, b, prompts, of[a], of[b], comparison) for a, b in pairs]
        selection += [
            {"method": method, "prompts": prompts} | _selection(of[method], about.runs) for method in about.answering
        ]
    return {
        "architecture": about.architecture, "catalog": about.catalog, "runs": about.runs, "estimates": estimates,
        "agents": about.agents, "ours": about.ours, "baseline": about.baseline, "baseline_call": about.baseline_call,
        "num_images": about.num_images, "rows": rows, "differences": differences, "selection": selection,
    }  # fmt: skip


def _scores_row(method: str, prompts: str, rows: list[dict[str, Any]], comparison: Comparison) -> dict[str, Any]:
    about, drawn = comparison.about, usable(rows)
    return {
        "method": method,
        "prompts": prompts,
        **{name: _estimate(drawn, about.runs, _score(name)) for name in (*about.scorers, "unified")},
        "hallucinated": sum(row["hallucinated"] for row in rows) / len(rows),
        "not_drawn": dict(Counter(row["not_drawn"] for row in rows if row["not_drawn"]).most_common()),
        "baseline_stands_in": sum(row["drawn_from"] != "own" for row in rows) / len(rows),
        "left_out": len(rows) - len(drawn),
    }


def _difference(
    method: str,
    against: str,
    prompts: str,
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
    comparison: Comparison,
) -> dict[str, Any]:
    """Prompt by prompt, of the same run."""
    about = comparison.about
    other = {(row["run"], row["prompt_id"]): row for row in usable(others)}
    pairs = [row | {"other": other[row["run"], row["prompt_id"]]} for row in usable(rows)]
    estimates = {}
    for name in (*about.scorers, "unified"):
        score = _score(name)
        estimates[name] = _estimate(pairs, about.runs, lambda row, of=score: of(row) - of(row["other"]))
    signs = [int(np.sign(row["unified"] - row["other"]["unified"])) for row in pairs]
    decided = [row | {"won": sign > 0} for row, sign in zip(pairs, signs, strict=True) if sign]
    return {
        "method": method, "against": against, "prompts": prompts, **estimates,
        "wins": signs.count(1), "ties": signs.count(0), "losses": signs.count(-1),
        "win_rate": _estimate(decided, about.runs, lambda row: float(row["won"])),
    }  # fmt: skip


def _score(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["unified"] if name == "unified" else row["means"][name]


def _selection(rows: list[dict[str, Any]], runs: Sequence[str]) -> dict[str, Any]:
    """Mean over the runs of the number of models chosen, of the entropy (nats) and of its exponential."""
    by_run = {}
    for run in runs:
        models = [json.loads(row["call"])["model"] for row in rows if row["run"] == run and row["call"] is not None]
        entropy = selection_entropy(models)
        by_run[run] = {
            "calls": len(models), "distinct_models": len(set(models)), "entropy": entropy,
            "effective_models": math.exp(entropy) if models else 0.0,
        }  # fmt: skip
    mean = {key: float(np.mean([values[key] for values in by_run.values()])) for key in by_run[runs[0]]}
    return mean | ({"runs": by_run} if len(runs) > 1 else {})


def _estimate(
    rows: Sequence[dict[str, Any]], runs: Sequence[str], value: Callable[[dict[str, Any]], float]
) -> dict[str, Any] | None:
    """Mean, interval and n; of several runs also the mean of each. None without rows."""
    by_run = {run: [value(row) for row in rows if row["run"] == run] for run in runs}
    by_run = {run: values for run, values in by_run.items() if values}
    if not by_run:
        return None
    estimate: dict[str, Any] = bootstrap_runs(list(by_run.values()))._asdict()
    return estimate | ({"runs": {run: float(np.mean(v)) for run, v in by_run.items()}} if len(runs) > 1 else {})


def markdown1(table: dict[str, Any]) -> str:
    """Table 1 for people."""
    runs = f" Mean of {len(table['runs'])} runs." if len(table["runs"]) > 1 else ""
    lines = [
        f"{table['architecture']}, {table['catalog']:,} callable versions. Hallucination in per cent of all answers, "
        f"[95% bootstrap interval]; greedy decoding, and where it says so sampled at temperature 1.{runs}",
        "",
        f"| method | prompts | n | {' | '.join(LABELS.get(name, name) for name in table['estimates'])} | reasons |",
        f"|---|---|---:|{'---:|' * len(table['estimates'])}---|",
    ]
    for row in table["rows"]:
        share = row["hallucination"]
        reasons = ", ".join(f"{reason} {count / share['n']:.1%}" for reason, count in row["reasons"].items())
        name = _escape(row["method"])
        cells = " | ".join(_show(row[estimate]) for estimate in table["estimates"])
        lines.append(f"| {name} | {row['prompts']} | {share['n']:,} | {cells} | {reasons} |")
    return "\n".join([*lines, *_runs_lines(table, "rows")]) + "\n"


def markdown2(table: dict[str, Any]) -> str:
    """Table 2 for people, with what it leaves unsaid in the paper."""
    call, names = table["baseline_call"], table["estimates"]
    ours, baseline = _escape(table["ours"]), _escape(table["baseline"])
    runs = f" Mean of {len(table['runs'])} runs; resampled are runs, then prompts." if len(table["runs"]) > 1 else ""
    lines = [
        f"{table['architecture']}. Means over prompts, [95% bootstrap interval]; "
        f"{', '.join(LABELS[name] for name in names if name in LABELS)} times 100.{runs} {table['num_images']} "
        f"pictures per call, with the same seeds, {call['width']}x{call['height']} for all methods, and the negative "
        f"prompt that the instruction has (plain prompts have none). {baseline}: {_escape(call['model'])}, "
        f"{call['sampling method']}, {call['sampling steps']} steps, cfg {call['cfg scale']:g}. {baseline}*: that "
        f"model with the parameters of {ours}. DiffAgent#: the model of {ours} with the default parameters. Where an "
        "answer is a hallucination or its call can't be drawn, the baseline's pictures stand in.",
        "",
        f"| method | prompts | n | {' | '.join(LABELS.get(n, n) for n in names)} | hallucinated | not drawn |",
        "|---|---|---:|" + "---:|" * (len(names) + 2),
    ]
    for row in table["rows"]:
        n = row["unified"]["n"] if row["unified"] else 0
        cells = [_show(row[name], name) for name in names] + [f"{row['hallucinated']:.1%}", _reasons(row["not_drawn"])]
        lines.append(f"| {_escape(row['method'])} | {row['prompts']} | {n:,} | {' | '.join(cells)} |")
    if left_out := max((row["left_out"] for row in table["rows"]), default=0):
        lines += [
            "",
            f"Left out for all methods, since the baseline could not be drawn: up to {left_out} prompts a set.",
        ]
    return "\n".join([*lines, *_difference_lines(table), *_selection_lines(table), *_runs_lines(table, "rows")]) + "\n"


def to_csv(table: dict[str, Any]) -> str:
    """Estimates as they are (not times 100): a line per method and prompt set, and per run if there are several."""
    text, names = io.StringIO(), table["estimates"]
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["method", "against", "prompts", "run", "n", *columns])
    for row in [*table["rows"], *table.get("differences", [])]:
        found = {name: row[name] or {} for name in names}
        head = [row["method"], row.get("against", ""), row["prompts"]]
        n = next(iter(found.values())).get("n", 0)
        values = [found[name].get(part, "") for name in names for part in ("value", "low", "high")]
        writer.writerow([*head, "", n, *values])
        for run in table["runs"] if len(table["runs"]) > 1 else []:
            of_run = [cell for name in names for cell in (found[name].get("runs", {}).get(run, ""), "", "")]
            writer.writerow([*head, run, "", *of_run])
    return text.getvalue()


def _difference_lines(table: dict[str, Any]) -> list[str]:
    names = table["estimates"]
    lines = [
        "",
        "Paired differences, prompt by prompt. Win rate: by Unified, without ties (wins, ties, losses).",
        "",
        f"| difference | prompts | {' | '.join(LABELS.get(n, n) for n in names)} | win rate |",
        "|---|---|" + "---:|" * (len(names) + 1),
    ]
    for row in table["differences"]:
        cells = [_show(row[name], name, sign="+") for name in names]
        rate = f"{_show(row['win_rate'])} ({row['wins']}, {row['ties']}, {row['losses']})"
        name = f"{_escape(row['method'])} − {_escape(row['against'])}"
        lines.append(f"| {name} | {row['prompts']} | {' | '.join(cells)} | {rate.strip()} |")
    return lines


def _selection_lines(table: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "Models chosen. Effective number: the exponential of the entropy.",
        "",
        "| method | prompts | distinct | entropy (nats) | effective number |",
        "|---|---|---:|---:|---:|",
    ]
    for row in table["selection"]:
        lines.append(
            f"| {_escape(row['method'])} | {row['prompts']} | {row['distinct_models']:g} | {row['entropy']:.2f} "
            f"| {row['effective_models']:.1f} |"
        )
    return lines


def _runs_lines(table: dict[str, Any], part: str) -> list[str]:
    """Each run's own values, if there are several."""
    if len(table["runs"]) < 2:
        return []
    names = table["estimates"]
    lines = ["", "By run:", "", f"| method | prompts | run | {' | '.join(LABELS.get(n, n) for n in names)} |"]
    lines.append("|---|---|---|" + "---:|" * len(names))
    for row in table[part]:
        for run in table["runs"]:
            cells = [number((row[name] or {}).get("runs", {}).get(run), name) for name in names]
            lines.append(f"| {_escape(row['method'])} | {row['prompts']} | {_escape(run)} | {' | '.join(cells)} |")
    return lines


def number(value: float | None, name: str = "hallucination", *, sign: str = "") -> str:
    """A score as it is shown: times 100 for shares and the paper's scorers, else with three digits.

    Args:
        value: None: an empty text.
        name: Of the scorer.
        sign: `+` shows the sign of positive numbers too.
    """
    if value is None:
        return ""
    if name in LABELS or name == "hallucination":
        text = f"{100 * value:{sign}.{2 if name == 'hps_v2' else 1}f}"
    else:
        text = f"{value:{sign}.3f}"
    return text if float(text) else text.lstrip("+-")


def _show(estimate: dict[str, Any] | None, name: str = "hallucination", *, sign: str = "") -> str:
    if estimate is None:
        return ""
    value, low, high = (number(estimate[part], name, sign=sign) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{_escape(reason)} {count}" for reason, count in counts.items())


def _escape(text: str) -> str:
    return text.replace("|", r"\|")
