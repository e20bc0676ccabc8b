"""What `rollouts.planning.Planner` is compared with: the table's order, with and without a cache of pipelines."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import groupby

from rollouts.planning import evenly
from rollouts.requests import Batch, BatchKey


def batches_in_order(keys: Sequence[BatchKey], batch_size: int | None = None) -> list[Batch]:
    """Batches of neighbouring jobs with equal keys (a call and its seeds): for `NaivePlanner` and `LruPlanner`.

    Args:
        keys: Of all jobs.
        batch_size: Most jobs in a batch; none: any number.
    """
    runs = ((key, [index for index, _ in run]) for key, run in groupby(enumerate(keys), key=lambda item: item[1]))
    return [batch for key, run in runs for batch in evenly(key, run, batch_size or len(run))]


class NaivePlanner:
    """The table's order: whoever asks first gets the next call. A worker builds a pipeline for every call."""

    keeps_pipelines = False

    def __init__(self, batches: Iterable[Batch]) -> None:
        """Nothing is sorted: see `batches_in_order`. Neighbours with equal keys are one call."""
        calls = groupby(batches, key=lambda batch: batch.key)
        self._waiting = [list(call)[::-1] for _, call in calls][::-1]
        self._current: dict[Hashable, list[Batch]] = {}
        self._all = self.remaining = sum(map(len, self._waiting))

    def next(self, worker: Hashable, cached: Collection[str] = ()) -> Batch | None:
        """The rest of the worker's call, or the next of the table, or None if all are handed out."""
        if not self._current.get(worker):
            if not self._waiting:
                return None
            self._current[worker] = self._waiting.pop()
        self.remaining -= 1
        return self._current[worker].pop()

    def upcoming(self, worker: Hashable) -> str | None:
        """Nothing is known of what this worker will draw next."""
        return None

    def put_back(self, batch: Batch) -> None:
        """A batch whose worker was lost: the next to be handed out."""
        self._waiting.append([batch])
        self.remaining += 1

    def forget(self, worker: Hashable) -> None:
        """A worker is gone: the rest of its call is the next to be handed out."""
        if rest := self._current.pop(worker, None):
            self._waiting.append(rest)

    @property
    def done(self) -> int:
        """Batches handed out and not put back."""
        return self._all - self.remaining


class LruPlanner(NaivePlanner):
    """The table's order; workers keep the pipelines they used last."""

    keeps_pipelines = True
