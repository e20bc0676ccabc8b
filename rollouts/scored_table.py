"""Scored candidates: what a rollout ends in and RRHF learns from, as a table that `datasets.load_dataset` reads.

A row per prompt: `prompt_id`, `instruction`, `policy` (fingerprint of who proposed the calls, or null) and
`candidates`, each with `response`, `call` (null if it is none), `origin`, `seeds`, `images` (where each picture lies,
or null), `scores` ({scorer: [one per picture]}), `image_rewards` (the unified metric of each picture, DiffAgent Eq. 6,
or null), `reward` (Eq. 5: their mean over the pictures that have all scores; or null), `reward_standard_error` and
`error` (why there is no reward, or how many pictures it lacks).
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.files import write_atomically
from rewards.unified import UnifiedMetric, per_call
from rollouts.calls_table import Asked, PromptCalls
from rollouts.requests import RenderFailure


def scored_rows(
    prompts: Sequence[PromptCalls],
    asked: Sequence[Asked],
    *,
    scores: Mapping[str, Mapping[str, float]],
    images: Mapping[str, str],
    failures: Mapping[str, RenderFailure],
    metric: UnifiedMetric | None,
) -> list[dict[str, Any]]:
    """Rows of the table.

    Args:
        prompts: As read.
        asked: Of all their candidates.
        scores: Scorer -> key of a picture -> score.
        images: Key -> where the picture lies; of those that were kept.
        failures: Key -> why there is no picture.
        metric: Turns scores into the reward; None: no rewards.
    """
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": prompt.prompt_id,
            "instruction": {"prompt": prompt.prompt, "negative prompt": prompt.negative_prompt},
            "policy": prompt.policy,
            "candidates": [],
        }
        for prompt in prompts
    ]
    for entry in asked:
        candidate = prompts[entry.row].candidates[entry.column]
        keys = [job.key for job in entry.jobs]
        found = {name: [of_scorer.get(key) for key in keys] for name, of_scorer in scores.items()}
        rewards, reward, standard_error = _reward(found, metric, len(keys))
        rows[entry.row]["candidates"].append(
            {
                "response": candidate.response,
                "call": None if entry.failure and entry.failure.reason == "invalid_call" else candidate.call,
                "origin": candidate.origin,
                "seeds": entry.seeds,
                "images": [images.get(key) for key in keys],
                "scores": found,
                "image_rewards": rewards,
                "reward": reward,
                "reward_standard_error": standard_error,
                "error": _error(entry, keys, failures, found),
            }
        )
    return rows


def write_scored(path: str | Path, rows: Sequence[Mapping[str, Any]], scorers: Sequence[str]) -> None:
    """Write the table as Parquet, atomically. A call becomes an object with DABench's fields."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema(scorers)), buffer)
    write_atomically(path, buffer.getvalue())


def fit_on(asked: Sequence[Asked], scores: Mapping[str, Mapping[str, float]], population: str) -> UnifiedMetric | None:
    """The unified metric of everything a rollout scored; None if no scorer has two different values."""
    keys = list(dict.fromkeys(job.key for entry in asked for job in entry.jobs))
    values = {name: [of_scorer.get(key) for key in keys] for name, of_scorer in scores.items()}
    if not values or any(len({v for v in of_scorer if v is not None}) < 2 for of_scorer in values.values()):
        return None
    return UnifiedMetric.fit({name: _as_floats(v) for name, v in values.items()}, population=population)


def _reward(
    found: Mapping[str, list[float | None]], metric: UnifiedMetric | None, num_images: int
) -> tuple[list[float | None], float | None, float | None]:
    """Of each picture, their mean, and its standard error."""
    if metric is None or not any(found.values()):
        return [None] * num_images, None, None
    values = metric({name: _as_floats(of_scorer) for name, of_scorer in found.items()}).values
    of_call = per_call(values, ["call"] * len(values))["call"]
    return [_or_none(value) for value in values.tolist()], _or_none(of_call.mean), _or_none(of_call.standard_error)


def _error(
    entry: Asked, keys: list[str], failures: Mapping[str, RenderFailure], found: Mapping[str, list[float | None]]
) -> str | None:
    if entry.failure is not None:
        return f"{entry.failure.reason}: {entry.failure.message}"
    if failed := [failures[key] for key in keys if key in failures]:
        return f"{failed[0].reason}: {len(failed)} of {len(keys)} pictures failed: {failed[0].message}"
    if lacking := [name for name, of_scorer in found.items() if None in of_scorer]:
        return f"no_score: {', '.join(lacking)} could not score every picture"
    return None


def _as_floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _schema(scorers: Sequence[str]) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    call = pa.struct(
        [("model", text), ("type", text), ("base Model", text), ("width", pa.int64()), ("height", pa.int64()),
         ("sampling method", text), ("sampling steps", pa.int64()), ("cfg scale", number), ("model description", text)]
    )  # fmt: skip
    scores = [("scores", pa.struct([(name, pa.list_(number)) for name in scorers]))] if scorers else []
    candidate = pa.struct(
        [("response", text), ("call", call), ("origin", text), ("seeds", pa.list_(pa.int64())),
         ("images", pa.list_(text)), *scores,  # Parquet has no objects without fields
         ("image_rewards", pa.list_(number)), ("reward", number), ("reward_standard_error", number), ("error", text)]
    )  # fmt: skip
    instruction = pa.struct([("prompt", text), ("negative prompt", text)])
    return pa.schema(
        [("prompt_id", text), ("instruction", instruction), ("policy", text), ("candidates", pa.list_(candidate))]
    )
