"""Workers draw and score batches; a pool runs one or many of them and hands back what they finish.

`InProcessPool` is one worker in this process, for one GPU or a CPU. `rollouts.ray_pool.RayPool` runs one per GPU on any
number of machines. Both take their work from the same planner, a batch at a time.
"""

import gc
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from rollouts.catalog import Catalog
from rollouts.requests import (
    Batch,
    RenderFailure,
    RenderJob,
    RenderRequest,
    RenderResult,
    RenderSettings,
    Spent,
)

logger = logging.getLogger(__name__)

Pictures = tuple[Sequence[Any], Sequence[str]]
"""Some pictures, and what each is scored for."""


class PoolError(RuntimeError):
    """A pool that can't go on; what is finished is finished. The message says what is missing."""


@dataclass(frozen=True)
class WorkerSpec:
    """All a worker needs to set itself up, wherever it runs; paths must exist there.

    Attributes:
        catalog: Catalogue file.
        weights: Folder of weights (see `rollouts.weights.WeightFolder`).
        settings: How to draw.
        configs: Base model -> folder with the configuration of its single-file checkpoints.
        verify: Compare weights with the catalogue's SHA-256.
        device: None: the GPU if there is one.
        device_gb, cpu_gb: Budgets of the caches of checkpoints, in 10^9 bytes; None: 70% of the device, and nothing
            kept beside it in CPU memory.
        scorers: Name of a column of scores -> arguments of `rewards.load_scorer`.
        store: Folder or URL of a store (`rollouts.store`), which every worker must reach: pictures are written there
            where they are drawn, and results come without them. None: results come with their pictures.
        keep_images: False: pictures are thrown away once they are scored.
        num_threads: Of torch; None: as torch does.
    """

    catalog: str
    weights: str
    settings: RenderSettings = field(default_factory=RenderSettings)
    configs: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True
    device: str | None = None
    device_gb: float | None = None
    cpu_gb: float | None = None
    scorers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    store: str | None = None
    keep_images: bool = True
    num_threads: int | None = None


class WorkReport(NamedTuple):
    """What a worker says when a batch is finished."""

    results: list[RenderResult]
    """In the order of the jobs."""
    spent: Spent
    """On this batch."""
    cached: frozenset[str]
    """Checkpoints in the worker's memory."""
    memory_bytes: int
    """Resident memory of the process, or of the GPU, whichever is the scarcer; see `memory_in_use`."""
    score_seconds: float = 0.0


class Finished(NamedTuple):
    """A batch that came back from a pool."""

    worker: str
    batch: Batch
    report: WorkReport


class Planner(Protocol):
    """What a pool needs of `rollouts.planning.Planner` and its naive peers."""

    def next(self, worker: str, cached: "frozenset[str] | set[str]" = ...) -> Batch | None:
        """The next batch for a worker, or None if there is nothing for it now."""
        ...

    def upcoming(self, worker: str) -> str | None:
        """The checkpoint it will probably need next."""
        ...

    def put_back(self, batch: Batch) -> None:
        """A batch whose worker was lost."""
        ...

    def forget(self, worker: str) -> None:
        """A worker is gone."""
        ...

    @property
    def remaining(self) -> int:
        """Batches not handed out."""
        ...


