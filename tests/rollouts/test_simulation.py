"""Rollouts on paper: schedules that can be worked out by hand, bounds, and a real run with threads that sleep."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.baseline_planners import LruPlanner, NaivePlanner, batches_in_order
from rollouts.costs import CostModel, Line, Priors
from rollouts.planning import Planner
from rollouts.requests import Batch, BatchKey, Spent
from rollouts.simulation import Cluster, simulate

GB = 10**9
READ, BUILD, SWAP, DRAW = 1.0, 0.5, 0.25, 3.0  # a second a GB, half a second a pipeline, 3 seconds a batch
COSTS = CostModel(Priors({"SD 1.5": Line(DRAW, 0.0)}, Line(0.0, READ), Line(BUILD, 0.0), SWAP))


def batches(*names):
    """One batch each; `a+x`: with a LoRA."""
    split = [name.partition("+") for name in names]
    keys = [BatchKey("SD 1.5", a, x, 1.0, "Euler a", 512, 512, 20 + i, 7.0, 1) for i, (a, _, x) in enumerate(split)]
    return [Batch(key, (index,)) for index, key in enumerate(keys)]


class InOrder:
    """Batches in a given order; what comes next is always announced."""

    keeps_pipelines = True

    def __init__(self, *names, per_worker=None):
        found = batches(*names)
        self.queues = per_worker or {}
        self.rest = found if per_worker is None else []

    def next(self, worker, cached=()):
        queue = self.queues.get(worker, self.rest)
        return queue.pop(0) if queue else None

    def upcoming(self, worker):
        queue = self.queues.get(worker, self.rest)
        return queue[0].key.checkpoint if queue else None


def apart(**names):
    """Workers with lists of their own: `w0="ab", w1="c"`."""
    return InOrder(per_worker={int(worker[1:]): batches(*own) for worker, own in names.items()})


def cluster(workers=1, **options):
    plain = {"gpus_per_node": 8, "device_gb": 100.0, "cpu_gb": 0.0, "prefetch": False}
    return Cluster(workers, **(plain | options))


SIZES = {"a": 2 * GB, "b": 1 * GB, "c": 1 * GB, "d": 6 * GB}


def makespan(planner, where, **options):
    return simulate(planner, where, COSTS, SIZES, **options).makespan


def test_one_worker_adds_up():
    found = simulate(InOrder("a", "a+x", "a+x", "a", "b", "a+x"), cluster(), COSTS, SIZES | {"x": GB // 2})
    # a and b are read once; x is put in twice, for it was taken out between, and read from disk both times.
    assert found.makespan == pytest.approx(2 * READ + 1 * READ + 2 * BUILD + 2 * SWAP + 6 * DRAW)
    assert (found.loads, found.builds, found.lora_swaps, found.batches) == (2, 2, 2, 6)
    assert found.bytes_read == 3 * GB + 2 * GB // 2
    assert found.busy_share == pytest.approx(6 * DRAW / found.makespan)
    # With memory for files it is read once.
    found = simulate(InOrder("a+x", "a", "a+x"), cluster(cpu_gb=9.0), COSTS, SIZES | {"x": GB // 2})
    assert (found.lora_swaps, found.bytes_read) == (2, 2 * GB + GB // 2)


def test_what_is_read_ahead_costs_nothing_but_building():
    # b (1 s) is read while a (2 s) is, beside it: each has a reader's full speed.
    assert makespan(InOrder("a", "b"), cluster(prefetch=True)) == pytest.approx(2 + BUILD + DRAW + BUILD + DRAW)
    # d takes 6 s from the start and is waited for.
    assert makespan(InOrder("b", "d"), cluster(prefetch=True)) == pytest.approx(6 + BUILD + DRAW)
    # One link for both: a and b halve it for 2 s, then a has its last GB alone.
    shared = cluster(prefetch=True, read_gb_per_s=1.0)
    assert makespan(InOrder("a", "b"), shared) == pytest.approx(3 + BUILD + DRAW + BUILD + DRAW)


def test_without_room_beside_the_one_in_use_nothing_is_read_ahead():
    tight, roomy = cluster(prefetch=True, device_gb=2.5), cluster(prefetch=True, device_gb=3.0)
    assert makespan(InOrder("a", "b"), tight) == pytest.approx(2 + BUILD + DRAW + 1 + BUILD + DRAW)
    assert makespan(InOrder("a", "b"), roomy) == pytest.approx(2 + BUILD + DRAW + BUILD + DRAW)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 6]),  # each at a reader's full speed, 1 GB/s
        ({"read_gb_per_s": 4.0}, [2, 6]),  # which is the limit
        ({"read_gb_per_s": 1.0}, [4, 8]),  # 2 + 2 of 6 GB in 4 s, the last 4 alone
        ({"read_gb_per_s": 1.0, "gpus_per_node": 1}, [2, 6]),  # links of their own
        ({"storage_gb_per_s": 1.0, "gpus_per_node": 1}, [4, 8]),  # one storage behind them
        ({"storage_gb_per_s": 1.5, "gpus_per_node": 1}, [2 / 0.75, 2 / 0.75 + (6 - 2) / 1.0]),
    ],
)
def test_readers_share_links_and_storage(options, expected):
    found = simulate(apart(w0="a", w1="d"), cluster(2, **options), COSTS, SIZES)
    assert [worker.waiting for worker in found.per_worker] == pytest.approx([t + BUILD for t in expected])
    assert [worker.finished for worker in found.per_worker] == pytest.approx([t + BUILD + DRAW for t in expected])


@pytest.mark.parametrize(
    ("names", "device_gb", "read"),
    [("abab", 3.0, "ab"), ("abab", 2.5, "abab"), ("abcabc", 3.0, "abcabc"), ("bcbcab", 2.0, "bcab"), ("dd", 1.0, "d")],
)
def test_a_device_drops_what_was_used_longest_ago(names, device_gb, read):
    found = simulate(InOrder(*names), cluster(device_gb=device_gb), COSTS, SIZES)
    assert (found.loads, found.builds) == (len(read), len(read))
    assert found.bytes_read == sum(SIZES[name] for name in read)


def test_memory_beside_the_device_saves_reading():
    found = simulate(InOrder("a", "b", "a"), cluster(device_gb=2.0, cpu_gb=3.0), COSTS, SIZES)
    assert (found.loads, found.builds) == (2, 3)
    assert found.makespan == pytest.approx(2 + 1 + 3 * BUILD + 3 * DRAW)
    # Too little memory for both.
    found = simulate(InOrder("a", "b", "a"), cluster(device_gb=2.0, cpu_gb=2.0), COSTS, SIZES)
    assert (found.loads, found.builds) == (3, 3)


def test_what_a_node_has_read_its_other_workers_only_copy():
    # The second waits for the first one's read to end; the third, later, copies at a reader's speed.
    one_node = cluster(3, cpu_gb=10.0, read_gb_per_s=0.5)
    planner = apart(w0="a", w1="a", w2="ba")
    found = simulate(planner, one_node, COSTS, SIZES)
    assert found.loads == 2 and found.bytes_read == 3 * GB
    # a and b share 0.5 GB/s: b is through after 4 s, a after 6.
    expected = [6 + BUILD, 6 + BUILD, 4 + BUILD + 2 * READ + BUILD]
    assert [worker.waiting for worker in found.per_worker] == pytest.approx(expected)
    nodes = simulate(apart(w0="a", w1="a"), cluster(2, cpu_gb=10.0, gpus_per_node=1), COSTS, SIZES)
    assert nodes.loads == 2


def test_the_peers_build_for_every_call_or_keep_what_they_used_last():
    # Two calls of a with two batches each, one of b between them.
    keys = [key for key in (b.key._replace(steps=20) for b in batches("a", "b", "a")) for _ in range(4)]
    naive = simulate(NaivePlanner(batches_in_order(keys, 2)), cluster(), COSTS, SIZES)
    lru = simulate(LruPlanner(batches_in_order(keys, 2)), cluster(), COSTS, SIZES)
    assert (naive.builds, naive.loads, lru.builds, lru.loads) == (3, 3, 2, 2)
    assert naive.makespan == pytest.approx(2 + 1 + 2 + 3 * BUILD + 6 * DRAW)
    assert lru.makespan == pytest.approx(2 + 1 + 2 * BUILD + 6 * DRAW)


def test_the_planner_in_a_schedule_worked_out_by_hand():
    # b takes the longest and goes to the first worker, a to the second, which reads c ahead; at the end neither has so
    # much more left that the other would gain by another load.
    planner = Planner(batches(*"aaaaabbbbbbbc"), SIZES, COSTS, workers=2)
    found = simulate(planner, cluster(2, prefetch=True), COSTS, SIZES, timeline=True)
    assert [worker.finished for worker in found.per_worker] == pytest.approx(
        [1 + BUILD + 7 * DRAW, 2 + BUILD + 5 * DRAW + BUILD + DRAW]
    )
    second = [(what, start, end) for worker, what, start, end in found.timeline if worker == 1]
    assert [what for what, *_ in second] == ["load", *"aaaaa", "load", "c"]
    assert second[6][1:] == pytest.approx((2 + BUILD + 5 * DRAW, 2 + 2 * BUILD + 5 * DRAW))
    assert found.loads == 3 and found.gpu_hours == pytest.approx(2 * 22.5 / 3600)
    shares = found.summary()
    parts = ("busy_share", "waiting_share", "lora_share", "idle_share")
    assert sum(shares[name] for name in parts) == pytest.approx(1.0)


def test_at_the_end_work_is_taken_over():
    # One checkpoint of 40 batches and a second worker: sharing costs one more load.
    planner = Planner(batches(*"b" * 40), SIZES, COSTS, workers=2)
    found = simulate(planner, cluster(2), COSTS, SIZES)
    assert found.loads == 2
    assert found.makespan == pytest.approx(1 + BUILD + 20 * DRAW)


def test_jitter_is_drawn_anew_by_seed_and_keeps_the_mean():
    names = ["a"] * 2000
    plain = makespan(InOrder(*names), cluster())
    first, again, other = (makespan(InOrder(*names), cluster(), jitter=0.5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == pytest.approx(plain, rel=0.05)


def test_impossible_clusters_are_refused():
    for options, message in (
        ({"workers": 0}, "`workers` and `gpus_per_node` must be at least 1"),
        ({"device_gb": -1.0}, "`device_gb` and `cpu_gb` must not be below 0"),
        ({"read_gb_per_s": 0.0}, "`read_gb_per_s` must be above 0"),
        ({"storage_gb_per_s": -2.0}, "`storage_gb_per_s` must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Cluster(**options)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "+x", "+y"])), min_size=1, max_size=150),
    st.integers(1, 10),
    st.booleans(),
    st.sampled_from([0.0, 3.0, 50.0]),
    st.sampled_from([None, 0.5, 3.0]),
    st.sampled_from([1.0, 4.0, 100.0]),
)
def test_whatever_the_cluster_everything_is_drawn_in_time(work, workers, prefetch, cpu_gb, link, device_gb):
    found = batches(*(name + lora for name, lora in work))
    where = Cluster(workers, 3, device_gb, cpu_gb, link, None if link is None else 2 * link, prefetch)
    result = simulate(Planner(found, SIZES, COSTS, workers=workers), where, COSTS, SIZES)
    assert result.images == len(work)
    used = {name for name, _ in work}
    assert result.loads >= len(used) and result.builds >= len(used)
    drawing = sum(worker.drawing for worker in result.per_worker)
    assert drawing == pytest.approx(DRAW * len(work))
    # Mean of all that is done, and then what nobody takes over: less than three loads' worth (its half must be worth
    # one), a load under way, and a batch.
    spent = sum(worker.drawing + worker.waiting + worker.lora for worker in result.per_worker)
    load = max(worker.waiting for worker in result.per_worker)
    assert spent / workers - 1e-9 <= result.makespan
    assert result.makespan <= spent / workers + 3 * max(load, 6.5) + load + DRAW + SWAP + 1e-9


def test_a_real_run_takes_as_long_as_predicted_with_the_costs_it_had():
    """Two threads that sleep for every load, build and batch, as workers without memory for files."""
    names = [name for name, count in zip("abcdef", (30, 17, 11, 5, 3, 1), strict=True) for _ in range(count)]
    sizes = {name: (1 + index % 3) * GB for index, name in enumerate("abcdef")}
    work = batches(*names)
    believed = CostModel(Priors({"SD 1.5": Line(0.02, 0.0)}, Line(0.0, 0.01), Line(0.005, 0.0), 0.0))
    planner, lock, records = Planner(work, sizes, believed, workers=2), threading.Lock(), []

    def worker(name):
        loaded = None
        while True:
            with lock:
                batch = planner.next(name, {loaded} if loaded else ())
            if batch is None:
                return
            started = time.perf_counter()
            spent = Spent(batches=1, images=1)
            if loaded != batch.key.checkpoint:
                loaded = batch.key.checkpoint
                time.sleep(0.03 * sizes[loaded] / GB)  # three times as slow as believed
                read = time.perf_counter() - started
                time.sleep(0.01)
                both = time.perf_counter() - started
                spent = spent._replace(loads=1, loaded_bytes=sizes[loaded], read_seconds=read, load_seconds=both)
            now = time.perf_counter()
            time.sleep(0.015)
            with lock:
                records.append((batch, spent._replace(draw_seconds=time.perf_counter() - now)))

    threads = [threading.Thread(target=worker, args=(name,)) for name in range(2)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = time.perf_counter() - started
    assert len(records) == len(work)
    costs = CostModel.fit(records, sizes)
    where = cluster(2, device_gb=3.0)
    predicted = simulate(Planner(work, sizes, believed, workers=2), where, costs, sizes)
    assert predicted.makespan == pytest.approx(measured, rel=0.15)
