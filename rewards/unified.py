"""The unified human-preference metric: scores of several scorers, min-max normalised and averaged.

DiffAgent Eq. 5-6 and ChatGen Eq. 6. The papers don't say over which values minimum and maximum are taken, and no two
tables can be compared without knowing. Here they belong to a named population (all candidates of a rollout, or all
compared methods of an evaluation jointly), are saved with it, and are reused for every value that is compared later.
"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rewards.files import write_atomically

FORMAT = "t2i-align unified metric"
VERSION = 1

Values: TypeAlias = "Tensor | np.ndarray | Sequence[float | None]"
"""Scores of one scorer, one-dimensional; NaN (or None in a list) where scoring failed."""


class UnifiedMetricError(ValueError):
    """Scores, or a saved metric, that can't be used; the message names the scorer or the file."""


@dataclass(frozen=True)
class Scale:
    """What one scorer's values are measured by.

    Attributes:
        low, high: Values that become 0 and 1 before a lower-is-better score is turned over.
        min, max: Extremes of the population; other than `low` and `high` if the metric was fitted on quantiles.
        n: Finite values in the population.
        missing: NaN values in the population, which were left out.
        weight: Share in the unified value; the shares of all scorers add up to 1.
        lower_is_better: Whether `1 - norm` counts, as for FID.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    low: float
    high: float
    min: float
    max: float
    n: int
    missing: int
    weight: float
    lower_is_better: bool


class Clipped(NamedTuple):
    """How many values lay outside a scale and were moved to its end."""

    below: int
    above: int


class UnifiedScores(NamedTuple):
    """Unified values of n images (or of n methods)."""

    values: Tensor
    """float32, shape (n,), in [0, 1]; higher is better; NaN where any scorer failed."""
    parts: dict[str, Tensor]
    """Normalised scores by scorer, each as `values`; `values` is their weighted mean."""
    clipped: dict[str, Clipped]
    """Values outside the population's range, by scorer."""
    failed: int
    """Number of NaN in `values`."""


class CallScore(NamedTuple):
    """Unified value of one API call, DiffAgent Eq. 5."""

    mean: float
    """Over the images that could be scored; NaN if there are none."""
    standard_error: float
    """Sample deviation / sqrt(n); NaN if n < 2."""
    n: int
    """Images that count."""
    failed: int
    """Images that don't, because a score is NaN."""


