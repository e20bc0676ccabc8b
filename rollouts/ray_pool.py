"""Workers on many GPUs and machines, as Ray actors (https://docs.ray.io), one per GPU.

Ray moves the data and notices what died; what to do about it is decided here, batch by batch: work that was lost goes
back to the planner, a new worker takes the place of a dead one as soon as the cluster has room for it, and a batch that
kills its workers again and again is taken apart until the picture at fault stands alone and is recorded as a failure.
"""

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rollouts.ray_actors import Drawing, Scoring
from rollouts.requests import Batch, RenderJob, RenderRequest, Spent
from rollouts.workers import (
    Finished,
    Pictures,
    Planner,
    Pool,
    PoolError,
    WorkerSpec,
    WorkReport,
    lost,
)

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('Many workers need Ray: pip install "t2i-align[ray]".') from error

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Batches a worker has at a time: one it draws, one that waits, so that it never idles and memory stays bounded."""
MAX_ATTEMPTS = 4
"""Workers a job may cost before it is recorded as a failure."""


@dataclass(frozen=True)
class RayOptions:
    """How a pool uses a cluster.

    Attributes:
        num_workers: Actors.
        num_gpus, num_cpus: Of each.
        address: Of a running cluster, `auto` for the one of this machine; None: start one here, with as many CPUs as
            the workers need.
        start_timeout: Seconds to wait while there is no worker at all.
        max_memory_gb: A worker that uses more than this (10^9 bytes) is replaced by a new process.
        num_scoring_workers: Actors that only score, with `scoring_gpus` each, so that drawing goes on meanwhile;
            0: workers score what they draw.
        scoring_gpus: See there.
    """

    num_workers: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    address: str | None = None
    start_timeout: float = 300.0
    max_memory_gb: float | None = None
    num_scoring_workers: int = 0
    scoring_gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.num_scoring_workers < 0:
            raise ValueError(
                f"`num_workers` must be at least 1 and `num_scoring_workers` at least 0, but are {self.num_workers} "
                f"and {self.num_scoring_workers}."
            )


class _Pending(NamedTuple):
    """What a reference stands for."""

    kind: str  # ready, draw or score
    actor: str
    batch: Batch | None = None
    report: Any = None  # reference to the WorkReport of a batch
    drawer: str = ""  # worker that drew what is scored


class RayPool(Pool):
    """One worker per GPU.

    Attributes:
        pids: Process id of each worker that is ready, on its machine.
    """

    def __init__(self, spec: WorkerSpec, options: RayOptions | None = None):
        """Connect, and start the actors.

        Raises:
            PoolError: The cluster can't be reached.
        """
        super().__init__()
        self.spec, self.options = spec, options or RayOptions()
        self.num_workers = self.options.num_workers
        self._started_ray = _connect(self.options)
        alone = self.options.num_scoring_workers == 0
        drawing = spec if alone else replace(spec, scorers={}, store=None)
        drawing_actor = ray.remote(Drawing).options(**_resources(self.options.num_gpus, self.options.num_cpus))
        scoring_actor = ray.remote(Scoring).options(**_resources(self.options.scoring_gpus, 1.0))
        self._recipes = {"draw": (drawing_actor, drawing), "score": (scoring_actor, spec)}
        self._actors: dict[str, Any] = {}
        self.pids: dict[str, int] = {}
        self._retiring: set[str] = set()
        self._pending: dict[Any, _Pending] = {}
        self._attempts: Counter[int] = Counter()
        self._alone: deque[Batch] = deque()
        self._born = 0
        for _ in range(self.options.num_workers):
            self._start("draw")
        for _ in range(self.options.num_scoring_workers):
            self._start("score")

    def run(self, planner: Planner, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest]) -> Iterator[Finished]:
        """See `Pool.run`.

        Raises:
            PoolError: No worker could be started.
            Exception: A worker's own that is not the fault of a job, such as a scorer that is not there.
        """
        cached: dict[str, frozenset[str]] = {}
        last_seen = time.monotonic()
        while True:
            self._hand_out(planner, jobs, requests, cached)
            if not any(pending.batch is not None for pending in self._pending.values()) and self._idle(planner):
                return
            done, _ = ray.wait(list(self._pending), timeout=1.0)
            if not done:
                if self.pids:
                    last_seen = time.monotonic()
                elif time.monotonic() - last_seen > self.options.start_timeout:
                    raise self._no_worker()
                continue
            last_seen = time.monotonic()
            for reference in done:
                yield from self._settle(reference, planner, jobs, requests, cached)

    def score(self, pictures: Iterable[Pictures]) -> Iterator[list[dict[str, float]]]:
        """See `Pool.score`.

        Raises:
            PoolError: A worker was lost; what was scored before is not.
        """
        actors = [self._actors[name] for name in self._scoring_names()]
        waiting: deque[Any] = deque()
        try:
            for number, (images, texts) in enumerate(pictures):
                waiting.append(actors[number % len(actors)].score.remote(list(images), list(texts)))
                if len(waiting) >= IN_FLIGHT * len(actors):
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except RayError as error:
            raise PoolError(f"A worker was lost while it scored: {error}. Run the same command again.") from error

    def describe_scorers(self) -> dict[str, dict[str, Any]]:
        """See `Worker.describe_scorers`. The workers answer, since this process may have no GPU."""
        if not self.spec.scorers:
            return {}
        name = self._scoring_names()[0]
        ready = [reference for reference, p in self._pending.items() if p.kind == "ready" and p.actor == name]
        try:
            ray.get(ready, timeout=self.options.start_timeout)
            return ray.get(self._actors[name].describe_scorers.remote())
        except GetTimeoutError as error:
            raise self._no_worker() from error
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None

    def _scoring_names(self) -> list[str]:
        """Actors that can score: those that only do that, if there are any."""
        return [name for name in self._actors if name.startswith("score")] or list(self._actors)

    def _no_worker(self) -> PoolError:
        return PoolError(
            f"No worker could be started within {self.options.start_timeout:.0f} s. Each needs "
            f"{self.options.num_gpus:g} GPUs and {self.options.num_cpus:g} CPUs, and the cluster has "
            f"{_resources_left()} left. Ask for fewer workers or less for each."
        )

    def close(self) -> None:
        """Stop the actors, and the cluster if this pool started it."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._pending, self.pids = {}, {}, {}
        if self._started_ray:
            ray.shutdown()

    def _start(self, kind: str) -> None:
        name = f"{kind}-{self._born}"
        self._born += 1
        actor, spec = self._recipes[kind]
        self._actors[name] = actor.remote()
        self._pending[self._actors[name].ready.remote(spec)] = _Pending("ready", name)

    def _hand_out(
        self,
        planner: Planner,
        jobs: Sequence[RenderJob],
        requests: Sequence[RenderRequest],
        cached: Mapping[str, frozenset[str]],
    ) -> None:
        """Give every worker that is ready up to IN_FLIGHT batches, the least busy first."""
        waiting = sum(pending.kind == "score" for pending in self._pending.values())
        if waiting > IN_FLIGHT * (self.options.num_workers + self.options.num_scoring_workers):
            return  # scoring is the bottleneck; pictures must not pile up
        busy = Counter(pending.actor for pending in self._pending.values() if pending.kind == "draw")
        for round_ in range(IN_FLIGHT):
            for name in sorted(self.pids.keys() - self._retiring):
                if not name.startswith("draw") or busy[name] > round_ or self._has_suspect(name):
                    continue
                alone = self._alone and not busy[name]
                batch = self._alone.popleft() if alone else planner.next(name, cached.get(name, frozenset()))
                if batch is None:
                    continue
                busy[name] += 1
                done, report = self._call(
                    name, [jobs[i] for i in batch.jobs], [requests[i] for i in batch.jobs], planner.upcoming(name)
                )
                self._pending[done] = _Pending("draw", name, batch, report)

    def _has_suspect(self, worker: str) -> bool:
        """Whether a worker has a batch that was lost before: nothing else should die with it if it is to blame."""
        batches = [p.batch for p in self._pending.values() if p.actor == worker and p.batch is not None]
        return any(self._attempts[i] for batch in batches for i in batch.jobs)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, Any]:
        return self._actors[name].run.options(num_returns=2).remote(*arguments)

    def _settle(
        self, reference: Any, planner: Planner, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest],
        cached: dict[str, frozenset[str]],
    ) -> Iterator[Finished]:  # fmt: skip
        """What follows from a reference that is done."""
        pending = self._pending.pop(reference)
        to_score = pending.kind == "draw" and self.options.num_scoring_workers > 0
        try:
            value = ray.get(reference)
            if pending.batch is not None and not to_score:
                value = ray.get(pending.report)
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise error.as_instanceof_cause() from None  # the worker is fine, and what it says is not a job's fault
            yield from self._lose(pending, planner, jobs)
            return
        except RayError as error:
            logger.warning("%s: %s", pending.actor, str(error).strip().splitlines()[0])
            yield from self._lose(pending, planner, jobs)
            return
        if pending.batch is None:
            self.pids[pending.actor] = value
        elif to_score:
            self._send_to_scoring(reference, pending, jobs, requests)
        else:
            worker = pending.drawer or pending.actor
            cached[worker] = value.cached
            yield Finished(worker, pending.batch, value)
            self._recycle(worker, value.memory_bytes, planner)

    def _send_to_scoring(
        self, reference: Any, pending: _Pending, jobs: Sequence[RenderJob], requests: Sequence[RenderRequest]
    ) -> None:
        busy = Counter(other.actor for other in self._pending.values() if other.kind == "score")
        ready = [name for name in self.pids if name.startswith("score")]
        assert pending.batch is not None
        if not ready:  # come back later: the drawn pictures wait where they are
            self._pending[reference] = pending
            time.sleep(0.05)
            return
        name = min(ready, key=lambda name: busy[name])
        done, report = self._call(
            name, pending.report, [jobs[i] for i in pending.batch.jobs], [requests[i] for i in pending.batch.jobs]
        )
        self._pending[done] = _Pending("score", name, pending.batch, report, pending.actor)

    def _lose(self, pending: _Pending, planner: Planner, jobs: Sequence[RenderJob]) -> Iterator[Finished]:
        """A worker died, or the machine that held its pictures."""
        self._drop(pending.actor, planner, "lost")
        if pending.batch is None:
            return
        self._attempts.update(pending.batch.jobs)
        attempts = max(self._attempts[i] for i in pending.batch.jobs)
        if attempts >= MAX_ATTEMPTS and len(pending.batch.jobs) == 1:
            results = [lost(jobs[pending.batch.jobs[0]], attempts)]
            yield Finished(pending.actor, pending.batch, WorkReport(results, Spent(), frozenset(), 0))
            return
        self.events["retried"] += 1
        if attempts >= MAX_ATTEMPTS - 1:
            self._alone += [pending.batch._replace(jobs=(i,)) for i in pending.batch.jobs]
        else:
            planner.put_back(pending.batch)

    def _drop(self, name: str, planner: Planner, event: str) -> None:
        """Forget a worker and start another in its place; its other batches come back as errors of their own."""
        actor = self._actors.pop(name, None)
        if actor is None:
            return
        self.events[event] += 1
        self.pids.pop(name, None)
        self._retiring.discard(name)
        planner.forget(name)
        ray.kill(actor)
        self._start(name.partition("-")[0])

    def _recycle(self, worker: str, memory_bytes: int, planner: Planner) -> None:
        """Replace a worker that has grown too large, once its last batch is done."""
        limit = self.options.max_memory_gb
        if limit is not None and memory_bytes > limit * 1e9 and worker in self._actors:
            self._retiring.add(worker)
        if worker in self._retiring and not any(pending.actor == worker for pending in self._pending.values()):
            logger.warning("worker %s uses %.1f GB: starting a new one", worker, memory_bytes / 1e9)
            self._drop(worker, planner, "recycled")

    def _idle(self, planner: Planner) -> bool:
        """Whether nothing is left to hand out: nobody is ready only because nobody is needed."""
        return planner.remaining == 0 and not self._alone


def _connect(options: RayOptions) -> bool:
    """Whether a cluster was started."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address is not None:
        _check_address(options.address)
        try:
            ray.init(address=options.address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise PoolError(f"`ray_address`: there is no cluster at {options.address}: {error}") from error
        return False
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on this machine only
    cpus = options.num_workers * options.num_cpus + options.num_scoring_workers
    ray.init(num_cpus=max(1, round(cpus)), include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    return True


def _check_address(address: str) -> None:
    """Ray itself goes on asking for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # `auto`, or Ray's own schemes
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise PoolError(f"`ray_address`: there is no cluster at {address}: {error}.") from error


def _resources(num_gpus: float, num_cpus: float) -> dict[str, Any]:
    # Ray's own restarts are off: they give up while a node's death is still unknown, and know nothing of the plan.
    return {"num_gpus": num_gpus, "num_cpus": num_cpus, "max_restarts": 0, "max_task_retries": 0}


def _resources_left() -> str:
    left = ray.available_resources()
    return f"{left.get('GPU', 0):g} GPUs and {left.get('CPU', 0):g} CPUs"
