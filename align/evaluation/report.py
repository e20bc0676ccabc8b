"""One self-contained HTML file about a comparison: tables, plots, and pictures in the manner of DiffAgent Fig. 4.

    python -m align.evaluation.report --output_dir runs/tables --scored runs/rollout/scored.parquet \
        --metrics runs/sft/metrics.jsonl runs/rrhf/metrics.jsonl

Reads what `align.evaluation.diffagent` or `.pool` wrote into `output_dir` and writes report.html there: no scripts,
nothing fetched, pictures inline.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from align.evaluation.comparison import NOBODY, Comparison, ComparisonError, load_comparison
from align.evaluation.diffagent_tables import LABELS, number
from align.evaluation.report_figures import PictureBudget, curve, dot_plot
from align.evaluation.report_page import evenly, figure, grouped_table, html_page, picture_row
from align.run_directory import read_metrics
from rewards.commandline import run_command
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_CANDIDATES, _CANDIDATE_PROMPTS = 7, 4
_CURVES = re.compile(r"loss|accurac|kendall")


@dataclass
class ReportConfig:
    """Options of `python -m align.evaluation.report`."""

    output_dir: str = field(metadata={"help": "Folder of the tables; gets report.html."})
    title: str = field(default="DiffAgent: Tables 1 and 2", metadata={"help": "Heading."})
    scored: str | None = field(default=None, metadata={"help": "A rollout's scored.parquet, to show candidates of."})
    metrics: list[str] = field(default_factory=list, metadata={"help": "metrics.jsonl of trainings, to draw curves."})
    num_prompts: int = field(default=12, metadata={"help": "Prompts shown with pictures, over all prompt sets."})
    max_megabytes: float = field(default=20.0, metadata={"help": "Of all pictures, as they stand in the file."})

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"`num_prompts` must be at least 1, but got {self.num_prompts}.")
        if not self.max_megabytes > 0:
            raise ValueError(f"`max_megabytes` must be positive, but is {self.max_megabytes}.")


class ReportError(ValueError):
    """A file that a report can't be made of; the message names it."""


def main(config: ReportConfig) -> Path:
    """Write the report and return its path."""
    path = write_report(
        config.output_dir, title=config.title, scored=config.scored, metrics=config.metrics,
        num_prompts=config.num_prompts, max_megabytes=config.max_megabytes,
    )  # fmt: skip
    logger.info("%s, %.1f MB", path, path.stat().st_size / 1e6)
    return path


def write_report(
    folder: str | Path,
    *,
    title: str = ReportConfig.title,
    scored: str | Path | None = None,
    metrics: Sequence[str | Path] = (),
    num_prompts: int = 12,
    max_megabytes: float = 20.0,
) -> Path:
    """Write report.html into a folder that holds table1.json, table2.json and per_prompt.parquet.

    Args:
        folder: Of `align.evaluation.diffagent` or `.pool`.
        title: Heading.
        scored: Candidates of a rollout; None: no such section.
        metrics: Files of training metrics; none: no such section.
        num_prompts: Prompts shown with pictures.
        max_megabytes: Of all pictures.

    Raises:
        ReportError, ComparisonError: A file that is missing or something else.
    """
    folder = Path(folder)
    comparison = load_comparison(folder)
    table1, table2 = (_read_table(folder / f"{name}.json") for name in ("table1", "table2"))
    budget = PictureBudget(round(max_megabytes * 1e6))
    sections = [
        _compared(comparison),
        _hallucination(table1),
        *_scores(table2),
        _selection(table2),
        _grid(comparison, budget, num_prompts),
    ]
    if scored is not None:
        sections.append(_candidates(Path(scored), budget))
    if metrics:
        sections.append(_curves([Path(path) for path in metrics]))
    body = "\n".join([f"<h1>{escape(title)}</h1>", budget.note(), *sections])
    write_atomically(folder / REPORT_FILE, html_page(title, body).encode())
    return folder / REPORT_FILE