@dataclass(frozen=True)
class UnifiedMetric:
    """Maps the scores of several scorers to one number in [0, 1], by the range of a population.

    Fit one with `UnifiedMetric.fit`, or read a saved one with `UnifiedMetric.load`.

    Attributes:
        population: What the ranges were taken from.
        scales: By scorer name.
        quantiles: Which quantiles of the population `low` and `high` are; None: minimum and maximum, as in the papers.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    population: str
    scales: dict[str, Scale]
    quantiles: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.population.strip():
            raise UnifiedMetricError("`population` must say which values the ranges come from, but is empty.")
        if not self.scales:
            raise UnifiedMetricError("A unified metric needs at least one scorer.")
        for name, scale in self.scales.items():
            _check_scale(name, scale)
        if not math.isclose(total := sum(scale.weight for scale in self.scales.values()), 1, rel_tol=1e-9):
            raise UnifiedMetricError(f"The weights must add up to 1, but add up to {total:g}.")

    @classmethod
    def fit(
        cls, scores: Mapping[str, Values], *, population: str, quantiles: tuple[float, float] | None = None,
        weights: Mapping[str, float] | None = None, lower_is_better: Sequence[str] = (),
    ) -> "UnifiedMetric":  # fmt: skip
        """Take the range of every scorer from a population.

        Args:
            scores: By scorer name; scorers may have different numbers of values. NaN are left out and counted.
            population: What these values are, for whoever reads the file later.
            quantiles: Such as (0.01, 0.99), so that a few outliers don't squeeze everything else together; the
                extremes by default, as in the papers.
            weights: Positive, one per scorer, scaled to add up to 1; equal by default, as in the papers.
            lower_is_better: Names of scorers that count as `1 - norm` (FID in ChatGen Eq. 6).

        Raises:
            UnifiedMetricError: Infinite values, fewer than two values, no spread, or a name that has no scores.
        """
        if isinstance(lower_is_better, str):
            raise UnifiedMetricError(
                f"`lower_is_better` must be a sequence of names; put {lower_is_better!r} in a list."
            )
        if quantiles is not None and not 0 <= quantiles[0] < quantiles[1] <= 1:
            raise UnifiedMetricError(f"`quantiles` must be two increasing numbers in [0, 1], but are {quantiles}.")
        if unknown := sorted(set(lower_is_better) - set(scores)):
            raise UnifiedMetricError(f"`lower_is_better` names {', '.join(unknown)}, which has no scores.")
        shares = _shares(scores, weights)
        scales = {}
        for name, values in scores.items():
            array = _as_array(name, values)
            finite = array[~np.isnan(array)]
            if finite.size < 2:
                raise UnifiedMetricError(
                    f"{name}: the population {population!r} has {finite.size} usable values ({array.size} in all); a "
                    "range takes at least 2."
                )
            low, high = np.quantile(finite, quantiles or (0, 1)).tolist()
            scales[name] = Scale(
                low=low, high=high, min=float(finite.min()), max=float(finite.max()), n=finite.size,
                missing=array.size - finite.size, weight=shares[name], lower_is_better=name in lower_is_better,
            )  # fmt: skip
        return cls(population, scales, tuple(quantiles) if quantiles else None)

    def __call__(self, scores: Mapping[str, Values]) -> UnifiedScores:
        """Unified value of each image, DiffAgent Eq. 6: the weighted mean of its normalised scores.

        Args:
            scores: Of every scorer of this metric and no other, equally many; row i of each belongs to image i.

        Raises:
            UnifiedMetricError: A scorer that is missing or unknown, numbers that differ, infinite values.
        """
        if missing := [name for name in self.scales if name not in scores]:
            raise UnifiedMetricError(f"There are no scores of {', '.join(missing)}, which this metric needs.")
        if unknown := [name for name in scores if name not in self.scales]:
            raise UnifiedMetricError(
                f"The metric was not fitted on {', '.join(unknown)}; it knows {', '.join(self.scales)}."
            )
        arrays = {name: _as_array(name, scores[name]) for name in self.scales}
        if len({array.size for array in arrays.values()}) > 1:
            sizes = ", ".join(f"{name}: {array.size}" for name, array in arrays.items())
            raise UnifiedMetricError(f"All scorers need equally many scores, but got {sizes}.")
        parts, clipped = {}, {}
        for name, array in arrays.items():
            scale = self.scales[name]
            parts[name] = _normalize(array, scale)
            clipped[name] = Clipped(int((array < scale.low).sum()), int((array > scale.high).sum()))
        mean = sum(part * self.scales[name].weight for name, part in parts.items())
        values = _as_tensor(np.clip(mean, 0, 1))  # weights add up to 1 only up to rounding
        failed = int(values.isnan().sum())
        return UnifiedScores(values, {name: _as_tensor(part) for name, part in parts.items()}, clipped, failed)

    def normalize(self, name: str, values: Values) -> Tensor:
        """Scores of one scorer in [0, 1], where 1 is best: float32, shape (n,); NaN stays NaN, the rest is clipped.

        Raises:
            UnifiedMetricError: Unknown scorer, infinite values.
        """
        if name not in self.scales:
            raise UnifiedMetricError(f"The metric was not fitted on {name}; it knows {', '.join(self.scales)}.")
        return _as_tensor(_normalize(_as_array(name, values), self.scales[name]))

    def save(self, path: str | Path) -> None:
        """Write the metric as JSON, atomically."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "UnifiedMetric":
        """Read what `save` wrote; the numbers are the same to the last bit.

        Raises:
            UnifiedMetricError: Missing, no such file, another version, or a field that is absent, unknown or wrong.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UnifiedMetricError(f"Can't read {path}: {error.strerror}.") from error
        except ValueError as error:
            raise UnifiedMetricError(f"{path} is not JSON: {error}.") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UnifiedMetricError(f"{path} is no saved unified metric (it lacks `format: {FORMAT}`).")
        if (version := content.pop("version", None)) != VERSION:
            raise UnifiedMetricError(f"{path} has version {version!r}, but this program reads {VERSION}; fit it again.")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "content"
            raise UnifiedMetricError(f"{path}: `{field}`: {first['msg']}.") from error


def per_call(values: Values, calls: Sequence[Hashable]) -> dict[Hashable, CallScore]:
    """Mean of the images of each call, DiffAgent Eq. 5, with its standard error.

    Args:
        values: One per image, as `UnifiedScores.values`; NaN are left out and counted.
        calls: Which call each image belongs to: an id of any hashable kind, such as (prompt, candidate).

    Returns:
        By call, in order of first appearance.

    Raises:
        UnifiedMetricError: Numbers that differ, infinite values.
    """
    array = _as_array("values", values)
    if len(calls) != array.size:
        raise UnifiedMetricError(f"Need one call per value, but got {len(calls)} calls and {array.size} values.")
    images: dict[Hashable, list[float]] = {}
    for call, value in zip(calls, array.tolist(), strict=True):
        images.setdefault(call, []).append(value)
    return {call: _mean(of_call) for call, of_call in images.items()}


def _mean(values: list[float]) -> CallScore:
    used = np.array([value for value in values if not math.isnan(value)])
    n = used.size
    mean = float(used.mean()) if n else math.nan
    error = float(used.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return CallScore(mean, error, n, len(values) - n)


def _normalize(array: np.ndarray, scale: Scale) -> np.ndarray:
    norm = (np.clip(array, scale.low, scale.high) - scale.low) / (scale.high - scale.low)
    return 1 - norm if scale.lower_is_better else norm


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(torch.float32)


def _as_array(name: str, values: Values) -> np.ndarray:
    """float64, one-dimensional, without infinite values."""
    try:
        if isinstance(values, Tensor):
            array = values.detach().cpu().to(torch.float64).numpy()  # numpy knows no bfloat16
        elif isinstance(values, np.ndarray):
            array = values.astype(np.float64)
        else:
            array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UnifiedMetricError(f"{name}: scores must be a sequence of numbers: {error}.") from error
    if array.ndim != 1:
        raise UnifiedMetricError(f"{name}: scores must have one dimension, but have shape {array.shape}.")
    if np.isinf(array).any():
        row = int(np.isinf(array).argmax())
        raise UnifiedMetricError(f"{name}: the score of row {row} is {array[row]}; a failed score is NaN.")
    return array


def _check_scale(name: str, scale: Scale) -> None:
    if not 0 < scale.high - scale.low < math.inf:  # false for NaN, too
        raise UnifiedMetricError(
            f"{name}: the population's range from {scale.low:g} to {scale.high:g} (extremes {scale.min:g} and "
            f"{scale.max:g}) can't be scaled to [0, 1]. Fit on values that differ, or on wider quantiles."
        )
    if not 0 < scale.weight < math.inf:
        raise UnifiedMetricError(f"{name}: the weight must be positive, but is {scale.weight}.")


def _shares(scores: Mapping[str, Values], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights that add up to 1."""
    if weights is None:
        return {name: 1 / len(scores) for name in scores}
    if set(weights) != set(scores):
        names = ", ".join(sorted(set(weights) ^ set(scores)))
        raise UnifiedMetricError(f"`weights` must have one weight per scorer; {names} has only one of the two.")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UnifiedMetricError(f"{name}: the weight must be positive, but is {weight}.")
    total = math.fsum(weights.values())
    return {name: weights[name] / total for name in scores}
