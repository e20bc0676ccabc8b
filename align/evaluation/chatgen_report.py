"""One self-contained HTML file about ChatGen agents: Tables 4 to 7, and chats with the plans and pictures they led to.

    python -m align.evaluation.chatgen_report --output_dir runs/chatgen-tables

Reads what `align.evaluation.chatgen` (or `.chatgen_pool`) wrote into `output_dir`, and the chats of the data set.
Writes report.html there: no scripts, nothing fetched, pictures inline.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from align.chat_pictures import ChatPictures, PictureError
from align.chats import load_chats, pictures_folder
from align.evaluation.plan_results import BASELINE, GROUND_TRUTH, NOBODY, PlanResults, PlanResultsError, load_results
from align.evaluation.plan_table_files import HEADINGS, TITLES, shown_number, shown_value, table_note
from align.evaluation.report_figures import PictureBudget, dot_plot
from align.evaluation.report_page import evenly, figure, grouped_table, html_page, picture_row
from align.pairs import DataError
from rewards.commandline import ConfigError, run_command
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_TABLES = ("table4", "table7", "table6", "selection", "regret", "table5")
_PICTURE_SIDE = 256

Row = Mapping[str, Any]


@dataclass
class ChatGenReportConfig:
    """Options of `python -m align.evaluation.chatgen_report`."""

    output_dir: str = field(metadata={"help": "Folder of the tables; gets report.html."})
    dataset: str | None = field(
        default=None, metadata={"help": "ChatGenBench folder with the chats; none: that of `output_dir`/config.yaml."}
    )
    title: str = field(default="ChatGen: Tables 4 to 7", metadata={"help": "Heading."})
    num_chats: int = field(default=12, metadata={"help": "Chats shown with their plans, over all input types."})
    max_megabytes: float = field(default=20.0, metadata={"help": "Of all pictures, as they stand in the file."})

    def __post_init__(self) -> None:
        if self.num_chats < 1:
            raise ValueError(f"`num_chats` must be at least 1, but is {self.num_chats}.")
        if not self.max_megabytes > 0:
            raise ValueError(f"`max_megabytes` must be positive, but is {self.max_megabytes}.")


def main(config: ChatGenReportConfig) -> Path:
    """Write the report and return its path."""
    folder = Path(config.output_dir)
    results = load_results(folder)
    dataset = config.dataset or _dataset_of(folder)
    chats = {row["id"]: row["messages"] for row in load_chats(dataset)["test"]}
    budget = PictureBudget(round(config.max_megabytes * 1e6))
    sections = [
        f"<p>{_compared(results)}</p>",
        *tables(folder),
        gallery(results, chats, ChatPictures(pictures_folder(dataset), _PICTURE_SIDE), budget, config.num_chats),
    ]
    body = "\n".join([f"<h1>{escape(config.title)}</h1>", budget.note(), *sections])
    path = folder / REPORT_FILE
    write_atomically(path, html_page(config.title, body).encode())
    logger.info("%s, %.1f MB", path, path.stat().st_size / 1e6)
    return path


def tables(folder: Path) -> Iterator[str]:
    """The tables of a folder as HTML, Unified as a plot first.

    Raises:
        ConfigError: A table is not JSON.
    """
    for name in _TABLES:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}. Run align.evaluation.chatgen again.") from error
        yield f"<h2>{escape(TITLES[name].rstrip('.'))}</h2>"
        if name == "table4":
            yield _plot(table)
        yield _table(name, table)


def gallery(
    results: PlanResults, chats: Mapping[str, Any], pictures: ChatPictures, budget: PictureBudget, num_chats: int
) -> str:
    """Chats, evenly spaced in each input type whatever came of them, and what each method made of them.

    Args:
        results: Of which run: the first.
        chats: Messages by row.
        pictures: Opens those of chats, which nobody has to trust.
        budget: For all pictures.
        num_chats: At most, over all input types.
    """
    about = results.about
    drawn = bool(about.scorers)
    by_row: dict[str, dict[str, Row]] = {}
    for method in about.drawn or about.agents:
        for row in results.of("", method):
            if row["run"] == about.runs[0] and row["row_id"] in chats and not (drawn and row["drawn_from"] == NOBODY):
                by_row.setdefault(row["row_id"], {})[method] = row
    types: dict[str, list[dict[str, Row]]] = {}
    for of_methods in by_row.values():
        types.setdefault(next(iter(of_methods.values()))["input_type"], []).append(of_methods)
    run = f"; of run {escape(about.runs[0])}" if len(about.runs) > 1 else ""
    parts = [f"<h2>Chats</h2><p class=soft>The first picture of each plan, all of a chat with one seed{run}.</p>"]
    for name, found in types.items():
        for of_methods in evenly(found, max(1, num_chats // len(types))):
            first = next(iter(of_methods.values()))
            parts.append(f"<h3>{escape(name)}</h3>{_chat(chats[first['row_id']], pictures, budget)}")
            parts.append(f"<p class=soft>Human-validated prompt: {escape(first['prompt'])}</p>")
            parts.append(picture_row([_plan(method, row, drawn, budget) for method, row in of_methods.items()]))
    return "\n".join(parts)


def _compared(results: PlanResults) -> str:
    about = results.about
    agents = ", ".join(f"<b>{escape(name)}</b>" for name in about.agents)
    chats = len({row["row_id"] for row in results.rows})
    runs = f" Runs: {escape(', '.join(about.runs))}." if len(about.runs) > 1 else ""
    return f"Agents that make a plan of a chat: {agents}. {chats:,} chats of the test split.{runs}"


def _plot(table: Mapping[str, Any]) -> str:
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in table["rows"]):
        of = [(r["method"], r["unified"]) for r in table["rows"] if r["setting"] == setting and r.get("unified")]
        if of:
            plot = dot_plot(of, title=f"Unified metric by method, {setting}")
            parts.append(f'<h3>{escape(setting)}: unified metric, times 100</h3><div class="scroll plot">{plot}</div>')
    return "".join(parts)


def _table(name: str, table: Mapping[str, Any]) -> str:
    labels, estimates, others = ([*table[key]] for key in ("labels", "estimates", "others"))
    groups = [label for label in labels if label != "method"]
    rows = []
    for row in table["rows"]:
        cells = [_cell(field, row[field]) for field in estimates]
        cells += [f'<td class="text">{escape(_plain(shown_value(row[field]))) or "–"}</td>' for field in others]
        group = ", ".join(f"{HEADINGS.get(label, label)}: {row[label]}" for label in groups)
        rows.append((group or "all chats", row["method"], "".join(cells)))
    order = list(dict.fromkeys(group for group, _, _ in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    heads = [*(f"<th>{escape(HEADINGS.get(name, name))}</th>" for name in estimates)]
    heads += [f'<th class="text">{escape(HEADINGS.get(name, name))}</th>' for name in others]
    return grouped_table("".join(heads), rows, _plain(table_note(name, table)))


def _plain(markdown: str) -> str:
    return markdown.replace("\\|", "|")


def _cell(field: str, estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "<td>–</td>"
    value, low, high = (shown_number(field, estimate[part]) for part in ("value", "low", "high"))
    return f"<td>{value}<small>{low} to {high}</small></td>"


def _chat(messages: Sequence[Row], pictures: ChatPictures, budget: PictureBudget) -> str:
    lines = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = " ".join(_part(part, pictures, budget) for part in parts)
        role = "assistant" if message["role"] == "assistant" else "user"
        lines.append(f'<p class="{role}">{shown}</p>')
    return f'<div class="chat">{"".join(lines)}</div>'


def _part(part: Row, pictures: ChatPictures, budget: PictureBudget) -> str:
    if part["type"] != "image":
        return escape(part["text"] or "")
    try:
        return budget.show(pictures.open(part["image"]), "picture in the chat")
    except PictureError:
        return "[picture]"


def _plan(method: str, row: Row, drawn: bool, budget: PictureBudget) -> str:
    plan = json.loads(row["plan"])
    of_truth = method != GROUND_TRUTH and plan["model"] == row["model"]
    lines = [
        f"<b>{escape(method)}</b>",
        f"<span{' class=good' if of_truth else ''}>{escape(plan['model'])}</span>",
        f"<span>{escape(_arguments(plan['arguments']))}</span>",
        f"<span class=written><i>{escape(plan['prompt'])}</i></span>",
    ]
    if row["scores"]:
        scores = (f"{HEADINGS.get(n, n)} {shown_number(n, float(np.mean(v)))}" for n, v in row["scores"].items())
        lines.append(f"<span>{escape(', '.join(scores))}</span>")
    if row["drawn_from"] == BASELINE:
        reason = escape(row["not_drawn"] or "")
        lines.append(f'<span class="warn">not drawn ({reason}): default call’s picture</span>')
    image = budget.tag(next(iter(row["images"] or []), None), f"{method}: {plan['model']}") if drawn else ""
    return figure(image, lines)


def _arguments(arguments: Row) -> str:
    known = {name: value for name, value in arguments.items() if value is not None}
    width, height = known.pop("width", None), known.pop("height", None)
    size = [f"{width}x{height}"] if width and height else []
    return ", ".join([f"{name.replace('_', ' ')} {value}" for name, value in known.items()] + size)


def _dataset_of(folder: Path) -> str:
    try:
        return str(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["dataset"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/config.yaml names no `dataset`; give `dataset`, for the chats.") from error


if __name__ == "__main__":
    run_command(main, ChatGenReportConfig, errors=(ConfigError, DataError, PlanResultsError))