def _compared(comparison: Comparison) -> str:
    about = comparison.about
    call = about.baseline_call
    agents = ", ".join(f"<b>{escape(name)}</b> ({escape(folder)})" for name, folder in about.agents.items())
    different = " different ones" if len(about.runs) > 1 else ""
    counts = {
        name: len({row["prompt_id"] for row in comparison.rows if row["prompt_set"] == name})
        for name in about.prompt_sets
    }
    prompts = ", ".join(f"{escape(name)} ({count:,}{different})" for name, count in counts.items())
    runs = f"<li>Runs: {escape(', '.join(about.runs))}.</li>" if len(about.runs) > 1 else ""
    return f"""<p>Agents that answer a text-to-image prompt with an API call of {about.architecture}: which model, with
which parameters. {about.catalog:,} versions can be called.</p>
<ul><li>Agents: {agents}.</li>
<li><b>{escape(about.baseline)}</b>: {escape(call["model"])} with the default parameters,
{escape(_parameters(call))}.</li>
<li><b>Baseline*</b>: that model with the parameters of {escape(about.ours)}. <b>DiffAgent#</b>: the model of
{escape(about.ours)} with the default parameters.</li>
<li>Prompts: {prompts}. {about.num_images} pictures per call, {call["width"]}x{call["height"]} for every method, with
the same seeds; negative prompts as the instructions have them.</li>{runs}</ul>"""


def _hallucination(table: Mapping[str, Any]) -> str:
    rows = []
    for row in table["rows"]:
        share = row["hallucination"]
        reasons = ", ".join(f"{escape(name)} {count / share['n']:.1%}" for name, count in row["reasons"].items())
        estimates = "".join(_cell(row[name]) for name in table["estimates"])
        cells = f'{estimates}<td class="text">{reasons or "–"}</td>'
        rows.append((row["prompts"], row["method"], f"<td>{share['n']:,}</td>{cells}"))
    heads = "".join(f'<th scope="col">{escape(LABELS.get(name, name))}</th>' for name in table["estimates"])
    head = f'<th scope="col">answers</th>{heads}<th scope="col" class="text">reasons</th>'
    caption = (
        "Share of answers that can't be called, in per cent, with 95% bootstrap intervals; greedy decoding, and where "
        "it says so sampled at temperature 1."
    )
    return "<h2>Table 1: hallucination</h2>" + grouped_table(head, rows, caption)


