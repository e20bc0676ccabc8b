"""One scorer, many callers: requests wait in a queue and those that meet there are scored in one batch."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rewards.images import ImageError, load_image
from rewards.scorer import Scored, Scorer
from rewards.wire import Picture, ScoreRequest

logger = logging.getLogger(__name__)


class QueueClosedError(RuntimeError):
    """The queue takes nothing more; it is finishing what it has."""


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


@dataclass(eq=False)
class Job:
    """A request that waits or is being scored."""

    request: ScoreRequest
    future: "Future[Scored]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class ScoreQueue:
    """Gives a scorer to one thread, which merges waiting requests into batches.

    A batch is closed when `max_batch` pairs wait or its first request has waited `max_wait` seconds. If scoring it
    fails, its requests are scored one by one, so that only those at fault fail.
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
        self.name, self.scorer = name, scorer
        self.max_batch, self.max_wait = max_batch, max_wait
        self._on_batch = on_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a scorer that never returns can't keep a process alive that was told twice to stop.
        self._thread = threading.Thread(target=self._run, name=f"scorer {name}", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Requests that wait, without those being scored."""
        return len(self._jobs)

    def submit(self, request: ScoreRequest) -> Job:
        """Put a request into the queue; its `future` gets the scores, or a ScorerFailedError.

        Raises:
            QueueClosedError: After `close`.
        """
        job = Job(request)
        with self._changed:
            if self._closed:
                raise QueueClosedError(f"The queue of {self.name} is closed.")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a request nobody waits for, unless it is being scored already."""
        with self._changed:
            if job.future.cancel() and job in self._jobs:
                self._jobs.remove(job)  # its pictures would stay in memory until its turn came

    def close(self) -> None:
        """Take nothing more, finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_batch():
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)

    def _next_batch(self) -> list[Job]:
        """Requests to score together; none when the queue is closed and empty."""
        with self._changed:
            while (patience := self._patience()) > 0:
                self._changed.wait(patience)
            batch, room = [], self.max_batch
            while self._jobs and (not batch or len(self._jobs[0].request.prompts) <= room):
                batch.append(self._jobs.popleft())
                room -= len(batch[-1].request.prompts)
            return batch

    def _patience(self) -> float:
        """Seconds until the next batch starts, if nothing changes."""
        if self._closed:
            return 0.0
        if not self._jobs:
            return threading.TIMEOUT_MAX
        if sum(len(job.request.prompts) for job in self._jobs) >= self.max_batch:
            return 0.0
        return self._jobs[0].arrived + self.max_wait - time.monotonic()

    def _answer(self, jobs: list[Job]) -> None:
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

    def _fail(self, jobs: list[Job], error: BaseException) -> None:
        if len(jobs) == 1:
            logger.warning("%s failed on a request.", self.name, exc_info=error)
            jobs[0].future.set_exception(ScorerFailedError(f"{self.name} failed: {error!r:.500}"))
            return
        logger.warning("%s failed on a batch (%r); its %d requests go one by one.", self.name, error, len(jobs))
        for job in jobs:
            self._answer([job])


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
