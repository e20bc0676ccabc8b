import threading
import time

import pytest
import torch

from rewards.batching import BatchSize, in_batches, is_out_of_memory, prefetch


def test_results_come_in_order_in_batches_of_the_size():
    seen = []

    def double(batch):
        seen.append(len(batch))
        return [2 * item for item in batch]

    assert list(in_batches(range(10), BatchSize(4), double)) == [2 * i for i in range(10)]
    assert seen == [4, 4, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_for_good(error):
    seen = []

    def fits_three(batch):
        seen.append(len(batch))
        if len(batch) > 3:
            raise error
        return batch

    size = BatchSize(8)
    assert list(in_batches(range(20), size, fits_three)) == list(range(20))
    assert seen == [8, 4, *[2] * 10]
    assert size.value == 2


def test_one_item_that_does_not_fit_is_an_error():
    def never(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(range(4), BatchSize(4), never))


def test_other_errors_are_not_swallowed():
    def broken(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(in_batches(range(4), BatchSize(4), broken))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, but got 0"):
        BatchSize(0)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_reads_only_a_little_ahead(num_workers):
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def work(item):
        time.sleep(0.002 * (item % 3))
        return item, threading.get_ident()

    results = prefetch(work, items(), num_workers=num_workers, ahead=5)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + 5
    rest = list(results)
    assert [item for item, _ in rest] == list(range(3, 50))
    here = {thread for _, thread in rest} == {threading.get_ident()}
    assert here == (num_workers == 0)


def test_prefetch_raises_an_error_where_its_result_would_have_come():
    def work(item):
        return 1 / (item - 2)

    results = prefetch(work, range(5), num_workers=2, ahead=2)
    assert [next(results), next(results)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_prefetch_that_is_not_read_to_the_end_stops():
    done = []
    results = prefetch(lambda item: done.append(item) or item, range(1000), num_workers=2, ahead=4)
    next(results)
    results.close()
    assert len(done) < 20
