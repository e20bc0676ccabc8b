"""DiffAgent's Tables 1 and 2 over several training seeds.

    python -m align.evaluation.pool --runs runs/seed0/tables runs/seed1/tables --output_dir runs/tables

Pools what `python -m align.evaluation.diffagent` wrote for each seed. The unified metric is fitted anew on the raw
scores of all runs, so that its values can be compared; intervals are of a two-level bootstrap (runs, then prompts);
every run's own values stand below. Writes the same files as that command; `python -m align.evaluation.report` shows
them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.evaluation.comparison import Comparison, ComparisonError, load_comparison
from align.evaluation.diffagent_tables import write_tables
from rewards.commandline import run_command, save_config
from rewards.unified import UnifiedMetricError

logger = logging.getLogger(__name__)

_EQUAL = (
    "architecture", "catalog", "prompt_sets", "methods", "answering", "baseline", "ours", "baseline_call", "scorers",
    "num_images",
)  # fmt: skip


@dataclass
class PoolTablesConfig:
    """Options of `python -m align.evaluation.pool`."""

    runs: list[str] = field(metadata={"help": "Output folders of align.evaluation.diffagent, one per seed."})
    output_dir: str = field(metadata={"help": "Folder for the tables; none of `runs`."})


def main(config: PoolTablesConfig) -> dict[str, Any]:
    """Pool and write the tables."""
    tables = pool(config.runs, config.output_dir)
    output = Path(config.output_dir)
    save_config(output / "config.yaml", config)
    logger.info("%s\n%s", (output / "table1.md").read_text(), (output / "table2.md").read_text())
    return tables


def pool(folders: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Pool runs into one comparison and write its tables.

    Args:
        folders: Of the runs.
        output: Where to write.

    Returns:
        `{"table1": ..., "table2": ...}`, what the JSON files hold.

    Raises:
        ComparisonError: A folder that can't be read or is given twice, or runs that compare different things.
        UnifiedMetricError: Scores without spread.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not paths or len(set(paths)) < len(paths):
        raise ComparisonError(f"`runs` must name different folders, at least one, but is {[*map(str, folders)]}.")
    if Path(output).resolve() in paths:
        raise ComparisonError(f"`output_dir` {output} is one of `runs`, which would be overwritten; choose another.")
    comparisons = [load_comparison(path) for path in paths]
    first = comparisons[0].about
    for path, other in zip(paths, comparisons, strict=True):
        if len(other.about.runs) > 1:
            raise ComparisonError(f"{path} is pooled already; name the folders of its runs instead.")
        for name in _EQUAL:
            theirs, ours = _drawn(getattr(other.about, name)), _drawn(getattr(first, name))
            if theirs != ours:
                raise ComparisonError(f"{path} can't be pooled with {paths[0]}: `{name}` is {theirs} and {ours}.")
    names = run_names(paths)
    rows = [row | {"run": name} for name, of in zip(names, comparisons, strict=True) for row in of.rows]
    agents = {agent: ", ".join(dict.fromkeys(c.about.agents[agent] for c in comparisons)) for agent in first.agents}
    return write_tables(output, Comparison(replace(first, runs=names, agents=agents), rows))


def _drawn(value: Any) -> Any:
    """Of a call, what decides the picture: descriptions of the same model can differ from data set to data set."""
    return {k: v for k, v in value.items() if k != "model description"} if isinstance(value, dict) else value


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, all of one depth, that tell them apart."""
    depth = next(n for n in range(1, 1000) if len({path.parts[-n:] for path in paths}) == len(paths))
    return ["/".join(path.parts[-depth:]) for path in paths]


if __name__ == "__main__":
    run_command(main, PoolTablesConfig, errors=(ComparisonError, UnifiedMetricError))
