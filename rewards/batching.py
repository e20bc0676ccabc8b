"""Working through a stream in batches: prepared ahead by threads, halved when memory runs out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class BatchSize:
    """How many items go into a batch; `in_batches` makes it smaller for good when memory runs out."""

    value: int

    def __post_init__(self):
        if self.value < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {self.value}.")


def in_batches(
    items: Iterable[Item], size: BatchSize, function: Callable[[list[Item]], list[Result]]
) -> Iterator[Result]:
    """`function` over `items`, a batch at a time; results in order.

    A batch that does not fit into memory is halved and tried again, down to one item; the smaller size stays.

    Raises:
        Exception: The out-of-memory error itself, if even one item does not fit.
    """
    stream = iter(items)
    waiting: list[Item] = []
    while True:
        waiting += islice(stream, max(0, size.value - len(waiting)))
        if not waiting:
            return
        batch = waiting[: size.value]
        try:
            results = function(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            size.value = len(batch) // 2
            error.__traceback__ = None  # its frames hold the tensors that did not fit
        else:
            waiting = waiting[len(batch) :]
            yield from results
            continue
        release_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def release_memory() -> None:
    """Give cached GPU memory back, so that a smaller batch isn't defeated by fragments of the larger one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, ahead: int
) -> Iterator[Result]:
    """`map(function, items)` on threads, in order, at most `ahead` results in memory before they are taken.

    Args:
        function: Must be safe to run on several threads; an exception is raised where its result would have come.
        items: Read lazily.
        num_workers: Threads; 0 runs everything on the caller's.
        ahead: Items under way or waiting; at least 1.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    stream = iter(items)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(stream, ahead))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(stream, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
