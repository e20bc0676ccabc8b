"""Which worker draws what next."""

import heapq
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.baseline_planners import batches_in_order
from rollouts.costs import CostModel, Line, Priors
from rollouts.planning import Planner, make_batches
from rollouts.requests import Batch, BatchKey, Spent
from rollouts.workload import Synthetic

GB = 10**9


def key(checkpoint="a", lora="", steps=20, side=500, sampler="Euler a"):
    return BatchKey("SD 1.5", checkpoint, lora, 1.0, sampler, side, side, steps, 7.0, 1)


def costs(load=1.0, per_batch=1.0, lora=0.0, per_unit=0.0):
    """A second a batch; reading a checkpoint takes `load`, whatever its size."""
    return CostModel(Priors({"SD 1.5": Line(per_batch, per_unit)}, Line(load, 0.0), Line(0.0, 0.0), lora))


def batches(*groups):
    """`("a", 3)`: three batches of checkpoint a; `("a", 3, "x")`: with a LoRA."""
    keys = [key(g[0], g[2] if len(g) > 2 else "", steps=20) for g in groups for _ in range(g[1])]
    return [Batch(k, (index,)) for index, k in enumerate(keys)]


def drain(planner, worker, cached=()):
    found = []
    while batch := planner.next(worker, cached):
        found.append(batch)
    return found


def names(found):
    return "".join(batch.key.checkpoint for batch in found)


def test_equal_keys_are_drawn_together_wherever_they_stand():
    keys = [key("a"), key("b"), key("a"), key("a", steps=30), key("a"), key("b"), key("a"), key("a")]
    found = make_batches(keys, 3)
    assert [(batch.key, batch.jobs) for batch in found] == [
        (key("a"), (0, 2)), (key("a"), (4, 6, 7)), (key("b"), (1, 5)), (key("a", steps=30), (3,)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        make_batches(keys, 0)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 7))
