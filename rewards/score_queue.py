"""One scorer, many callers: requests wait in a queue and those that meet there are scored in one batch."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rewards.batch_queue import BatchQueue, Job
from rewards.images import ImageError, load_image
from rewards.scorer import Scored, Scorer
from rewards.wire import Picture, ScoreRequest

logger = logging.getLogger(__name__)


class ScorerFailedError(RuntimeError):
    """A scorer raised an exception on a request; the message names both."""


class BatchReport(NamedTuple):
    """What one call of a scorer was."""

    requests: int
    pairs: int
    images: int
    """Distinct ones."""
    row_errors: int
    seconds: float


class ScoreQueue(BatchQueue[ScoreRequest, Scored]):
    """Gives a scorer to one thread; a request counts as many as it has pairs.

    If scoring a batch fails, its requests are scored one by one, so that only those at fault fail.
    """

    def __init__(
        self, name: str, scorer: Any, *, max_batch: int, max_wait: float,
        on_batch: Callable[[BatchReport], None] | None = None,
    ):  # fmt: skip
        """Start the thread.

        Args:
            name: For messages.
            scorer: A `Scorer`, or anything with its call (and optionally its `score`).
            max_batch: Pairs; a request that is larger by itself is scored alone.
            max_wait: Seconds that a request waits for company while the scorer is idle.
            on_batch: Called after each batch, on the queue's thread.
        """
        self.scorer, self._on_batch = scorer, on_batch
        super().__init__(name, max_batch=max_batch, max_wait=max_wait)

    def size(self, request: ScoreRequest) -> int:
        """Pairs."""
        return len(request.prompts)

    def answer(self, jobs: list[Job[ScoreRequest, Scored]]) -> None:
        """Score a batch."""
        prompts = [prompt for job in jobs for prompt in job.request.prompts]
        pictures = [picture for job in jobs for picture in job.request.pictures]
        started, failure = time.perf_counter(), None
        try:
            scores, errors = score_pictures(self.scorer, prompts, pictures)
        except BaseException as error:  # whatever it is: were this thread to die, every later request would hang
            failure = error
        if failure is not None:
            self._fail(jobs, failure)
            return
        if self._on_batch is not None:
            images = len({picture.digest for picture in pictures})
            seconds = time.perf_counter() - started
            self._on_batch(BatchReport(len(jobs), len(prompts), images, len(errors), seconds))
        start = 0
        for job in jobs:
            end = start + len(job.request.prompts)
            own = {row - start: reason for row, reason in errors.items() if start <= row < end}
            job.future.set_result(Scored(scores[start:end], own))
            start = end

    def _fail(self, jobs: list[Job[ScoreRequest, Scored]], error: BaseException) -> None:
        if len(jobs) == 1:
            logger.warning("%s failed on a request.", self.name, exc_info=error)
            jobs[0].future.set_exception(ScorerFailedError(f"{self.name} failed: {error!r:.500}"))
            return
        logger.warning("%s failed on a batch (%r); its %d requests go one by one.", self.name, error, len(jobs))
        for job in jobs:
            self.answer([job])


def score_pictures(scorer: Any, prompts: Sequence[str], pictures: Sequence[Picture]) -> Scored:
    """Score pairs with any scorer; the same picture is the same object, so that it is encoded once.

    Args:
        scorer: A `Scorer`, or anything with its call (and optionally its `score`).
        prompts: One per picture.
        pictures: Those of equal digest are taken to be the same.

    Raises:
        ValueError: The scorer's answer has another length than the question.
        Exception: Whatever the scorer raises.
    """
    if isinstance(scorer, Scorer):
        # Encoded, since it decodes on threads just before it needs the pixels and drops them afterwards.
        contents = {picture.digest: picture.data for picture in pictures}
        return _checked(scorer.score(prompts, [contents[picture.digest] for picture in pictures]), len(prompts))
    images, errors = _decode(pictures)
    rows = [row for row in range(len(prompts)) if row not in errors]
    scores = torch.full((len(prompts),), torch.nan)
    if rows:
        score = getattr(scorer, "score", None) or (lambda *pairs: Scored(scorer(*pairs), {}))
        found = score([prompts[row] for row in rows], [images[pictures[row].digest] for row in rows])
        found = _checked(found, len(rows))
        scores[rows] = found.scores
        errors |= {rows[row]: reason for row, reason in found.errors.items()}
    return Scored(scores, errors)


def _decode(pictures: Sequence[Picture]) -> tuple[dict[bytes, Any], dict[int, str]]:
    """Images by digest, and the rows whose picture can't be decoded."""
    images: dict[bytes, Any] = {}
    for digest, data in {picture.digest: picture.data for picture in pictures}.items():
        try:
            images[digest] = load_image(data)
        except ImageError as error:
            images[digest] = error
    failed = {row: images[picture.digest] for row, picture in enumerate(pictures)}
    return images, {row: str(error) for row, error in failed.items() if isinstance(error, ImageError)}


def _checked(scored: Any, pairs: int) -> Scored:
    """A scorer's answer as float32 of the right length, with a reason for every score that is no number."""
    scores, errors = scored
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    if scores.shape != (pairs,):
        raise ValueError(f"The scorer gave scores of shape {tuple(scores.shape)} for {pairs} pairs.")
    reasons = {
        row: errors.get(row, "the score is not finite.") for row in (~scores.isfinite()).nonzero()[:, 0].tolist()
    }
    return Scored(scores, errors | reasons)
