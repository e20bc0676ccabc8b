"""Numbers of a set of pictures and their intervals: FID, mean scores, and the unified metric of both (ChatGen Eq. 6).

FID belongs to a set and not to a picture, so neither its place in Eq. 6 nor its interval follows from those of the
other scores. What is done here, and why:

- Eq. 6 is taken of sets: every S is a number of a method's pictures on some chats (its FID, its mean CLIP score, ...),
  and the norms are of those. This is what the paper must have done: all ten values of its Table 4 are
  S = mean(1 - FID / 100, CLIP, (HPS - 0.2) / 0.1, ImageReward + 0.5) to the last digit that it prints, which would not
  hold if single pictures had been cut to these ranges first. `PAPER` is that normaliser. One that is fitted on
  everything compared clips nothing, so that there it makes no difference.
- A fitted scale of FID goes from 0, which equal sets have, to the largest FID of the sets that are compared. From the
  smallest one, as for the other scores, the best method would get 1 and the worst 0 however near they are: those scores
  are spread over single pictures, of which a method is a mean, but here methods would be the population themselves.
- Intervals are of a bootstrap over chats (over runs and chats, if there are several runs; the same chats are drawn for
  all of them): a chat takes its pictures and its reference pictures along, so that what both owe to the choice of chats
  cancels, and all parts of Eq. 6 come from the same resample.
- FID is biased upwards by a term in 1/n, and a resample, with only 63% of its pictures distinct, has that bias twice:
  plain percentiles lie beside the value. So the resamples' FIDs are moved by their mean's distance to it. The interval
  says how FID *at this n* varies; compare it between sets of equal size only, as are all methods of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.evaluation.metrics import Estimate, bootstrap_runs, shared_positions
from rewards.fid import frechet_distance
from rewards.unified import Scale, UnifiedMetric

FID = "fid"
UNIFIED = "unified"

_RANGES = {  # name: low, high, extremes of Table 4, lower is better
    FID: (0.0, 100.0, 19.1, 54.4, True),
    "clip_score": (0.0, 1.0, 0.634, 0.729, False),
    "hps_v2": (0.2, 0.3, 0.200, 0.251, False),
    "image_reward": (-0.5, 0.5, -0.402, 0.089, False),
}
PAPER = UnifiedMetric(
    "ChatGen Table 4, by least squares on its ten rows",
    {
        name: Scale(low, high, least, most, n=10, missing=0, weight=0.25, lower_is_better=lower)
        for name, (low, high, least, most, lower) in _RANGES.items()
    },
)
"""The ranges of the paper's own Unified Metric, for CLIP Score (w = 2.5), HPS v2, ImageReward and Inception's FID."""


@dataclass(frozen=True)
class PictureSet:
    """A method's pictures on some chats of one run.

    Attributes:
        scores: Mean of each chat's pictures by each scorer. Shape (chats, scorers).
        chats: Name of each chat, by which runs share it.
        features: Of each chat's pictures. Shape (chats with a reference, k, d); None: no FID.
        references: Of each chat's reference pictures. Shape (chats with a reference, r, d).
        position: Row of each chat in the two, or -1 where it has no reference. Shape (chats,).
    """

    scores: np.ndarray
    chats: tuple[str, ...]
    features: np.ndarray | None = None
    references: np.ndarray | None = None
    position: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, chats: np.ndarray) -> "PictureSet":
        """Some of the chats, by number; they share the features."""
        position = None if self.position is None else self.position[chats]
        names = tuple(self.chats[chat] for chat in chats)
        return PictureSet(self.scores[chats], names, self.features, self.references, position)

    def fid(self, chats: np.ndarray | None = None) -> float:
        """FID of the pictures of some chats (by number; None: all) to their references; NaN if fewer than two have any.

        Raises:
            ValueError: There are no features.
        """
        if self.features is None or self.references is None or self.position is None:
            raise ValueError("These pictures have no features.")
        rows = self.position if chats is None else self.position[chats]
        rows = rows[rows >= 0]
        if len(rows) < 2:
            return float("nan")
        return frechet(*(part[rows].reshape(-1, part.shape[-1]) for part in (self.features, self.references)))

    @property
    def num_compared(self) -> int:
        """Chats that FID is of."""
        return 0 if self.position is None else int((self.position >= 0).sum())


def frechet(features: np.ndarray, references: np.ndarray) -> float:
    """FID of two sets of vectors.

    With A and B the deviations from the means, each divided by sqrt(n - 1), Tr (C_a C_b)^1/2 is the sum of the singular
    values of A Bᵀ: where there are fewer pictures than features (2,048 of Inception), no covariance has to be formed.

    Args:
        features, references: Shapes (n, d) and (m, d), both at least 2 rows.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = [torch.from_numpy(part).to(device, torch.float64) for part in (features, references)]
    means = [part.mean(0) for part in sets]
    a, b = ((part - mean) / (len(part) - 1) ** 0.5 for part, mean in zip(sets, means, strict=True))
    if min(map(len, sets)) > features.shape[1]:
        return frechet_distance(means[0], a.T @ a, means[1], b.T @ b)
    overlap = torch.linalg.svdvals(_small(a) @ _small(b).T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    return max(0.0, distance.item())


def _small(deviations: Tensor) -> Tensor:
    """A matrix of at most d rows with the same Gram matrix Aᵀ A."""
    n, d = deviations.shape
    return torch.linalg.qr(deviations, mode="r").R if n > d else deviations


def unify_sets(scores: Mapping[str, np.ndarray], metric: UnifiedMetric) -> np.ndarray:
    """Eq. 6 of sets: the weighted mean of the norms, FID's turned over.

    Args:
        scores: A number of each set for every scale of the metric. Shape (sets,).
        metric: The norms.
    """
    parts = [metric.normalize(name, scores[name]).double().numpy() * s.weight for name, s in metric.scales.items()]
    return np.sum(parts, axis=0)


def set_estimates(
    runs: Sequence[PictureSet], scorers: Sequence[str], metric: UnifiedMetric | None,
    *, seed: int = 0, resamples: int = 200,
) -> dict[str, Estimate]:  # fmt: skip
    """Mean scores, FID and the unified metric of a method's pictures, with 95% intervals.

    Args:
        runs: The pictures of each run (training seed); runs count alike.
        scorers: Names of the columns of scores.
        metric: Norms of the scorers and, if there is one, of FID; None: no unified metric.
        seed: Of the resamples.
        resamples: For FID and the unified metric; mean scores have `metrics.RESAMPLES`.

    Returns:
        By scorer, `fid` and `unified`. n: chats; of `fid`, those with reference pictures.
    """
    chats = [part.chats for part in runs]
    found = {
        name: bootstrap_runs([part.scores[:, i].tolist() for part in runs], items=chats, seed=seed)
        for i, name in enumerate(scorers)
    }
    has_fid = all(part.num_compared >= 2 for part in runs)
    if metric is None or (FID in metric.scales and not has_fid):
        metric = None
    if metric is None and not has_fid:
        return found
    values, drawn, fids, means = _resampled(runs, has_fid, np.random.default_rng(seed), resamples)
    if has_fid:
        compared = sum(part.num_compared for part in runs)
        found[FID] = _interval(values[:, 0].mean(), fids.mean(1), compared)
    if metric is not None:
        own = {name: values[:, 1 + i] for i, name in enumerate(scorers)} | {FID: values[:, 0]}
        again = {name: means[:, :, i].ravel() for i, name in enumerate(scorers)} | {FID: fids.ravel()}
        unified = unify_sets(again, metric).reshape(drawn.shape).mean(1)
        found[UNIFIED] = _interval(unify_sets(own, metric).mean(), unified, sum(map(len, runs)))
    return found


def run_values(run: PictureSet, scorers: Sequence[str], metric: UnifiedMetric | None) -> dict[str, float]:
    """The values of `set_estimates` for a single run, without intervals."""
    values = dict(zip(scorers, run.scores.mean(0).tolist(), strict=True))
    if run.num_compared >= 2:
        values[FID] = run.fid()
    if metric is not None and set(metric.scales) <= set(values):
        values[UNIFIED] = float(unify_sets({name: np.array([values[name]]) for name in values}, metric)[0])
    return values


def _resampled(
    runs: Sequence[PictureSet], has_fid: bool, rng: np.random.Generator, resamples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each run's (FID, mean scores); which run was drawn, its FID and its mean scores, of each resample and slot."""
    values = np.array([[part.fid() if has_fid else np.nan, *part.scores.mean(0)] for part in runs])
    drawn = rng.integers(0, len(runs), (resamples, len(runs)))
    fids = np.full(drawn.shape, np.nan)
    means = np.empty((*drawn.shape, runs[0].scores.shape[1]))
    positions = shared_positions([part.chats for part in runs])
    for resample, of_slots in enumerate(drawn):
        chosen = rng.integers(0, positions.shape[1], positions.shape[1])
        for run in np.unique(of_slots):
            chats = positions[run, chosen]
            chats = chats[chats >= 0] if (chats >= 0).any() else np.arange(len(runs[run]))
            means[resample, of_slots == run] = runs[run].scores[chats].mean(0)
            if has_fid:
                fids[resample, of_slots == run] = runs[run].fid(chats)
    for run in range(len(runs) if has_fid else 0):
        of_run = fids[drawn == run]
        known = np.isfinite(of_run)  # of few chats, a resample can have one with a reference, or none
        moved = of_run - (of_run[known].mean() if known.any() else np.nan) + values[run, 0]
        fids[drawn == run] = np.where(known, np.maximum(moved, 0), values[run, 0])
    return values, drawn, fids, means


def _interval(value: float, resampled: np.ndarray, n: int) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
