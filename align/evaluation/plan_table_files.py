"""ChatGen's tables as JSON, Markdown and CSV.

A table is a mapping: `labels`, `estimates` and `others` name the fields of its `rows`; an estimate is null or has
`value`, `low`, `high`, `n`, and of several `runs` each one's value.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.evaluation.diffagent_tables import LABELS
from align.evaluation.plan_metrics import METRICS
from rewards.files import write_atomically

HEADINGS = {
    **METRICS, **LABELS, "step": "step score", "fid": "FID", "seconds": "s per chat", "training_seconds": "training s",
    "not_drawn": "not drawn", "left_out": "left out", "input_type": "input type", "batch_size": "batch",
    "equal_call": "very call", "demonstrations": "training demonstrations",
}  # fmt: skip
TITLES = {
    "table4": "Step-wise and final evaluation by setting (ChatGen Table 4).",
    "table5": "What agents cost (ChatGen Table 5): parameters, training, and seconds to plan a chat.",
    "table6": "What each step is worth, the ground truth of the other two being given (ChatGen Table 6).",
    "table7": "By input type (ChatGen Table 7).",
    "selection": "Choosing the model: the very version, one of the first five, or any version of the model.",
    "regret": "Regret: the best candidate's reward for the human-validated prompt, less that of the chosen model.",
}
_AS_IT_IS = {"fid": 2, "regret": 4, "seconds": 3}
"""Digits of estimates that are not shown times 100; unknown scorers have three."""


def write_table(folder: Path, name: str, table: Mapping[str, Any]) -> None:
    """Write `<name>.json`, `.md` and `.csv`, atomically."""
    write_atomically(folder / f"{name}.json", json.dumps(table, indent=1, ensure_ascii=False).encode())
    write_atomically(folder / f"{name}.md", to_markdown(name, table).encode())
    write_atomically(folder / f"{name}.csv", to_csv(table).encode())


def to_markdown(name: str, table: Mapping[str, Any]) -> str:
    """The table for people."""
    labels, estimates, others = table["labels"], table["estimates"], table["others"]
    heads = [HEADINGS.get(field, field) for field in (*labels, *estimates, *others)]
    lines = [f"{TITLES[name]} {table_note(name, table)}".strip(), "", f"| {' | '.join(heads)} |"]
    lines.append("|" + "---|" * len(labels) + "---:|" * (len(estimates) + len(others)))
    for row in table["rows"]:
        cells = [_escape(str(row[field])) for field in labels]
        cells += [_show(field, row[field]) for field in estimates]
        cells += [shown_value(row[field]) for field in others]
        lines.append(f"| {' | '.join(cells)} |")
    if len(table["runs"]) > 1:
        lines += _by_run(table)
    return "\n".join(lines) + "\n"


def to_csv(table: Mapping[str, Any]) -> str:
    """Estimates as they are (not times 100), a line for each row, and for each run if there are several."""
    labels, estimates, others = table["labels"], table["estimates"], table["others"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("value", "low", "high", "n")
    columns = [f"{field}{'' if part == 'value' else '_' + part}" for field in estimates for part in parts]
    writer.writerow([*labels, "run", *columns, *others])
    for row in table["rows"]:
        head = [row[field] for field in labels]
        values = [(row[field] or {}).get(part, "") for field in estimates for part in parts]
        rest = [json.dumps(row[field]) if isinstance(row[field], dict) else row[field] for field in others]
        writer.writerow([*head, "", *values, *rest])
        for run in table["runs"] if len(table["runs"]) > 1 else []:
            of_run = [(row[field] or {}).get("runs", {}).get(run, "") for field in estimates]
            writer.writerow(
                [*head, run, *(cell for value in of_run for cell in (value, "", "", "")), *[""] * len(others)]
            )
    return text.getvalue()


def table_note(name: str, table: Mapping[str, Any]) -> str:
    """What has to be known to read the numbers, as Markdown."""
    notes = ["Means over chats, [95% bootstrap interval] (n)."]
    if len(table["runs"]) > 1:
        notes.append(f"Mean of {len(table['runs'])} runs; resampled are runs and chats, the same ones for all runs.")
    scaled = [field for field in table["estimates"] if field not in _AS_IT_IS and (field in HEADINGS)]
    if scaled:
        notes.append(f"{', '.join(HEADINGS[field] for field in scaled)} times 100.")
    if name in ("table4", "table6", "table7") and table["num_images"]:
        notes.append(
            f"{table['num_images']} picture(s) per plan, drawn with its own prompt and arguments and scored for the "
            "human-validated prompt. Where a plan can't be drawn, the pictures of its prompt by "
            f"{_escape(table['default_call']['model'])} with default parameters stand in; a chat is left out for all "
            "methods if one has no pictures with all scores."
        )
    if name in ("table4", "table6", "table7") and table["references"]:
        which = {"render": "what the ground truth draws with other seeds", "folder": "the demonstrations' own pictures"}
        notes.append(
            f"FID: {_escape(table['features']['name'])}, against {which[table['references']]} for the same chats."
        )
    return " ".join(notes)


def _by_run(table: Mapping[str, Any]) -> list[str]:
    labels, estimates = table["labels"], table["estimates"]
    heads = [HEADINGS.get(field, field) for field in (*labels, "run", *estimates)]
    lines = ["", "By run:", "", f"| {' | '.join(heads)} |", "|" + "---|" * (len(labels) + 1) + "---:|" * len(estimates)]
    for row in table["rows"]:
        for run in table["runs"]:
            cells = [_escape(str(row[field])) for field in labels] + [_escape(run)]
            cells += [shown_number(field, (row[field] or {}).get("runs", {}).get(run)) for field in estimates]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _show(field: str, estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (shown_number(field, estimate[part]) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}] ({estimate['n']:,})"


def shown_number(field: str, value: float | None) -> str:
    """A number of an estimate: times 100 where the paper has it so; None: an empty text."""
    if value is None:
        return ""
    if field in _AS_IT_IS or field not in HEADINGS:
        return f"{value:.{_AS_IT_IS.get(field, 3)}f}"
    return f"{100 * value:.{2 if field == 'hps_v2' else 1}f}"


def shown_value(value: Any) -> str:
    """A field that is no estimate, as Markdown; None: an empty text."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return _escape(", ".join(f"{key} {count}" for key, count in value.items()))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if isinstance(value, float) else _escape(str(value))
    )


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