def test_batches_hold_every_job_once(letters, size):
    keys = [key(letter) for letter in letters]
    for found in (make_batches(keys, size), batches_in_order(keys, size)):
        assert sorted(job for batch in found for job in batch.jobs) == list(range(len(keys)))
        assert all(1 <= len(batch.jobs) <= size and {keys[job] for job in batch.jobs} == {batch.key} for batch in found)
    assert len(make_batches(keys, size)) == sum(-(-letters.count(letter) // size) for letter in set(letters))


def test_one_worker_takes_the_costliest_checkpoint_first_and_stays():
    planner = Planner(batches(("a", 2), ("b", 4), ("c", 3), ("b", 1)), {}, costs())
    assert names(drain(planner, 0)) == "bbbbbcccaa"
    assert planner.remaining == 0 and planner.done == 10


def test_within_a_checkpoint_lora_by_lora_and_the_cheap_ones_last():
    keys = [
        key("a", "y", 20),
        key("a", "", 50),
        key("a", "x", 20),
        key("a", "y", 50),
        key("a", "", 20),
        key("a", "x", 30),
    ]
    planner = Planner([Batch(k, (i,)) for i, k in enumerate(keys)], {}, costs())
    assert [(b.key.lora, b.key.steps) for b in drain(planner, 0)] == [
        ("", 50), ("", 20), ("x", 30), ("x", 20), ("y", 50), ("y", 20),
    ]  # fmt: skip


def test_workers_start_with_checkpoints_of_their_own():
    planner = Planner(batches(("a", 4), ("b", 4), ("c", 3)), {}, costs(load=0.5), workers=3)
    assert names(planner.next(worker) for worker in range(3)) == "abc"
    assert names(planner.next(worker) for worker in (2, 0, 1)) == "cab"


def test_a_cached_checkpoint_comes_before_a_costlier_one():
    planner = Planner(batches(("a", 4), ("b", 2), ("c", 3)), {}, costs(), workers=1)
    assert names(drain(planner, 0, cached={"b", "unknown"})) == "bbaaaaccc"


def test_what_is_reserved_for_one_is_left_alone_while_there_is_other_work():
    planner = Planner(batches(("a", 3), ("b", 3), ("c", 2), ("d", 1)), {}, costs(load=2.0), workers=2)
    assert names(planner.next(worker) for worker in (0, 1)) == "ab"
    assert planner.upcoming(0) is None  # its first batch: others may be about to start
    assert planner.next(0).key.checkpoint == "a"
    assert planner.upcoming(0) == "c"
    assert planner.upcoming(0) == "c"  # the same until it is begun
    assert planner.upcoming("never seen") is None
    assert names(planner.next(1) for _ in range(3)) == "bbd"
    assert names(planner.next(0) for _ in range(3)) == "acc"


def test_a_checkpoint_is_reserved_only_when_it_is_soon_needed():
    planner = Planner(batches(("a", 100), ("b", 50)), {}, costs(load=1.0), workers=1)
    asked = []
    for _ in range(100):
        planner.next(0)
        asked.append(planner.upcoming(0))
    # Eight loading times ahead: with eight batches left after the one that is drawn.
    assert asked == [None] * 91 + ["b"] * 9


def test_a_popular_checkpoint_is_shared():
    planner = Planner(batches(("a", 90), ("b", 5), ("c", 5)), {}, costs(load=1.0), workers=4)
    found = {worker: [planner.next(worker)] for worker in range(4)}
    assert names(found[worker][0] for worker in range(4)) == "aaaa"
    for turn in range(24):
        for worker in range(4):
            if batch := planner.next(worker):
                found[worker].append(batch)
        if turn == 0:
            assert planner.remaining == 92
    drawn = [batch for own in found.values() for batch in own]
    assert len(set(drawn)) == len(drawn) == 100
    assert all(len(own) == 25 for own in found.values())  # in lockstep, everybody works to the end
    switches = sum(names(own)[i] != names(own)[i + 1] for own in found.values() for i in range(24))
    assert switches <= 6


def test_at_the_end_an_idle_worker_takes_over_half_if_that_wins_more_than_a_load():
    def taken(count, load):
        # An estimate of nobody else makes the first worker take all of it.
        planner = Planner(batches(("a", count)), {}, costs(load=load), workers=1)
        assert planner.next("first") is not None
        return len(drain(planner, "second"))

    # 10 are left. Both finish together if the second takes (10 - load) / 2, the last of them.
    assert taken(11, load=0.0) >= 5
    planner = Planner(batches(("a", 11)), {}, costs(load=2.0), workers=1)
    planner.next("first")
    assert planner.next("second").jobs == (7,)  # 7, 8, 9 and 10 are the second's now
    assert len(drain(planner, "first")) + 1 + planner.remaining == 10
    assert taken(11, load=3.5) == 0  # (10 - 3.5) / 2 would be won, for a load of 3.5
    assert taken(1, load=0.0) == 0


def test_a_reserved_checkpoint_that_would_be_begun_late_is_taken_over():
    planner = Planner(batches(("a", 9), ("b", 2)), {}, costs(load=1.2), workers=1)
    planner.next(0)
    planner.next(0)
    assert planner.upcoming(0) == "b"
    assert planner.next(1).key.checkpoint == "b"  # else it would wait until 0 has drawn 7 more
    assert planner.upcoming(0) is None


def test_a_new_worker_joins_what_its_node_is_reading():
    work = batches(("a", 20), ("b", 20), ("c", 20))
    for cached, expected in (((), "ab"), ({"a"}, "aa")):
        planner = Planner(work, {}, costs(load=2.0), workers=2)
        first, second = planner.next(0), planner.next(1, cached)
        assert names([first, second]) == expected


def test_a_lost_worker_leaves_everything_to_the_others():
    work = batches(("a", 5), ("b", 5))
    planner = Planner(work, {}, costs(), workers=2)
    lost = planner.next("lost")
    planner.next("lost")
    assert planner.upcoming("lost") == "b"
    planner.put_back(lost)
    planner.forget("lost")
    planner.forget("lost")
    rest = drain(planner, "other")
    assert len(rest) == 9 and lost in rest
    # What was put back is drawn with its checkpoint, not after it was left.
    assert names(rest) == "bbbbbaaaa"


def test_only_what_was_handed_out_can_be_put_back():
    planner = Planner(batches(("a", 3)), {}, costs())
    batch = planner.next(0)
    planner.put_back(batch)
    for wrong in (batch, Batch(key("a"), (99,)), Batch(key("b"), (1,))):
        with pytest.raises(ValueError, match="Only a batch that was handed out can be put back"):
            planner.put_back(wrong)
    with pytest.raises(ValueError, match="`workers` must be at least 1"):
        Planner([], {}, costs(), workers=0)
    assert Planner([], {}, costs()).next(0) is None


def test_what_is_left_is_estimated_with_what_was_learned():
    # Two LoRAs: two swaps of 0.25 s; a batch is 0.25 MP * 40 evaluations = 10 units.
    model = costs(per_batch=1.0, per_unit=0.1, lora=0.25)
    planner = Planner(batches(("a", 3, "x"), ("a", 2, "y"), ("b", 1)), {}, model)
    assert planner.remaining_seconds == pytest.approx(6 * 2.0 + 2 * 0.25)
    first = planner.next(0)
    assert planner.remaining_seconds == pytest.approx(5 * 2.0 + 0.25)
    model.observe(first, Spent(batches=1, images=1, draw_seconds=20.0))
    assert planner.remaining_seconds == pytest.approx(5 * 20.0 + 0.25)
    planner.put_back(first)
    assert planner.remaining_seconds == pytest.approx(6 * 20.0 + 2 * 0.25)


@st.composite
def stories(draw):
    """Work and what happens to it: who asks, who is lost, what is put back."""
    groups = draw(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.sampled_from(["", "x", "y"])),
                           min_size=1, max_size=8))  # fmt: skip
    events = draw(st.lists(st.tuples(st.sampled_from(["next", "next", "next", "upcoming", "lose", "late"]),
                                     st.integers(0, 5)), max_size=120))  # fmt: skip
    return batches(*groups), events, draw(st.integers(1, 8)), draw(st.sampled_from([0.0, 0.4, 3.0]))