class Worker:
    """Draws and scores; lives in one process and never raises for the fault of a job."""

    def __init__(self, spec: WorkerSpec):
        """Load the scorers; checkpoints are loaded when they are needed.

        Raises:
            CatalogError, UnknownScorerError, CheckpointError: What the spec names can't be used.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        try:
            from rollouts.rendering import DiffusersRenderer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('Drawing needs diffusers: pip install "t2i-align[render]".') from error
        from rollouts.weights import WeightFolder

        disable_progress_bar()  # one per file it loads
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self.spec = spec
        self.renderer = DiffusersRenderer(
            Catalog.load(spec.catalog),
            WeightFolder(spec.weights, verify=spec.verify),
            spec.settings,
            configs={name: Path(folder) for name, folder in spec.configs.items()},
            device=spec.device,
            device_bytes=None if spec.device_gb is None else round(spec.device_gb * 1e9),
            cpu_bytes=None if spec.cpu_gb is None else round(spec.cpu_gb * 1e9),
        )
        self.scorers = load_scorers(spec.scorers)

    def run(
        self, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest], prefetch: str | None = None
    ) -> WorkReport:
        """Draw a batch, score it and store its pictures.

        Args:
            jobs: What to draw.
            requests: What was asked for; pictures are scored for the prompt as people wrote it.
            prefetch: Checkpoint to begin reading meanwhile.

        Raises:
            StoreError: Pictures can't be written, for another reason than a full disk.
        """
        before = self.renderer.spent
        results = self.renderer.render(jobs, prefetch=prefetch)
        started = time.perf_counter()
        results = score_results(self.scorers, results, requests)
        score_seconds = time.perf_counter() - started
        results = store_results(self.spec, jobs, requests, results)
        after = Spent(after_seconds=time.perf_counter() - started)
        return WorkReport(
            results,
            self.renderer.spent.minus(before).plus(after),
            frozenset(self.renderer.cached()),
            memory_in_use(),
            score_seconds,
        )

    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """What each scorer says of itself: weights, precision, …"""
        from rewards.score import describe

        return {name: describe(scorer) for name, scorer in self.scorers.items()}

    def close(self) -> None:
        """Free the models."""
        self.renderer.close()
        self.scorers = {}
        gc.collect()


class Pool(ABC):
    """Runs a plan. Use it in a `with` statement.

    Attributes:
        num_workers: Workers that draw.
        events: How often workers were `lost` or `recycled`, and batches `retried`.
    """

    num_workers = 1

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()

    @abstractmethod
    def run(self, planner: Planner, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest]) -> Iterator[Finished]:
        """Draw everything the planner has.

        Args:
            planner: Hands out batches of indices into `jobs`.
            jobs: What to draw.
            requests: What was asked for, one per job.

        Yields:
            Batches as they are finished, in any order; every job arrives exactly once.
        """

    @abstractmethod
    def score(self, pictures: Iterable[Pictures]) -> Iterator[list[dict[str, float]]]:
        """Score pictures that are there already.

        Args:
            pictures: Pictures and what each is scored for, some at a time.

        Yields:
            Scores by scorer of each picture, in order.
        """

    @abstractmethod
    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """See `Worker.describe_scorers`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class InProcessPool(Pool):
    """One worker, in this process."""

    def __init__(self, spec: WorkerSpec, *, max_memory_gb: float | None = None):
        """Set the worker up.

        Args:
            spec: Of the worker.
            max_memory_gb: When it uses more than this (10^9 bytes), its models are dropped and loaded anew. A leak in
                the process itself can't be mended like that; `RayPool` starts a new process.
        """
        super().__init__()
        self.spec, self.max_memory_gb = spec, max_memory_gb
        self.worker = Worker(spec)

    def run(self, planner: Planner, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest]) -> Iterator[Finished]:
        """See `Pool.run`."""
        name = "worker-0"
        cached: frozenset[str] = frozenset(self.worker.renderer.cached())
        while (batch := planner.next(name, cached)) is not None:
            report = self.worker.run(
                [jobs[i] for i in batch.jobs], [requests[i] for i in batch.jobs], planner.upcoming(name)
            )
            cached = report.cached
            yield Finished(name, batch, report)
            if self.max_memory_gb is not None and report.memory_bytes > self.max_memory_gb * 1e9:
                logger.warning("%.1f GB in use: dropping the models in memory", report.memory_bytes / 1e9)
                self.events["recycled"] += 1
                self.worker.close()
                self.worker = Worker(self.spec)
                cached = frozenset()

    def score(self, pictures: Iterable[Pictures]) -> Iterator[list[dict[str, float]]]:
        """See `Pool.score`."""
        for images, texts in pictures:
            yield score_pictures(self.worker.scorers, images, texts)

    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """See `Worker.describe_scorers`."""
        return self.worker.describe_scorers()

    def close(self) -> None:
        """Free the models."""
        self.worker.close()


def load_scorers(scorers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scorers by the name of their column."""
    from rewards import load_scorer

    return {name: load_scorer(**{"name": name, **options}) for name, options in scorers.items()}


def score_results(
    scorers: Mapping[str, Any], results: Sequence[RenderResult], requests: Sequence[RenderRequest]
) -> list[RenderResult]:
    """Results with the scores of those that have a picture; a score that could not be computed is left out."""
    rows = [row for row, result in enumerate(results) if result.image is not None]
    scored = list(results)
    found = score_pictures(scorers, [results[row].image for row in rows], [requests[row].prompt for row in rows])
    for row, scores in zip(rows, found, strict=True):
        scored[row] = replace(results[row], scores=scores)
    return scored


def store_results(
    spec: WorkerSpec, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest], results: Sequence[RenderResult]
) -> list[RenderResult]:
    """Results without pictures, which are written to the spec's store; unchanged if it names none.

    A full disk is no reason to stop: scores are still wanted. Such pictures have no `file_bytes`.

    Raises:
        StoreError: Anything else.
    """
    from rollouts.picture_writer import request_to_dict, write_pictures
    from rollouts.store_errors import StoreError
    from rollouts.store_files import open_files

    if spec.store is None:
        return list(results)
    files = open_files(spec.store)
    rows = [
        (job, request_to_dict(request), result) for job, request, result in zip(jobs, requests, results, strict=True)
    ]
    try:
        written = write_pictures(files, rows, keep_images=spec.keep_images)
    except StoreError as error:
        if error.reason != "disk_full":
            raise
        logger.error("%s", error)
        written = write_pictures(files, rows, keep_images=False)
    return [
        replace(result, image=None, file_bytes=written[result.key].size, pixels=written[result.key].pixels)
        if result.key in written
        else result
        for result in results
    ]


def score_pictures(scorers: Mapping[str, Any], images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float]]:
    """Scores by scorer of each picture; one that could not be computed is left out."""
    found: list[dict[str, float]] = [{} for _ in images]
    if not scorers or not images:
        return found
    from rewards.scorer import score_rows

    for name, scorer in scorers.items():
        scores, errors = score_rows(scorer, texts, images)
        for row, reason in errors.items():
            logger.warning("%s gives no score for a picture of %.80r: %s", name, texts[row], reason)
        for row, score in enumerate(scores.tolist()):
            if row not in errors:
                found[row][name] = score
    return found


def lost(job: RenderJob, attempts: int) -> RenderResult:
    """The result of a job whose workers died."""
    message = f"{attempts} workers died while they drew this picture, the last time it alone."
    return RenderResult(job.key, failure=RenderFailure("worker_lost", message))


def memory_in_use() -> int:
    """Bytes: what this process has reserved on its GPU if it uses one, otherwise its resident memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
