"""Score a folder or a table of (prompt, image) with any scorers.

    python -m rewards.score --config configs/rewards/score.yaml --source images/ --output runs/scores
    python -m rewards.score --scorer image_reward --checkpoint ImageReward.pt --source table.jsonl --output runs/scores

Writes scores.parquet (a row per pair; a score that could not be computed is null, with the reason beside it),
summary.json and the resolved config.yaml. Work is saved part by part: after a kill, the same command goes on.
"""

import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rewards.pairs_table import Pairs, TableError, read_pairs
from rewards.registry import BUILT_IN, ScorerCall, load_scorer
from rewards.unified import UnifiedMetric, UnifiedMetricError

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.parquet"
SUMMARY_FILE = "summary.json"


@dataclass
class ScoreConfig:
    """Options of `python -m rewards.score`."""

    source: str = field(metadata={"help": "Table (.jsonl, .csv, .tsv, .parquet) or folder of images."})
    output: str = field(metadata={"help": "Folder for scores.parquet, summary.json and config.yaml."})
    scorers: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "In a YAML file: list of {name: …, checkpoint: …, …}, the arguments of load_scorer."},
    )
    scorer: str | None = field(default=None, metadata={"help": "Name of a single scorer, instead of `scorers`."})
    checkpoint: str | None = field(default=None, metadata={"help": "Weights of `scorer`; none: the official ones."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    image_column: str = field(default="image", metadata={"help": "Column of the images (paths or contents)."})
    keep: list[str] = field(default_factory=list, metadata={"help": "Further columns to carry into the result."})
    device: str | None = field(default=None, metadata={"help": "Where to run; none: the GPU if there is one."})
    dtype: str | None = field(default=None, metadata={"help": "float32 (none), bfloat16 or float16, for all scorers."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Images per forward pass; none: 32 on a GPU, 4 on a CPU."}
    )
    num_workers: int = field(default=4, metadata={"help": "Threads that decode images."})
    rows_per_part: int = field(default=512, metadata={"help": "Rows computed between two saves."})
    unified: str | None = field(default=None, metadata={"help": "Saved unified metric to add as column `unified`."})
    fit_unified: str | None = field(
        default=None, metadata={"help": "Name of this population: fit the unified metric on it, add it and save it."}
    )
    max_error_share: float = field(
        default=1.0, metadata={"help": "End with exit code 1 if more than this share of the rows has an error."}
    )

    def __post_init__(self):
        if (self.scorer is None) == (not self.scorers):
            raise ValueError("Give either `scorers` (a list, in the YAML file) or `scorer` (a name).")
        for entry in self.scorers or []:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
                raise ValueError(f"`scorers` must hold mappings with a `name`, but has {entry!r}.")
        if self.checkpoint and self.scorer is None:
            raise ValueError("`checkpoint` belongs to `scorer`; in `scorers` each entry has its own.")
        if self.rows_per_part < 1 or self.num_workers < 0:
            raise ValueError("`rows_per_part` must be at least 1, `num_workers` at least 0.")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"`max_error_share` must lie in [0, 1], but got {self.max_error_share}.")
        if self.unified and self.fit_unified:
            raise ValueError("Give `unified` (a saved metric) or `fit_unified` (a new one), not both.")
        names = [column_of(entry) for entry in self.entries()]
        for name in names:
            if names.count(name) > 1 or name in ("prompt", "image", "unified", *self.keep):
                raise ValueError(f"Two things would be written to the column {name!r}; give the scorer a `column`.")

    def entries(self) -> list[dict[str, Any]]:
        """Arguments of `load_scorer` for each scorer, and its `column`."""
        common = {"device": self.device, "dtype": self.dtype}
        if self.scorer is not None:
            return [{"name": self.scorer, "checkpoint": self.checkpoint, **common}]
        return [common | dict(entry) for entry in self.scorers or []]


def main(config: ScoreConfig) -> dict[str, Any]:
    """Score every row and return the summary."""
    pairs = read_pairs(
        config.source, prompt_column=config.prompt_column, image_column=config.image_column, keep=config.keep
    )
    metric = UnifiedMetric.load(config.unified) if config.unified else None
    scorers = {column_of(entry): _load(entry, config) for entry in config.entries()}
    output = Path(config.output)
    save_config(output / "config.yaml", config)
    described = {name: describe(scorer) for name, scorer in scorers.items()}
    parts = output / "parts" / _key(config, pairs, described)
    started = time.perf_counter()
    computed = _score_parts(pairs, scorers, parts, config.rows_per_part)
    table = _merge(parts, pairs, metric, config)
    buffer = io.BytesIO()
    _write_parquet(table, buffer)
    write_atomically(output / SCORES_FILE, buffer.getvalue())
    summary = _summary(table, pairs, scorers, described)
    summary["seconds"], summary["rows_computed"] = round(time.perf_counter() - started, 2), computed
    write_atomically(output / SUMMARY_FILE, json.dumps(summary, indent=2).encode())
    logger.info("%s", summary_text(summary))
    if summary["error_share"] > config.max_error_share:
        logger.error("%.1f%% of the rows have an error, see %s.", 100 * summary["error_share"], output / SCORES_FILE)
        sys.exit(1)
    return summary


def column_of(entry: Mapping[str, Any]) -> str:
    """Column of a scorer's scores: its `column`, or its name."""
    return str(entry.get("column") or entry["name"])


def describe(scorer: ScorerCall) -> dict[str, Any]:
    """What a scorer says of itself; only its class for one that says nothing."""
    own = getattr(scorer, "describe", None)
    return own() if own else {"name": type(scorer).__qualname__}


def _load(entry: dict[str, Any], config: ScoreConfig) -> ScorerCall:
    options: dict[str, Any] = {key: value for key, value in entry.items() if key != "column" and value is not None}
    if options["name"] in BUILT_IN.keys() - {"remote"}:
        options = {"batch_size": config.batch_size, "num_workers": config.num_workers, **options}
    try:
        return load_scorer(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"The scorer {column_of(entry)}: {error}") from error


def _key(config: ScoreConfig, pairs: Pairs, described: dict[str, Any]) -> str:
    """Parts computed with other data, weights or part sizes must not be mixed."""
    content = json.dumps([pairs.digest(), described, config.rows_per_part], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _score_parts(pairs: Pairs, scorers: dict[str, ScorerCall], folder: Path, size: int) -> int:
    """Compute the parts that are not there yet; returns how many rows that was."""
    import pyarrow as pa

    from rewards.scorer import score_rows

    computed = 0
    with tqdm(total=len(pairs), desc="score", unit="row") as bar:
        for start in range(0, len(pairs), size):
            stop = min(start + size, len(pairs))
            path = folder / f"{start:09d}.parquet"
            if not path.is_file():
                columns: dict[str, Any] = {}
                for name, scorer in scorers.items():
                    scores, errors = score_rows(scorer, pairs.prompts[start:stop], pairs.images[start:stop])
                    values = [None if row in errors else score for row, score in enumerate(scores.tolist())]
                    columns[name] = pa.array(values, pa.float32())
                    columns[f"{name}_error"] = pa.array([errors.get(row) for row in range(stop - start)], pa.string())
                buffer = io.BytesIO()
                _write_parquet(pa.table(columns), buffer)
                write_atomically(path, buffer.getvalue())
                computed += stop - start
            bar.update(stop - start)
    return computed


def _merge(folder: Path, pairs: Pairs, metric: Any, config: ScoreConfig) -> Any:
    """The whole table: prompts, images, kept columns, scores, errors, and the unified metric."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])
    prompts = [prompt if isinstance(prompt, str) else None for prompt in pairs.prompts]
    columns: dict[str, Any] = {"prompt": pa.array(prompts, pa.string()), "image": pa.array(pairs.names, pa.string())}
    columns |= {name: pa.array(values) for name, values in pairs.kept.items()}
    columns |= {name: scores[name] for name in scores.column_names}
    if config.fit_unified or metric is not None:
        import torch

        named = [column_of(entry) for entry in config.entries()]
        values = {
            name: torch.tensor([float("nan") if v is None else v for v in scores[name].to_pylist()]) for name in named
        }
        if metric is None:
            metric = UnifiedMetric.fit(values, population=str(config.fit_unified))
            metric.save(Path(config.output) / "unified.json")
        unified = metric(values).values.tolist()
        columns["unified"] = pa.array([None if value != value else value for value in unified], pa.float32())
    return pa.table(columns)


def _write_parquet(table: Any, buffer: io.BytesIO) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, buffer)


def _summary(
    table: Any, pairs: Pairs, scorers: dict[str, ScorerCall], described: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Numbers of each scorer over the rows it could score, and how many it could not."""
    import numpy as np

    summary: dict[str, Any] = {"rows": len(pairs), "scorers": {}}
    failed = np.zeros(len(pairs), bool)
    for name, scorer in scorers.items():
        values = table[name].to_numpy(zero_copy_only=False).astype(float)
        errors = [error for error in table[f"{name}_error"].to_pylist() if error is not None]
        failed |= np.isnan(values)
        good = values[~np.isnan(values)]
        entry: dict[str, Any] = {"n": len(good), "errors": len(errors), "first_errors": errors[:5]}
        if len(good):
            entry |= {"mean": good.mean(), "sd": good.std(ddof=1) if len(good) > 1 else None}
            entry |= dict(zip(("min", "p05", "median", "p95", "max"),
                              np.quantile(good, [0, 0.05, 0.5, 0.95, 1]).tolist(), strict=True))  # fmt: skip
        if share := getattr(scorer, "truncated_share", None):
            entry["truncated_share"] = share(pairs.prompts)
        summary["scorers"][name] = entry | {"scorer": described[name]}
    summary["error_share"] = float(failed.mean())
    return summary


def summary_text(summary: dict[str, Any]) -> str:
    """A line per scorer for people."""
    lines = [f"{summary['rows']} rows"]
    for name, entry in summary["scorers"].items():
        line = f"{name}: n {entry['n']}, errors {entry['errors']}"
        if entry["n"]:
            line += f", mean {entry['mean']:.4f}, from {entry['min']:.4f} to {entry['max']:.4f}"
        if entry.get("truncated_share"):
            line += f"; {100 * entry['truncated_share']:.1f}% of the prompts are longer than it reads"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, ScoreConfig, errors=(TableError, UnifiedMetricError))
