"""Who chooses the right model, by how many demonstrations of it there are to learn from (ChatGen Table 6, "Model
Selection").

    python -m align.evaluation.model_selection --tokens runs/chatgen-tokens --dataset data/chatgenbench \
        --plans '{"Base": "runs/chatgen-tables/plans-1.jsonl"}' --output_dir runs/chatgen-selection

Model tokens (`align/model_tokens.py` tested them) beside nearest neighbours that are shown the same chats, and policies
that write the model's name. Model tokens read the chat and its human-validated prompt; neighbours read that, or the
chat only, as policies that have to write everything do.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.bench.chatgen.schema import chat_text
from align.chats import SHOT_GROUPS, load_chats, shot_group
from align.evaluation.baselines import EmbeddingNeighbour, MostPopular, TfidfNeighbour
from align.evaluation.held_back_models import training_options
from align.evaluation.metrics import Estimate, bootstrap
from align.evaluation.plan_metrics import chosen_models
from align.model_tokens import ModelTokenArguments, chosen_rows
from align.pairs import DataError
from rewards.commandline import ConfigError, from_json, run_command, save_config
from rewards.files import write_atomically
from rollouts.catalog import Catalog

logger = logging.getLogger(__name__)

ALL = "all"
MODEL_TOKENS = "model tokens"
NEIGHBOURS = ("tfidf", "embedding")
_FIRST = 5

Ranks = Mapping[str, int | None]
"""Row id -> how many models are ahead of the right one; None: it is not among those that were named."""


@dataclass
class ModelSelectionConfig:
    """Options of `python -m align.evaluation.model_selection`."""

    tokens: str = field(metadata={"help": "Output folder of align/model_tokens.py."})
    dataset: str = field(metadata={"help": "ChatGenBench folder it was trained on."})
    output_dir: str = field(metadata={"help": "Folder of model_selection.json and .md."})
    plans: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Name -> plans file of align.evaluation.chatgen, as JSON; only chats that all of them have are "
            "counted then."
        },
    )
    neighbours: list[str] = field(default_factory=lambda: ["tfidf"], metadata={"help": "Any of tfidf, embedding."})
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "For `embedding`: name or folder."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Whose most downloaded model is compared with."})

    def __post_init__(self) -> None:
        self.plans = from_json("plans", self.plans or {}, dict)
        if unknown := sorted(set(self.neighbours) - set(NEIGHBOURS)):
            raise ValueError(f"`neighbours` may hold {', '.join(NEIGHBOURS)}, but has {', '.join(unknown)}.")


def main(config: ModelSelectionConfig) -> dict[str, Any]:
    """Count, and write the tables; returns what model_selection.json holds."""
    arguments, _ = training_options(config.tokens, config.dataset)
    train, _, tested = chosen_rows(load_chats(config.dataset), arguments)
    shots, tokens = read_selection(Path(config.tokens) / "selection.jsonl", {row["id"] for row in tested})
    methods: dict[str, Ranks] = {MODEL_TOKENS: tokens}
    for name, path in from_json("plans", config.plans, dict).items():
        methods[name] = read_written_models(Path(path), {row["id"]: row["model"] for row in tested})
    common = set.intersection(*(set(ranks) for ranks in methods.values()))
    rows = [row for row in tested if row["id"] in common]
    if not rows:
        raise DataError("`plans` and the test rows of `tokens` have no chat in common; were both made of `dataset`?")
    logger.info("%d of %d tested chats are in everything that is compared", len(rows), len(tested))
    methods |= dict(neighbours(config, arguments, train, rows))

    groups = {ALL: rows} | {name: [r for r in rows if shot_group(shots[r["id"]]) == name] for name in SHOT_GROUPS}
    report = {
        group: {method: _accuracy([ranks[row["id"]] for row in of_group]) for method, ranks in methods.items()}
        for group, of_group in groups.items()
        if of_group
    }
    output = Path(config.output_dir)
    save_config(output / "config.yaml", config)
    write_atomically(output / "model_selection.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "model_selection.md", to_markdown(report).encode())
    logger.info("\n%s", to_markdown(report))
    return report


def read_selection(path: Path, wanted: set[str]) -> tuple[dict[str, int], dict[str, int | None]]:
    """Demonstrations of each tested chat's model, and the model tokens' ranks.

    Raises:
        ConfigError: There is no such file, or it is of other rows.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there; let align/model_tokens.py run to its end.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if {line["id"] for line in lines} != wanted:
        raise ConfigError(f"{path} does not hold the test chats of `dataset`; give the one that it was made of.")
    return {line["id"]: line["shots"] for line in lines}, {line["id"]: line["rank"] for line in lines}


