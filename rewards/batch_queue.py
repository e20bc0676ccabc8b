"""One worker, many callers: requests wait in a queue, and those that meet there are answered in one batch."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class QueueClosedError(RuntimeError):
    """The queue takes nothing more; it is finishing what it has."""


@dataclass(eq=False)
class Job(Generic[Request, Result]):
    """A request that waits or is being answered."""

    request: Request
    future: "Future[Result]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class BatchQueue(ABC, Generic[Request, Result]):
    """Merges waiting requests into batches, on a thread of its own.

    A batch is closed when requests of `max_batch` together wait, or its first one has waited `max_wait` seconds.
    """

    def __init__(self, name: str, *, max_batch: int, max_wait: float):
        """Start the thread.

        Args:
            name: For messages.
            max_batch: Most that requests of a batch count together; one that counts more is answered alone.
            max_wait: Seconds that a request waits for company while the worker is idle.
        """
        self.name, self.max_batch, self.max_wait = name, max_batch, max_wait
        self._jobs: deque[Job[Request, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a worker that never returns can't keep a process alive that was told twice to stop.
        self._thread = threading.Thread(target=self._run, name=f"queue of {name}", daemon=True)
        self._thread.start()

    @abstractmethod
    def size(self, request: Request) -> int:
        """How much a request counts."""

    @abstractmethod
    def answer(self, jobs: list[Job[Request, Result]]) -> None:
        """Give every job's future a result or an exception; must not raise."""

    def __len__(self) -> int:
        """Requests that wait, without those being answered."""
        return len(self._jobs)

    def submit(self, request: Request) -> Job[Request, Result]:
        """Put a request into the queue; its `future` gets the result.

        Raises:
            QueueClosedError: After `close`.
        """
        job: Job[Request, Result] = Job(request)
        with self._changed:
            if self._closed:
                raise QueueClosedError(f"The queue of {self.name} is closed.")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job[Request, Result]) -> None:
        """Forget a request nobody waits for, unless it is being answered already."""
        with self._changed:
            if job.future.cancel() and job in self._jobs:
                self._jobs.remove(job)  # what it holds would stay in memory until its turn came

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
                self.answer(jobs)

    def _next_batch(self) -> list[Job[Request, Result]]:
        """Requests to answer together; none when the queue is closed and empty."""
        with self._changed:
            while (patience := self._patience()) > 0:
                self._changed.wait(patience)
            batch: list[Job[Request, Result]] = []
            room = self.max_batch
            while self._jobs and (not batch or self.size(self._jobs[0].request) <= room):
                batch.append(self._jobs.popleft())
                room -= self.size(batch[-1].request)
            return batch

    def _patience(self) -> float:
        """Seconds until the next batch starts, if nothing changes."""
        if self._closed:
            return 0.0
        if not self._jobs:
            return threading.TIMEOUT_MAX
        if sum(self.size(job.request) for job in self._jobs) >= self.max_batch:
            return 0.0
        return self._jobs[0].arrived + self.max_wait - time.monotonic()
