"""What runs in Ray's worker processes; plain classes, which `rollouts.ray_pool` makes into actors."""

import os
import time
from collections.abc import Sequence
from typing import Any

from rollouts.requests import RenderJob, RenderRequest
from rollouts.workers import Worker, WorkerSpec, WorkReport, load_scorers, score_pictures, score_results, store_results


class Drawing:
    """A worker as an actor. It is set up by a call, whose errors Ray hands on; those of a constructor it does not."""

    def ready(self, spec: WorkerSpec) -> int:
        """Set up; the process id."""
        self.worker = Worker(spec)
        return os.getpid()

    def run(
        self, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest], prefetch: str | None
    ) -> tuple[None, WorkReport]:
        """See `Worker.run`."""
        # The first value says that the second is there, without moving it.
        return None, self.worker.run(jobs, requests, prefetch)

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float]]:
        """See `Pool.score`."""
        return score_pictures(self.worker.scorers, images, texts)

    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """See `Worker.describe_scorers`."""
        return self.worker.describe_scorers()


class Scoring:
    """Scores what others drew."""

    def ready(self, spec: WorkerSpec) -> int:
        """Load the scorers; the process id."""
        import torch

        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self.spec, self.scorers = spec, load_scorers(spec.scorers)
        return os.getpid()

    def run(
        self, report: WorkReport, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest]
    ) -> tuple[None, WorkReport]:
        """Score and store what a drawing worker has reported."""
        started = time.perf_counter()
        results = score_results(self.scorers, report.results, requests)
        score_seconds = time.perf_counter() - started
        results = store_results(self.spec, jobs, requests, results)
        return None, report._replace(results=results, score_seconds=score_seconds)

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float]]:
        """See `Pool.score`."""
        return score_pictures(self.scorers, images, texts)

    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """See `Worker.describe_scorers`."""
        from rewards.score import describe

        return {name: describe(scorer) for name, scorer in self.scorers.items()}
