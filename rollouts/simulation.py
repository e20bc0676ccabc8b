"""A rollout on a cluster on paper: the same planner, virtual time.

    prediction = simulate(Planner(batches, sizes, costs, workers=64), Cluster(workers=64), costs, sizes)

What is modelled: reading checkpoints (a node's and the storage's bandwidth, shared equally by those who read),
building pipelines, LoRA swaps, drawing, a cache of pipelines on every device and one of files in every node's memory
(both drop what was used longest ago), and prefetch. A file that its node has in memory costs no disk traffic, but a
worker that has not read it takes as long as one reader alone would. What is not: starting the workers, scoring, losses,
and the time to read a LoRA beyond its swap.
"""

import heapq
import itertools
import random
from collections import ChainMap, OrderedDict
from collections.abc import Collection, Hashable, Mapping
from typing import Any, Protocol

from rollouts.costs import GB, CostModel
from rollouts.prediction import Cluster, Prediction, WorkerTime
from rollouts.requests import Batch

_AT_ONCE = 1e12  # GB/s: a rate that can be multiplied by zero


class PlannerLike(Protocol):
    """What a simulated or real worker needs of a planner."""

    keeps_pipelines: bool

    def next(self, worker: Hashable, cached: Collection[str] = ()) -> Batch | None:
        """What this worker draws next."""
        ...

    def upcoming(self, worker: Hashable) -> str | None:
        """What it should read meanwhile."""
        ...


def simulate(
    planner: PlannerLike,
    cluster: Cluster,
    costs: CostModel,
    sizes: Mapping[str, int],
    *,
    jitter: float = 0.0,
    seed: int = 0,
    timeline: bool = False,
) -> Prediction:
    """Let a planner's workers draw everything, in virtual time.

    Args:
        planner: Fresh; it is used up.
        cluster: Where.
        costs: What things take here. The planner may believe others.
        sizes: Bytes by model name, LoRAs included; a missing one counts nothing.
        jitter: Standard deviation of the logarithm of a batch's drawing time around its estimate.
        seed: Of the jitter.
        timeline: Whether to keep what every worker did when.
    """
    return _Simulation(planner, cluster, costs, sizes, jitter, seed, timeline).run()


class _Memory(OrderedDict[str, int]):
    """Names and bytes; drops the least recently used ones to stay within a budget."""

    def __init__(self, budget: float) -> None:
        super().__init__()
        self._budget, self._used = budget, 0

    def use(self, name: str) -> bool:
        """Whether it is there; it then counts as used now."""
        if name not in self:
            return False
        self.move_to_end(name)
        return True

    def add(self, name: str, size: int, keep: Collection[str] = ()) -> list[str]:
        """Put it in, even if it alone is over the budget; returns what had to go."""
        gone = []
        for old in list(self) if self._used + size > self._budget else ():
            if self._used + size <= self._budget:
                break
            if old not in keep:
                self._used -= self.pop(old)
                gone.append(old)
        self[name] = size
        self._used += size
        return gone

    def clear(self) -> None:
        """Drop everything."""
        super().clear()
        self._used = 0


class _Node:
    """A node's memory and its reads. All reads of a node go at the same rate, so `progress` (GB) is one number."""

    def __init__(self, budget: float, workers: "list[_Worker]") -> None:
        self.memory, self.workers = _Memory(budget), workers
        self.reading: dict[str, list[_Worker]] = {}  # what is on its way, and for whom
        self.streams: list[tuple[float, int, str]] = []  # heap: progress at which a read is through, number, key
        self.progress, self.since, self.rate = 0.0, 0.0, 0.0
        self.version = 0


class _Worker:
    """A process and its device."""

    def __init__(self, index: int, device: float) -> None:
        self.index = index
        self.device = _Memory(device)  # pipelines; without memory for files, weights that were read ahead too
        self.weights: set[str] = set()  # read and not built, as far as they are still in memory
        self.reading: set[str] = set()
        self.loras: dict[str, str] = {}  # LoRA in each pipeline
        self.batch: Batch | None = None
        self.waits = False
        self.asked = 0.0
        self.time = WorkerTime()


