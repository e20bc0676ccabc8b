"""Numbers for tables: shares and means with bootstrap intervals, hallucination, selection and argument accuracy."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rollouts.api import PARAMETER_INFORMATION
from rollouts.catalog import Catalog, Judged

RESAMPLES = 2000
_DRAWN_AT_ONCE = 1_000_000


class Estimate(NamedTuple):
    """A mean with its 95% percentile-bootstrap interval over n items."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of `values` with the 2.5% and 97.5% quantiles of the means of resamples.

    Raises:
        ValueError: If there are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("A mean of no values does not exist.")
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // data.size)
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    means = np.concatenate([data[rng.integers(0, data.size, (count, data.size))].mean(1) for count in counts])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


def bootstrap_runs(
    runs: Sequence[Sequence[float]],
    *,
    items: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean over runs (training seeds) of their means, with an interval for other runs and other items.

    Runs are drawn, and items in each: independently, or with `items` the same ones in every run, as what an item
    does to all runs is not averaged away by having more of them. Runs count alike, however many items they have. With
    few runs a percentile interval is on the short side.

    Args:
        runs: Values of each run.
        items: Name of each value's item, if runs share items.
        seed: Of the resamples; a single run gives what `bootstrap` gives.
        resamples: How many.

    Raises:
        ValueError: If there is no run, or one without values.
    """
    data = [np.asarray(values, dtype=np.float64) for values in runs]
    if len(data) == 1:
        return bootstrap(runs[0], seed=seed, resamples=resamples)
    if not data or any(values.size == 0 for values in data):
        raise ValueError("A mean of no values does not exist: every run needs at least one.")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(data), (resamples, len(data)))
    if items is None:
        means = np.empty(drawn.shape)
        for run, values in enumerate(data):
            of_run = drawn == run
            chosen = rng.integers(0, values.size, (int(of_run.sum()), values.size), dtype=np.int32)
            means[of_run] = values[chosen].mean(1)
    else:
        means = np.take_along_axis(_means_of_shared(data, items, rng, resamples), drawn, 1)
    low, high = np.quantile(means.mean(1), [0.025, 0.975])
    value = float(np.mean([values.mean() for values in data]))
    return Estimate(value, float(low), float(high), sum(values.size for values in data))


def shared_positions(items: Sequence[Sequence[str]]) -> np.ndarray:
    """Where each run has each of the items of all runs; -1: nowhere. Shape (runs, items), in the order of names."""
    names = {name: number for number, name in enumerate(sorted({name for of_run in items for name in of_run}))}
    positions = np.full((len(items), len(names)), -1)
    for run, of_run in enumerate(items):
        positions[run, [names[name] for name in of_run]] = np.arange(len(of_run))
    return positions


def _means_of_shared(
    data: Sequence[np.ndarray], items: Sequence[Sequence[str]], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Mean of each run over the same drawn items; its own mean where it has none of them. Shape (resamples, runs)."""
    positions = shared_positions(items)
    size = positions.shape[1]
    means = np.empty((resamples, len(data)))
    at_once = max(1, _DRAWN_AT_ONCE // size)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        times = rng.multinomial(size, np.full(size, 1 / size), count)
        for run, values in enumerate(data):
            there = positions[run] >= 0
            weights, of_run = times[:, there], values[positions[run, there]]
            total = weights.sum(1)
            mean = weights @ of_run / np.maximum(total, 1)
            means[start : start + count, run] = np.where(total > 0, mean, values.mean())
    return means


def selection_entropy(models: Sequence[str]) -> float:
    """Entropy of the distribution of chosen models, in nats; its exponential is the effective number of models.

    0 if one model is always chosen (or none): what reinforcement from rewards can collapse to.
    """
    shares = np.array(list(Counter(models).values()), dtype=np.float64) / max(1, len(models))
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0


def hallucination(judged: Sequence[Judged]) -> tuple[Estimate, dict[str, int]]:
    """Share of responses that can't be called (DiffAgent Table 1, as a fraction), and how many for each reason."""
    counts = Counter(j.reason for j in judged if j.reason is not None)
    return bootstrap([float(j.reason is not None) for j in judged]), dict(counts.most_common())


def selection_accuracy(
    judged: Sequence[Judged], references: Sequence[dict[str, Any]], catalog: Catalog
) -> dict[str, Estimate]:
    """How often the right model was chosen: the very version, or any version of its model. Hallucinations miss."""

    def chosen(j: Judged) -> str | None:
        return j.call.model if j.call is not None and j.reason is None else None

    def model_id(name: str | None) -> int | None:
        return catalog[name].model_id if name is not None and name in catalog else None

    versions = [float(chosen(j) == r["model"]) for j, r in zip(judged, references, strict=True)]
    models = [
        float(chosen(j) is not None and model_id(chosen(j)) == model_id(r["model"]))
        for j, r in zip(judged, references, strict=True)
    ]
    return {"version": bootstrap(versions), "model": bootstrap(models)}


def argument_accuracy(judged: Sequence[Judged], references: Sequence[dict[str, Any]]) -> Estimate:
    """Mean over the five arguments of exact match (ChatGen Sec. 4.1); a response that is no call matches none."""
    shares = []
    for j, reference in zip(judged, references, strict=True):
        given = j.call.to_dict() if j.call is not None else {}
        shares.append(float(np.mean([given.get(key) == reference[key] for key in PARAMETER_INFORMATION])))
    return bootstrap(shares)