def _scores(table: Mapping[str, Any]) -> list[str]:
    names = table["estimates"]
    heads = "".join(f'<th scope="col">{escape(LABELS.get(name, name))}</th>' for name in names)
    sections = [
        "<h2>Table 2: scores</h2><p class=soft>Means over prompts with 95% bootstrap intervals"
        + (" over runs and prompts" if len(table["runs"]) > 1 else "")
        + ". The unified metric is the mean of the scorers, each scaled to [0, 1] by the range of all pictures "
        "compared. Where an answer is a hallucination or its call can't be drawn, the baseline's pictures stand in.</p>"
    ]
    for prompts in dict.fromkeys(row["prompts"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["prompts"] == prompts]
        drawn = [(row["method"], row["unified"]) for row in rows if row["unified"]]
        sections.append(f"<h3>{escape(prompts)}: unified metric, times 100</h3>")
        plot = dot_plot(drawn, title=f"Unified metric on {prompts} by method")
        sections.append(f'<div class="scroll plot">{plot}</div>')
        sections.append(_scores_table(prompts, rows, names, heads))
    differences = []
    for row in table["differences"]:
        cells = "".join(_cell(row[name], name, sign="+") for name in names)
        counts = f"<small>won {row['wins']}, tied {row['ties']}, lost {row['losses']}</small>"
        rate = number(row["win_rate"]["value"]) if row["win_rate"] else "–"
        label = f"{row['method']} − {row['against']}"
        differences.append((row["prompts"], label, f"{cells}<td>{rate}{counts}</td>"))
    caption = "Paired differences, prompt by prompt; win rate by the unified metric in per cent, without ties."
    sections.append(grouped_table(heads + '<th scope="col">win rate</th>', differences, caption))
    return [*sections, _by_run(table)] if len(table["runs"]) > 1 else sections


def _by_run(table: Mapping[str, Any]) -> str:
    rows = []
    for row in table["rows"]:
        of_run = (row["unified"] or {}).get("runs", {})
        cells = "".join(f"<td>{number(of_run.get(run), 'unified') or '–'}</td>" for run in table["runs"])
        rows.append((row["prompts"], row["method"], cells))
    heads = "".join(f'<th scope="col">{escape(run)}</th>' for run in table["runs"])
    return grouped_table(heads, rows, "The unified metric of each run.")


def _scores_table(prompts: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], heads: str) -> str:
    best = max((row["unified"]["value"] for row in rows if row["unified"]), default=math.inf)
    lines = []
    for row in rows:
        cells = "".join(_cell(row[name], name) for name in names)
        reasons = ", ".join(f"{escape(reason)} {count}" for reason, count in row["not_drawn"].items())
        kind = ' class="best"' if row["unified"] and row["unified"]["value"] == best else ""
        lines.append(
            f'<tr{kind}><th scope="row">{escape(row["method"])}</th>{cells}<td>{row["hallucinated"]:.1%}</td>'
            f'<td class="text">{reasons or "–"}</td></tr>'
        )
    left_out = rows[0]["left_out"]
    note = f" {left_out} prompts are left out: the baseline could not be drawn." if left_out else ""
    n = rows[0]["unified"]["n"] if rows[0]["unified"] else 0
    return (
        f'<div class="scroll"><table><caption>{escape(prompts)}, n = {n:,}.{note}</caption>'
        f'<thead><tr><th scope="col">method</th>{heads}<th scope="col">hallucinated</th>'
        f'<th scope="col" class="text">not drawn</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _selection(table: Mapping[str, Any]) -> str:
    rows = [
        (row["prompts"], row["method"],
         f"<td>{row['distinct_models']:g}</td><td>{row['entropy']:.2f}</td><td>{row['effective_models']:.1f}</td>")
        for row in table["selection"]
    ]  # fmt: skip
    names = ("distinct models", "entropy (nats)", "effective number")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return "<h2>Models chosen</h2>" + grouped_table(
        head, rows, "The effective number is the exponential of the entropy."
    )


def _grid(comparison: Comparison, budget: PictureBudget, num_prompts: int) -> str:
    """Prompts as rows, methods as columns, the first picture of each."""
    about, run = comparison.about, comparison.about.runs[0]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in comparison.rows:
        if row["run"] == run and row["drawn_from"] != NOBODY:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    parts = [
        "<h2>Pictures</h2><p class=soft>The first picture of each call, all of a prompt with one seed; framed: best by "
        "the unified metric over all pictures of the call. The prompts are evenly spaced in each set, whatever came "
        f"out{'; of run ' + escape(run) if len(about.runs) > 1 else ''}.</p>"
    ]
    share = max(1, num_prompts // len(about.prompt_sets))
    for prompts in about.prompt_sets:
        of_set = [rows for rows in by_prompt.values() if rows[0]["prompt_set"] == prompts]
        for rows in evenly(of_set, share):
            parts.append(f"<h3>{escape(rows[0]['prompt'])}</h3><p class=soft>{escape(prompts)}</p>")
            best = max((row["unified"] for row in rows if row["unified"] is not None), default=math.inf)
            distinct = len({row["unified"] for row in rows}) > 1
            figures = [_picture(row, budget, best=distinct and row["unified"] == best) for row in rows]
            parts.append(picture_row(figures))
    return "\n".join(parts)


def _picture(row: Mapping[str, Any], budget: PictureBudget, *, best: bool) -> str:
    call = json.loads(row["drawn_call"])
    lines = [f"<b>{escape(row['method'])}</b>", f"<span>{escape(call['model'])}</span>"]
    lines.append(f"<span>{escape(_parameters(call))}</span>")
    if row["unified"] is not None:
        mark = ' <span class="good" style="display:inline">best</span>' if best else ""
        lines.append(f"<span>unified {number(row['unified'], 'unified')}{mark}</span>")
    if row["hallucinated"]:
        lines.append(f'<span class="warn">hallucination ({escape(row["reason"])}): baseline’s picture</span>')
    elif row["not_drawn"]:
        asked = json.loads(row["call"])["model"]
        lines.append(
            f'<span class="warn">{escape(asked)} not drawn ({escape(row["not_drawn"])}): baseline’s picture</span>'
        )
    image = budget.tag(next(iter(row["images"] or []), None), f"{row['method']}: {call['model']}, {row['prompt']}")
    return figure(image, lines, best=best)


def _candidates(path: Path, budget: PictureBudget) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["instruction", "candidates"]).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ReportError(f"`scored` {path} can't be read as scored candidates: {error}.") from error
    parts = [
        "<h2>What is learned from: candidates ranked by reward</h2><p class=soft>Calls that a policy proposed, drawn "
        "and scored; mean reward over the call's pictures with its standard error.</p>"
    ]
    for row in evenly(rows, _CANDIDATE_PROMPTS):
        ranked = sorted(
            row["candidates"], key=lambda c: -math.inf if c["reward"] is None else c["reward"], reverse=True
        )
        parts.append(f"<h3>{escape(row['instruction']['prompt'])}</h3>")
        shown = enumerate(ranked[:_CANDIDATES], start=1)
        parts.append(picture_row([_candidate(rank, candidate, budget) for rank, candidate in shown]))
        if len(ranked) > _CANDIDATES:
            parts.append(f"<p class=soft>{len(ranked) - _CANDIDATES} more are not shown.</p>")
    return "\n".join(parts)


def _candidate(rank: int, candidate: Mapping[str, Any], budget: PictureBudget) -> str:
    call = candidate["call"]
    lines = [f"<b>{rank}. {escape(call['model'] if call else 'no call')}</b>"]
    if call:
        lines.append(f"<span>{escape(_parameters(call))}</span>")
    if candidate["reward"] is not None:
        error = candidate.get("reward_standard_error")
        lines.append(f"<span>reward {candidate['reward']:.3f}{f' ± {error:.3f}' if error is not None else ''}</span>")
    lines.append(f"<span>{escape(candidate['origin'])}</span>")
    if candidate["error"]:
        lines.append(f'<span class="warn">{escape(candidate["error"].partition(":")[0])}</span>')
    alt = f"Candidate {rank}: {call['model'] if call else 'no call'}"
    return figure(budget.tag(next(iter(candidate["images"] or []), None), alt), lines, best=False)


def _curves(paths: Sequence[Path]) -> str:
    parts = ["<h2>Training</h2>"]
    for path in paths:
        if not path.is_file():
            raise ReportError(f"`metrics`: there is no file at {path}.")
        series: dict[str, list[tuple[float, float]]] = {}
        for line in read_metrics(path):
            for key, value in line.items():
                if _CURVES.search(key) and isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(key, []).append((float(line["step"]), float(value)))
        parts.append(f"<h3>{escape(str(path))}</h3>")
        drawn = [(key, svg) for key, points in series.items() if (svg := curve(points, title=key))]
        figures = [f"<figure>{svg}<figcaption>{escape(key)}</figcaption></figure>" for key, svg in drawn]
        parts.append(f'<div class="pictures curves">{"".join(figures)}</div>' if figures else "<p>No curves in it.</p>")
    return "\n".join(parts)


def _cell(estimate: Mapping[str, Any] | None, name: str = "hallucination", *, sign: str = "") -> str:
    if estimate is None:
        return "<td>–</td>"
    value, low, high = (number(estimate[part], name, sign=sign) for part in ("value", "low", "high"))
    main = ' class="main"' if name == "unified" else ""
    return f"<td{main}>{value}<small>{low} to {high}</small></td>"


def _parameters(call: Mapping[str, Any]) -> str:
    return f"{call['sampling method']}, {call['sampling steps']} steps, cfg {call['cfg scale']:g}"


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"Can't read {path}: {error.strerror}. It is written by align.evaluation.diffagent."
        ) from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}. Run align.evaluation.diffagent again.") from error
    return table


if __name__ == "__main__":
    run_command(main, ReportConfig, errors=(ReportError, ComparisonError))