@settings(max_examples=300, deadline=None)
@given(stories())
def test_no_batch_is_lost_or_drawn_twice(story):
    work, events, workers, load = story
    planner = Planner(work, {}, costs(load=load), workers=workers)
    drawing, drawn, late = {}, [], []
    for event, worker in events:
        if event == "next":
            drawn += drawing.pop(worker, [])
            cached = {batch.key.checkpoint for batch in drawn[-3:]}
            if batch := planner.next(worker, cached):
                drawing[worker] = [batch]
        elif event == "upcoming":
            assert planner.upcoming(worker) in {None, *"abcdef"}
        elif event == "lose":  # what it drew is put back at once, or only later
            planner.forget(worker)
            late += drawing.pop(worker, [])
            for batch in late[1:]:
                planner.put_back(batch)
            del late[1:]
        else:
            for batch in late:
                planner.put_back(batch)
            late.clear()
        out = sum(map(len, drawing.values())) + len(late) + len(drawn)
        assert planner.done == out and planner.remaining == len(work) - out
    for batch in late:
        planner.put_back(batch)
    for worker in list(drawing):
        drawn += drawing.pop(worker)
    # One worker can always finish, whoever has reserved what.
    for worker in range(6):
        planner.forget(worker)
    drawn += drain(planner, "last")
    assert sorted(drawn) == sorted(work)
    assert planner.remaining == 0


def schedule(planner, workers, seconds):
    """List scheduling, nothing but drawing: who is free first asks first. Returns when the last one is done."""
    free, end = [(0.0, worker) for worker in range(workers)], 0.0
    while free:
        now, worker = heapq.heappop(free)
        if batch := planner.next(worker):
            end = max(end, now + seconds(batch))
            heapq.heappush(free, (now + seconds(batch), worker))
    return end


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([1, 5, 20, 150])), min_size=1, max_size=120),
    st.integers(1, 12),
)
def test_if_loading_is_free_nobody_idles_while_there_is_work(work, workers):
    # Graham: then the last one ends at most one batch after the mean.
    model = costs(load=0.0, per_batch=0.1, per_unit=0.01)
    planner = Planner([Batch(key(name, steps=steps), (i,)) for i, (name, steps) in enumerate(work)], {}, model,
                      workers=workers)  # fmt: skip
    seconds = [model.draw_seconds(Batch(key(name, steps=steps), (0,))) for name, steps in work]
    end = schedule(planner, workers, model.draw_seconds)
    assert planner.remaining == 0
    assert end <= sum(seconds) / workers + max(seconds) + 1e-9


def test_300_000_jobs_on_512_workers_are_planned_in_seconds():
    table = Synthetic().workload()
    started = time.perf_counter()
    found = make_batches(table.keys, 4)
    assert time.perf_counter() - started < 5  # 0.2 s on the machine it was written on
    planner = Planner(found, table.sizes, CostModel(), workers=512)
    chance, workers, drawn = random.Random(0), list(range(512)), 0
    while workers:
        worker = workers[chance.randrange(len(workers))]
        if planner.next(worker) is None:
            workers.remove(worker)
        else:
            drawn += 1
            planner.upcoming(worker)
    assert drawn == len(found) and planner.remaining == 0
    assert time.perf_counter() - started < 60  # likewise, 2 s
