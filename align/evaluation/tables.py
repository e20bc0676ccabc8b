"""Tables of an evaluation as JSON, Markdown and CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from rewards.files import write_atomically

# Field of a row -> heading; estimates are shown in per cent with their 95% interval.
ESTIMATES = {
    "hallucination": "hallucination",
    "version_accuracy": "right version",
    "model_accuracy": "right model",
    "argument_accuracy": "arguments",
}


def write_table(folder: Path, report: dict[str, Any]) -> None:
    """Write `table.json` (everything), `table.md` (for people) and `table.csv` (for spreadsheets)."""
    write_atomically(folder / "table.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_atomically(folder / "table.md", to_markdown(report).encode())
    write_atomically(folder / "table.csv", to_csv(report).encode())


def to_markdown(report: dict[str, Any]) -> str:
    """One table of estimates per method and prompt set, one of the reasons of hallucination."""
    lines = [
        f"{report['architecture']}, {report['catalog']:,} callable versions. Per cent, [95% bootstrap interval].",
        "",
        f"| method | prompts | n | {' | '.join(ESTIMATES.values())} "
        "| distinct models | s/answer (batched) | s (alone) |",
        "|---|---|---:|" + "---:|" * (len(ESTIMATES) + 3),
    ]
    for row in report["rows"]:
        cells = [_percent(row.get(name)) for name in ESTIMATES]
        alone = row.get("one_at_a_time_seconds")
        lines.append(
            f"| {_escape(row['method'])} | {row['prompts']} | {row['hallucination']['n']:,} | {' | '.join(cells)} "
            f"| {row['distinct_models']:,} | {_seconds(row['seconds'])} | {_seconds(alone)} |"
        )
    lines += [
        "",
        "Reasons of hallucination, share of all answers:",
        "",
        "| method | prompts | reasons |",
        "|---|---|---|",
    ]
    for row in report["rows"]:
        if row["reasons"]:
            n = row["hallucination"]["n"]
            reasons = ", ".join(f"{reason} {count / n:.1%}" for reason, count in row["reasons"].items())
            lines.append(f"| {_escape(row['method'])} | {row['prompts']} | {reasons} |")
    return "\n".join(lines) + "\n"


def to_csv(report: dict[str, Any]) -> str:
    """Estimates as fractions, one line per method and prompt set."""
    text = io.StringIO()
    names = [f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "prompts", "n", *names, "distinct_models", "seconds"])
    for row in report["rows"]:
        values = [row[name][part] if name in row else "" for name in ESTIMATES for part in ("value", "low", "high")]
        head = [row["method"], row["prompts"], row["hallucination"]["n"]]
        writer.writerow([*head, *values, row["distinct_models"], row["seconds"]])
    return text.getvalue()


def _percent(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _escape(text: str) -> str:
    return text.replace("|", r"\|")
