"""What was compared, prompt by prompt: `per_prompt.parquet`, from which DiffAgent's Tables 1 and 2 are counted.

A row per prompt and method: `run`, `prompt_set`, `prompt_id`, `prompt`, `negative_prompt`, `method`, `answer` (an
agent's text; null for methods that don't write), `call` (JSON text of the call asked for, in the common shape; null if
the answer is a hallucination), `hallucinated`, `reason`, `sampled_hallucination` (share of an agent's sampled answers
that can't be called; null if there are none), `drawn_from` (`own`; `baseline`: its pictures stand in;
`nobody`: the prompt is one of Table 1 alone),
`not_drawn` (why a call that is no hallucination has no pictures of its own), `drawn_call`, `images`, `scores` ({scorer:
[one per picture]}), `means` ({scorer: mean}) and `unified` (mean over the pictures). Where not even the baseline could
be drawn, or nobody was, `scores`, `means` and `unified` are null, for all methods.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards.files import write_atomically
from rewards.unified import UnifiedMetric

ROWS_FILE = "per_prompt.parquet"
METRIC_FILE = "unified.json"
NOBODY = "nobody"
_KEY, _FORMAT, _VERSION = b"t2i-align", "t2i-align comparison", 1


class ComparisonError(ValueError):
    """A file of compared rows that can't be used; the message names the file and the field."""


@dataclass(frozen=True)
class About:
    """What holds for all rows.

    Attributes:
        architecture: Base model architecture.
        catalog: Number of callable versions.
        runs: Names of the runs; more than one if they were pooled.
        prompt_sets: Names, in order.
        methods: Names, in order.
        agents: Those of them that are policies, and where these lie; the first is what the others are compared with.
        answering: Those of them that could hallucinate or choose: agents and baselines that choose a model.
        baseline: The method whose pictures stand in.
        ours: The agent whose parts are combined with the baseline's.
        baseline_call: The default call.
        scorers: Columns of scores.
        num_images: Pictures per call.
    """

    architecture: str
    catalog: int
    runs: list[str]
    prompt_sets: list[str]
    methods: list[str]
    agents: dict[str, str]
    answering: list[str]
    baseline: str
    ours: str
    baseline_call: dict[str, Any]
    scorers: list[str]
    num_images: int


@dataclass(frozen=True)
class Comparison:
    """Rows, and what they are of."""

    about: About
    rows: list[dict[str, Any]]

    def of(self, method: str, prompt_set: str) -> list[dict[str, Any]]:
        """The rows of a method on a prompt set, in the order of runs and prompts."""
        return [row for row in self.rows if row["method"] == method and row["prompt_set"] == prompt_set]


def unify(comparison: Comparison, population: str) -> tuple[Comparison, UnifiedMetric]:
    """Fit the unified metric on the scores of everything compared, and give every row its value by it.

    Args:
        comparison: With raw scores; its rows are not changed.
        population: What was compared, for whoever reads the saved metric.

    Returns:
        The same rows with `unified`, and the metric.

    Raises:
        UnifiedMetricError: Scores without spread.
        ComparisonError: No prompt has scores.
    """
    scorers = comparison.about.scorers
    scored = [row for row in comparison.rows if row["scores"] is not None]
    if not scored:
        raise ComparisonError("No prompt has a picture of the baseline with all scores; there is nothing to compare.")
    values = {name: np.concatenate([row["scores"][name] for row in scored]) for name in scorers}
    metric = UnifiedMetric.fit(values, population=population)
    unified = iter(metric(values).values.double().tolist())
    rows = []
    for row in comparison.rows:
        value = None
        if row["scores"] is not None:
            value = float(np.mean([next(unified) for _ in row["scores"][scorers[0]]]))
        rows.append(row | {"unified": value})
    return Comparison(comparison.about, rows), metric


def save_comparison(folder: str | Path, comparison: Comparison) -> None:
    """Write `per_prompt.parquet`, atomically; `About` is in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"format": _FORMAT, "version": _VERSION, **asdict(comparison.about)}
    schema = _schema(comparison.about.scorers).with_metadata({_KEY: json.dumps(about, ensure_ascii=False).encode()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(comparison.rows, schema=schema), buffer)
    write_atomically(Path(folder) / ROWS_FILE, buffer.getvalue())


def load_comparison(folder: str | Path) -> Comparison:
    """Read what `save_comparison` wrote into a folder.

    Raises:
        ComparisonError: No such file, another format or version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / ROWS_FILE
    if not path.is_file():
        raise ComparisonError(f"There is no {path}; write it with python -m align.evaluation.diffagent.")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_KEY])
        if about.pop("format") != _FORMAT or (version := about.pop("version")) != _VERSION:
            raise ComparisonError(f"{path} has version {version}, but this program reads {_VERSION}; write it again.")
        return Comparison(About(**about), table.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise ComparisonError(f"{path} is not a Parquet file: {error}.") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ComparisonError(f"{path} was not written by align.evaluation.diffagent or .pool.") from error


def usable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of prompts that could be drawn."""
    return [row for row in rows if row["unified"] is not None]


def _schema(scorers: Sequence[str]) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    return pa.schema(
        [(name, text) for name in ("run", "prompt_set", "prompt_id", "prompt", "negative_prompt", "method", "answer")]
        + [
            ("call", text),
            ("hallucinated", pa.bool_()),
            ("reason", text),
            ("sampled_hallucination", number),
            ("drawn_from", text),
            ("not_drawn", text),
        ]
        + [("drawn_call", text), ("images", pa.list_(text))]
        + [("scores", pa.struct([(name, pa.list_(number)) for name in scorers]))]
        + [("means", pa.struct([(name, number) for name in scorers])), ("unified", number)]
    )
