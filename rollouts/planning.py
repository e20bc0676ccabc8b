"""Which worker draws what next, so that checkpoints of gigabytes are loaded rarely and no worker waits.

    planner = Planner(make_batches(keys, batch_size=4), sizes, costs, workers=8)
    while batch := planner.next(worker, cached):
        prefetch(planner.upcoming(worker))
        draw(batch)

One planner drives real workers (`rollouts.workers`) and simulated ones (`rollouts.simulation`).
`rollouts.baseline_planners` has what it is compared with.
"""

import heapq
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rollouts.costs import CostModel, megapixel_steps
from rollouts.requests import Batch, BatchKey

# Found by simulating DABench's scale on 512 GPUs (docs/scaling.md); half or twice as much costs half a per cent.
LEAD = 8.0  # a checkpoint is reserved this many times its loading time before it is needed: readers share a disk


def make_batches(keys: Sequence[BatchKey], batch_size: int) -> list[Batch]:
    """Batches of jobs with equal keys, wherever they stand in the table.

    Args:
        keys: Of all jobs.
        batch_size: Most jobs in a batch. The jobs of a key are spread evenly over as few batches as that allows.

    Returns:
        In the order in which the keys first occur.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
    jobs: dict[BatchKey, list[int]] = {}
    for index, key in enumerate(keys):
        jobs.setdefault(key, []).append(index)
    return [batch for key, indices in jobs.items() for batch in evenly(key, indices, batch_size)]


def evenly(key: BatchKey, indices: Sequence[int], size: int) -> list[Batch]:
    """Jobs of a key over as few batches of at most `size` as that takes."""
    count = -(-len(indices) // size)
    bounds = [len(indices) * i // count for i in range(count + 1)]
    return [Batch(key, tuple(indices[lo:hi])) for lo, hi in zip(bounds, bounds[1:], strict=False)]


@dataclass(eq=False, slots=True)
class _Group:
    """All batches of a checkpoint, in the order in which they are drawn."""

    name: str
    base_model: str
    size: int
    batches: list[Batch]
    units: list[float]  # megapixel-steps of the batches before each
    swaps: list[int]  # changes of LoRA before each
    out: bytearray  # which are handed out
    free: list["_Range"] = field(default_factory=list)  # parts that no worker has or has reserved
    stamp: int = 0  # of its latest entry in the heap


@dataclass(eq=False, slots=True)
class _Range:
    """Batches lo … hi-1 of a group, none of them handed out."""

    group: _Group
    lo: int
    hi: int


@dataclass(eq=False, slots=True)
class _Worker:
    started: bool = False  # it was given more than one batch
    drawing: _Range | None = None  # the last of them
    current: _Range | None = None
    reserved: _Range | None = None


class Planner:
    """Batches by checkpoint affinity, the most expensive checkpoints first.

    A worker stays with its checkpoint while that has batches left that nobody else has, LoRA by LoRA. Then it takes one
    of those it has cached, or the one reserved for it, or the free one of the highest cost (longest processing time
    first, Graham 1969). Of a checkpoint that costs more than a fair share of all work left it takes a part, and others
    join. When nothing is free, it takes over work of the worker that would finish last, so that both finish together,
    if that wins more time than loading costs.

    Batches are handed out once, unless they are put back. Not thread-safe.
    """

    keeps_pipelines = True

    def __init__(
        self, batches: Iterable[Batch], sizes: Mapping[str, int], costs: CostModel, *, workers: int = 1
    ) -> None:
        """Sort the work.

        Args:
            batches: In any order.
            sizes: Bytes by checkpoint name; one that is missing counts nothing.
            costs: May go on learning meanwhile.
            workers: How many will ask; more can.
        """
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, but is {workers}.")
        self._costs, self._expected = costs, workers
        by_checkpoint: dict[str, list[Batch]] = {}
        for batch in batches:
            by_checkpoint.setdefault(batch.key.checkpoint, []).append(batch)
        self._groups = {name: _group(name, own, sizes.get(name, 0)) for name, own in by_checkpoint.items()}
        self._place: dict[int, tuple[_Group, int]] = {}
        for group in self._groups.values():
            for index, batch in enumerate(group.batches):
                self._place[batch.jobs[0]] = group, index
        self._workers: dict[Hashable, _Worker] = {}
        self._left: dict[str, list[float]] = {}  # batches, megapixel-steps, LoRA swaps not handed out, by base model
        for group in self._groups.values():
            self._count(group, 0, len(group.batches), 1)
        self._heap: list[tuple[float, str, int]] = []
        self._rebuild()

    # What is left

    @property
    def remaining(self) -> int:
        """Batches not handed out yet."""
        return round(sum(left[0] for left in self._left.values()))

    @property
    def done(self) -> int:
        """Batches handed out and not put back."""
        return len(self._place) - self.remaining

    @property
    def remaining_seconds(self) -> float:
        """Estimate of all drawing and LoRA swapping not handed out yet, for one worker. Loading is left out."""
        return sum(self._price(base, *left) for base, left in self._left.items())

    def _price(self, base_model: str, batches: float, units: float, swaps: float) -> float:
        return self._costs.draw_line(base_model)(units, batches) + swaps * self._costs.lora_seconds()

    def _cost(self, part: _Range | None) -> float:
        if part is None:
            return 0.0
        g = part.group
        return self._price(
            g.base_model, part.hi - part.lo, g.units[part.hi] - g.units[part.lo], g.swaps[part.hi] - g.swaps[part.lo]
        )

    def _load(self, group: _Group, cached: Collection[str]) -> float:
        return self._costs.build_seconds(group.size) if group.name in cached else self._costs.load_seconds(group.size)

    def _count(self, group: _Group, lo: int, hi: int, sign: int) -> None:
        left = self._left.setdefault(group.base_model, [0.0, 0.0, 0.0])
        left[0] += sign * (hi - lo)
        left[1] += sign * (group.units[hi] - group.units[lo])
        left[2] += sign * (group.swaps[hi] - group.swaps[lo])

    # Handing out

    def next(self, worker: Hashable, cached: Collection[str] = ()) -> Batch | None:
        """What this worker draws next.

        Args:
            worker: Any hashable name. Asking for the first time makes it known.
            cached: Checkpoints that this worker could start without reading a disk, those its node reads anyway
                included.

        Returns:
            None: nothing is left that it could speed up. It may ask again after a batch was put back.
        """
        state = self._workers.setdefault(worker, _Worker())
        self._expected = max(self._expected, len(self._workers))
        part = state.current
        if part is None or part.lo == part.hi:
            part = state.current = self._choose(worker, state, cached)
            if part is None:
                return None
        group, index = part.group, part.lo
        part.lo += 1
        state.started = state.drawing is not None
        state.drawing = _Range(group, index, index + 1)
        group.out[index] = 1
        self._count(group, index, index + 1, -1)
        return group.batches[index]

    def upcoming(self, worker: Hashable) -> str | None:
        """The checkpoint to read while this worker draws; it is reserved for it.

        Ask after each `next`: a checkpoint is reserved as late as its loading allows.

        Returns:
            None: none yet, or the worker can stay with its checkpoint.
        """
        state = self._workers.get(worker)
        if state is None or state.current is None:
            return None
        if not state.started and state.current.lo < state.current.hi:
            return None  # others that start now come first, and its own checkpoint is being read
        if state.reserved is None and not state.current.group.free:
            own = self._cost(state.current)
            group = self._costliest()
            if group is not None:
                if own <= LEAD * self._costs.load_seconds(group.size):
                    state.reserved = self._cut(group)
            else:
                state.reserved = self._take_over(worker, own + self._cost(state.drawing) / 2, ())
        return None if state.reserved is None else state.reserved.group.name

    def put_back(self, batch: Batch) -> None:
        """Take back a batch that was handed out and not drawn: its worker was lost.

        Raises:
            ValueError: It was not handed out, or put back already.
        """
        group, index = self._place.get(batch.jobs[0], (None, 0))
        if group is None or group.batches[index] != batch or not group.out[index]:
            raise ValueError(f"Only a batch that was handed out can be put back, but got {batch}.")
        group.out[index] = 0
        self._count(group, index, index + 1, 1)
        self._release(_Range(group, index, index + 1))

    def forget(self, worker: Hashable) -> None:
        """A worker is gone: what it had before it or reserved is free again. Put back what it was drawing."""
        state = self._workers.pop(worker, None)
        if state is None:
            return
        self._expected = max(1, self._expected - 1)
        for part in (state.current, state.reserved):
            if part is not None and part.lo < part.hi:
                self._release(part)

    def _choose(self, worker: Hashable, state: _Worker, cached: Collection[str]) -> _Range | None:
        if state.current is not None and state.current.group.free:
            return self._cut(state.current.group)
        if state.reserved is None or state.reserved.group.name not in cached:
            groups = [self._groups[name] for name in cached if name in self._groups and self._groups[name].free]
            if groups:
                return self._cut(max(groups, key=self._free_cost))
            if state.current is None:  # eight workers that start on a node read one checkpoint sooner than eight
                part = self._take_over(worker, 0.0, {name for name in cached if name in self._groups}, cached_only=True)
                if part is not None:
                    return part
        if state.reserved is not None:
            part, state.reserved = state.reserved, None
            return part
        group = self._costliest()
        return self._take_over(worker, 0.0, cached) if group is None else self._cut(group)

    def _cut(self, group: _Group) -> _Range:
        """Of a group's largest free part as much as one worker should have at once."""
        part = max(group.free, key=self._cost)
        fair = self.remaining_seconds / self._expected
        if part.hi - part.lo > 1 and self._cost(part) > fair + self._costs.load_seconds(group.size):
            middle = self._index_at(part, fair)
            taken = _Range(group, part.lo, middle)
            part.lo = middle
        else:
            group.free.remove(part)
            taken = part
        self._push(group)
        return taken

    def _index_at(self, part: _Range, seconds: float) -> int:
        """Where a range of at least two batches is cut for its first piece to cost about so much; neither is empty."""
        cut = bisect_left(
            range(part.lo + 1, part.hi), seconds, key=lambda index: self._cost(_Range(part.group, part.lo, index))
        )
        return min(part.lo + 1 + cut, part.hi - 1)

    def _take_over(
        self, worker: Hashable, own: float, cached: Collection[str], *, cached_only: bool = False
    ) -> _Range | None:
        """Work of the worker that has most before it, for one that has `own` seconds left; None if it wins too little.

        They are to finish together; the part must be worth more than loading costs.
        """
        most, victim, load = 0.0, None, 0.0
        for name, state in self._workers.items():
            part = state.reserved or state.current
            if part is None or part.lo == part.hi or name == worker:
                continue
            if cached_only and part.group.name not in cached:
                continue
            cost = self._load(part.group, cached)
            if own > LEAD * cost:
                continue
            start = max(own + self._costs.build_seconds(part.group.size), cost)
            # Nobody says how far it is with its batch: half, on average.
            left = self._cost(state.drawing) / 2 + self._cost(state.current) + self._cost(state.reserved)
            if left - start > most:
                most, victim, load = left - start, state, cost
        if victim is None:
            return None
        if victim.reserved is not None and self._cost(victim.current) - max(own, load) > load:
            taken, victim.reserved = victim.reserved, None
            return taken
        if most / 2 <= load:
            return None
        part = victim.reserved or victim.current
        assert part is not None
        middle = part.lo
        if part.hi - part.lo > 1:
            middle = self._index_at(part, self._cost(part) - most / 2)
        taken = _Range(part.group, middle, part.hi)
        part.hi = middle
        if part.lo == part.hi and victim.reserved is part:
            victim.reserved = None
        return taken

    # Free groups, the costliest first

    def _free_cost(self, group: _Group) -> float:
        return sum(map(self._cost, group.free))

    def _release(self, part: _Range) -> None:
        """Make a range free; neighbours become one."""
        group = part.group
        group.free.append(part)
        group.free.sort(key=lambda one: one.lo)
        merged = [group.free[0]]
        for one in group.free[1:]:
            if one.lo == merged[-1].hi:
                merged[-1].hi = one.hi
            else:
                merged.append(one)
        group.free = merged
        self._push(group)

    def _push(self, group: _Group) -> None:
        group.stamp += 1
        if group.free:
            heapq.heappush(self._heap, (-self._free_cost(group), group.name, group.stamp))

    def _costliest(self) -> _Group | None:
        # Costs are learned while the heap keeps what was estimated when a group was pushed.
        if self._costs.observed >= 2 * self._rebuilt_at + 1:
            self._rebuild()
        while self._heap:
            _, name, stamp = self._heap[0]
            if stamp == self._groups[name].stamp:
                return self._groups[name]
            heapq.heappop(self._heap)
        return None

    def _rebuild(self) -> None:
        self._rebuilt_at = self._costs.observed
        self._heap = []
        for group in self._groups.values():
            self._push(group)


def _group(name: str, batches: list[Batch], size: int) -> _Group:
    # The cheap ones of a LoRA last: what nobody can take over any more, at the very end, is then short.
    batches.sort(key=lambda b: (b.key.lora, b.key.lora_weight, -megapixel_steps(b.key, 1), b))
    units, swaps, lora = [0.0], [0], ""
    for batch in batches:
        units.append(units[-1] + megapixel_steps(batch.key, len(batch.jobs)))
        swaps.append(swaps[-1] + (batch.key.lora not in ("", lora)))
        lora = batch.key.lora
    group = _Group(name, batches[0].key.base_model, size, batches, units, swaps, bytearray(len(batches)))
    group.free.append(_Range(group, 0, len(batches)))
    return group