def read_written_models(path: Path, truth: Mapping[str, str]) -> dict[str, int | None]:
    """Ranks by what a policy wrote, not by what stood in for it.

    Args:
        path: Plans file of `align.evaluation.chatgen`.
        truth: Model of each row.

    Raises:
        ConfigError: There is no such file, or a line is none of a plan.
    """
    if not path.is_file():
        raise ConfigError(f"`plans` names {path}, which is not there.")
    ranks: dict[str, int | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            row, names = entry["id"], chosen_models(entry["plan"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no plan of align.evaluation.chatgen.") from error
        if row in truth:
            ranks[row] = names.index(truth[row]) if truth[row] in names else None
    return ranks


def neighbours(
    config: ModelSelectionConfig, arguments: ModelTokenArguments, train: Any, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Ranks]]:
    """The most downloaded model, and the models of the nearest training chats; ranks of the first five only.

    Raises:
        ConfigError: A package that is not installed.
    """
    catalog = Catalog.load(Path(arguments.catalog or Path(config.dataset) / "catalog.jsonl"))
    known = [row for row in train if row["model"] in catalog]
    if not known:
        raise DataError("No training row's model is in the catalogue, so there are no neighbours.")
    calls = {name: catalog[name].default_call() for name in {row["model"] for row in known}}
    of_row = [calls[row["model"]] for row in known]
    chats = [chat_text(row["messages"]) for row in rows]
    popular = MostPopular(catalog, config.architecture)
    yield popular.name, _ranked(popular, chats, rows)
    for reads, text in (("chat", _chat), ("chat and prompt", _chat_and_prompt)):
        shown, asked = [text(row) for row in known], [text(row) for row in rows]
        for name in config.neighbours:
            try:
                if name == "tfidf":
                    found: Any = TfidfNeighbour(shown, of_row)
                else:
                    found = EmbeddingNeighbour(shown, of_row, config.encoder)
            except ImportError as error:
                raise ConfigError(str(error)) from error
            yield f"{found.name} ({reads})", _ranked(found, asked, rows)


def to_markdown(report: Mapping[str, Any]) -> str:
    """A line for each method, a column for each number of demonstrations: top 1, then top 5, per cent with 95%
    intervals."""
    lines: list[str] = []
    for title, key in (("first", "top1"), (f"in the first {_FIRST}", f"top{_FIRST}")):
        heading = [f"{group} (n = {next(iter(found.values()))['n']:,})" for group, found in report.items()]
        lines += [f"| right version {title} | {' | '.join(heading)} |", "|---|" + "---:|" * len(report)]
        for method in report[ALL]:
            cells = [_cell(found[method][key]) for found in report.values()]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _chat(row: Mapping[str, Any]) -> str:
    return chat_text(row["messages"])


def _chat_and_prompt(row: Mapping[str, Any]) -> str:
    return f"{_chat(row)}\n{row['prompt']}"


def _ranked(chooser: Any, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    found = zip(rows, chooser.ranked(texts, _FIRST), strict=True)
    return {row["id"]: names.index(row["model"]) if row["model"] in names else None for row, names in found}


def _accuracy(ranks: Sequence[int | None]) -> dict[str, Any]:
    counts = {f"top{k}": bootstrap([float(r is not None and r < k) for r in ranks])._asdict() for k in (1, _FIRST)}
    return {"n": len(ranks), **counts}


def _cell(estimate: Mapping[str, Any]) -> str:
    e = Estimate(**estimate)
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


if __name__ == "__main__":
    run_command(main, ModelSelectionConfig, errors=(DataError,))
