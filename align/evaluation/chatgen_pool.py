"""ChatGen's Tables 4 to 7 over several training seeds.

    python -m align.evaluation.chatgen_pool --runs runs/seed0/tables runs/seed1/tables --output_dir runs/chatgen-pooled

Pools what `python -m align.evaluation.chatgen` wrote for each seed. The unified metric is fitted anew on the raw scores
and FIDs of all runs; intervals are of a bootstrap over runs and chats, the same chats for all; every run's own values
stand below.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.evaluation.plan_results import PlanResults, PlanResultsError, load_results, save_results
from align.evaluation.plan_tables import write_tables
from align.evaluation.pool import run_names
from rewards.commandline import run_command, save_config
from rewards.feature_statistics import FIDError
from rewards.unified import UnifiedMetricError

logger = logging.getLogger(__name__)

_EQUAL = ("choosers", "stages", "scorers", "num_images", "references", "features")


@dataclass
class PoolChatGenConfig:
    """Options of `python -m align.evaluation.chatgen_pool`."""

    runs: list[str] = field(metadata={"help": "Output folders of align.evaluation.chatgen, one per seed."})
    output_dir: str = field(metadata={"help": "Folder for the tables; none of `runs`."})
    unified: str = field(
        default="fitted", metadata={"help": "Norms of Eq. 6: fitted (on all runs), paper, or a saved metric."}
    )
    fid_resamples: int = field(default=200, metadata={"help": "Bootstrap resamples for FID and the unified metric."})

    def __post_init__(self) -> None:
        if self.fid_resamples < 1:
            raise ValueError(f"`fid_resamples` must be at least 1, but got {self.fid_resamples}.")


def main(config: PoolChatGenConfig) -> dict[str, Any]:
    """Pool and write the tables; returns what their JSON files hold."""
    paths = [Path(folder).resolve() for folder in config.runs]
    output = Path(config.output_dir)
    if output.resolve() in paths:
        raise PlanResultsError(f"`output_dir` {output} is one of `runs`, which would be overwritten; choose another.")
    results = pool(paths)
    save_results(output, results)
    save_config(output / "config.yaml", config)
    tables = write_tables(output, results, paths, unified=config.unified, resamples=config.fid_resamples)
    logger.info("%s", (output / "table4.md").read_text())
    return tables


def pool(paths: Sequence[Path]) -> PlanResults:
    """The rows of several runs, each named by the end of its path.

    Raises:
        PlanResultsError: A folder that can't be read or is given twice, or runs that compare different things.
    """
    if not paths or len(set(paths)) < len(paths):
        raise PlanResultsError(f"`runs` must name different folders, at least one, but is {[*map(str, paths)]}.")
    found = [load_results(path) for path in paths]
    first = found[0].about
    for path, other in zip(paths, found, strict=True):
        if len(other.about.runs) > 1:
            raise PlanResultsError(f"{path} is pooled already; name the folders of its runs instead.")
        for name in _EQUAL:
            _check_equal(path, paths[0], name, getattr(other.about, name), getattr(first, name))
        _check_equal(path, paths[0], "agents", list(other.about.agents), list(first.agents))
        calls = [(about.default_call or {}) | {"model description": ""} for about in (other.about, first)]
        _check_equal(path, paths[0], "default_call", *calls)
    names = run_names(paths)
    agents = {agent: [results.about.agents[agent] for results in found] for agent in first.agents}
    steps = sorted({step for results in found for step in results.about.steps})
    rows = [row | {"run": name} for name, results in zip(names, found, strict=True) for row in results.rows]
    return PlanResults(replace(first, runs=names, agents=agents, steps=steps), rows)


def _check_equal(path: Path, other: Path, name: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise PlanResultsError(f"{path} can't be pooled with {other}: `{name}` is {theirs} and {ours}.")


if __name__ == "__main__":
    run_command(main, PoolChatGenConfig, errors=(PlanResultsError, UnifiedMetricError, FIDError))