class _Simulation:
    def __init__(
        self,
        planner: PlannerLike,
        cluster: Cluster,
        costs: CostModel,
        sizes: Mapping[str, int],
        jitter: float,
        seed: int,
        timeline: bool,
    ) -> None:
        self.planner, self.cluster, self.costs, self.sizes = planner, cluster, costs, sizes
        self.jitter, self.random, self.keep_timeline = jitter, random.Random(seed), timeline
        self.opening, self.per_gb = costs.read_line()
        self.has_memory = cluster.cpu_gb > 0
        self.workers = [_Worker(index, cluster.device_gb * GB) for index in range(cluster.workers)]
        step = cluster.gpus_per_node
        self.nodes = [
            _Node(cluster.cpu_gb * GB, self.workers[first : first + step]) for first in range(0, cluster.workers, step)
        ]
        self.streams = 0  # reads under way on all nodes
        self.now, self.events, self.numbers = 0.0, [], itertools.count()
        self.result = Prediction(per_worker=[worker.time for worker in self.workers])

    def at(self, time: float, action: Any, *arguments: Any) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), action, arguments))

    def run(self) -> Prediction:
        for worker in self.workers:
            self.at(0.0, self.ask, worker)
        while self.events:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        return self.result

    def node(self, worker: _Worker) -> _Node:
        return self.nodes[worker.index // self.cluster.gpus_per_node]

    # A worker: ask, get the weights, build, draw

    def ask(self, worker: _Worker) -> None:
        before, node = worker.batch, self.node(worker)
        caches: list[Any] = [worker.device, node.memory, node.reading]
        batch = worker.batch = self.planner.next(worker.index, ChainMap(*caches))
        if batch is None:
            return
        worker.asked, name = self.now, batch.key.checkpoint
        if not self.planner.keeps_pipelines and not _continues(before, batch):
            worker.device.clear()
            worker.weights.clear()
        if name in worker.device and (self.has_memory or name not in worker.weights | worker.reading):
            worker.device.use(name)
            self.draw(worker)
        elif self.holds(worker, name):
            self.build(worker)
        else:
            worker.waits = True
            self.fetch(worker, name)
        upcoming = self.planner.upcoming(worker.index)
        if self.cluster.prefetch and upcoming is not None and upcoming not in worker.device:
            self.prefetch(worker, upcoming)

    def holds(self, worker: _Worker, name: str) -> bool:
        """Whether a worker has the weights in its memory."""
        return name in worker.weights and (self.node(worker).memory.use(name) if self.has_memory else True)

    def prefetch(self, worker: _Worker, name: str) -> None:
        assert worker.batch is not None
        if name in worker.reading or self.holds(worker, name):
            return
        if not self.has_memory:
            size = self.sizes.get(name, 0)
            keep = {worker.batch.key.checkpoint, *worker.reading, *worker.weights}
            if size + sum(self.sizes.get(one, 0) for one in keep) > self.cluster.device_gb * GB:
                return
            self.forget(worker, worker.device.add(name, size, keep))
        self.fetch(worker, name)

    def fetch(self, worker: _Worker, name: str) -> None:
        """Get weights into a worker's memory: from the disk, or from what its node has read already."""
        node, size = self.node(worker), self.sizes.get(name, 0)
        if name in worker.reading:
            return
        worker.reading.add(name)
        if self.has_memory and node.memory.use(name):
            self.at(self.now + self.opening + self.per_gb * size / GB, self.fetched, worker, name)
            return
        key = name if self.has_memory else f"{worker.index} {name}"
        if key in node.reading:
            node.reading[key].append(worker)
            return
        node.reading[key] = [worker]
        self.result.loads += 1
        self.result.bytes_read += size
        self.at(self.now + self.opening, self.start_read, node, key, size)

    def fetched(self, worker: _Worker, name: str) -> None:
        worker.reading.discard(name)
        worker.weights.add(name)
        if worker.waits and worker.batch is not None and worker.batch.key.checkpoint == name:
            worker.waits = False
            self.build(worker)

    def build(self, worker: _Worker) -> None:
        assert worker.batch is not None
        name = worker.batch.key.checkpoint
        size = self.sizes.get(name, 0)
        if name in worker.device:
            worker.device.use(name)
        else:
            ahead = set() if self.has_memory else worker.weights | worker.reading
            self.forget(worker, worker.device.add(name, size, ahead))
        if not self.has_memory:
            worker.weights.discard(name)  # the pipeline took them over
        worker.loras[name] = ""
        self.result.builds += 1
        self.at(self.now + self.costs.build_seconds(size), self.draw, worker)

    def forget(self, worker: _Worker, names: list[str]) -> None:
        for name in names:
            worker.loras.pop(name, None)
            if not self.has_memory:
                worker.weights.discard(name)

    def draw(self, worker: _Worker) -> None:
        assert worker.batch is not None
        key, time = worker.batch.key, worker.time
        swap, seconds = 0.0, self.costs.draw_seconds(worker.batch)
        if key.lora and worker.loras.get(key.checkpoint) != key.lora:
            swap = self.costs.lora_seconds()
            self.result.lora_swaps += 1
            self.read_lora(self.node(worker), key.lora)
        worker.loras[key.checkpoint] = key.lora
        if self.jitter:
            seconds *= self.random.lognormvariate(-(self.jitter**2) / 2, self.jitter)
        time.waiting += self.now - worker.asked
        time.lora += swap
        time.drawing += seconds
        time.finished = self.now + swap + seconds
        self.result.batches += 1
        self.result.images += len(worker.batch.jobs)
        self.result.makespan = max(self.result.makespan, time.finished)
        if self.keep_timeline:
            if self.now > worker.asked:
                self.result.timeline.append((worker.index, "load", worker.asked, self.now))
            self.result.timeline.append((worker.index, key.checkpoint, self.now, time.finished))
        self.at(time.finished, self.ask, worker)

    # The disk

    def read_lora(self, node: _Node, name: str) -> None:
        if not (self.has_memory and node.memory.use(name)):
            size = self.sizes.get(name, 0)
            self.result.bytes_read += size
            if self.has_memory:
                node.memory.add(name, size)

    def start_read(self, node: _Node, key: str, size: int) -> None:
        self.advance(node)
        heapq.heappush(node.streams, (node.progress + size / GB, next(self.numbers), key))
        self.streams += 1
        self.share(node)

    def end_read(self, node: _Node, version: int) -> None:
        if version != node.version:
            return
        self.advance(node)
        through, _, key = heapq.heappop(node.streams)
        node.progress = max(node.progress, through)
        self.streams -= 1
        name = key
        if self.has_memory:
            for gone in node.memory.add(name, self.sizes.get(name, 0)):
                for worker in node.workers:
                    worker.weights.discard(gone)
        else:
            name = key.split(" ", 1)[1]
        for worker in node.reading.pop(key):
            self.fetched(worker, name)
        self.share(node)

    def advance(self, node: _Node) -> None:
        node.progress += node.rate * (self.now - node.since)
        node.since = self.now

    def share(self, changed: _Node) -> None:
        """Reads share the bandwidth anew; only nodes whose rate changes are touched."""
        for node in self.nodes if self.cluster.storage_gb_per_s else (changed,):
            rates = [1 / self.per_gb if self.per_gb else _AT_ONCE]
            if self.cluster.read_gb_per_s and node.streams:
                rates.append(self.cluster.read_gb_per_s / len(node.streams))
            if self.cluster.storage_gb_per_s and node.streams:
                rates.append(self.cluster.storage_gb_per_s / self.streams)
            if node is not changed and (not node.streams or min(rates) == node.rate):
                continue
            self.advance(node)
            node.rate = min(rates)
            node.version += 1
            if node.streams:
                left = node.streams[0][0] - node.progress
                self.at(self.now + max(0.0, left / node.rate), self.end_read, node, node.version)


def _continues(before: Batch | None, batch: Batch) -> bool:
    """Whether two batches of a worker are of one call."""
    return before is not None and before.key == batch.key and before.jobs[-1] + 1 == batch.jobs[0]
