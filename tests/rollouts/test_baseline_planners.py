"""The table's order, which is what the planner is compared with."""

import pytest

from rollouts.baseline_planners import LruPlanner, NaivePlanner, batches_in_order
from rollouts.requests import BatchKey


def key(checkpoint, steps=20):
    return BatchKey("SD 1.5", checkpoint, "", 1.0, "Euler a", 512, 512, steps, 7.0, 1)


def test_neighbours_with_equal_keys_are_drawn_together():
    keys = [key("a"), key("b"), key("a"), key("a", steps=30), key("a"), key("b"), key("a"), key("a")]
    in_order = batches_in_order(keys, 3)
    assert [batch.jobs for batch in in_order] == [(0,), (1,), (2,), (3,), (4,), (5,), (6, 7)]
    assert [batch.jobs for batch in batches_in_order([key("a")] * 5)] == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize("kind", [NaivePlanner, LruPlanner])
def test_the_peers_keep_the_tables_order(kind):
    keys = [key("a")] * 4 + [key("b")] * 2 + [key("a")] * 2
    planner = kind(batches_in_order(keys, 2))
    assert planner.remaining == 4 and planner.upcoming(0) is None
    first = planner.next(0)
    assert first.jobs == (0, 1)
    assert planner.next(1).jobs == (4, 5)  # a call stays with its worker
    planner.forget(0)
    planner.put_back(first)
    assert [batch.jobs for batch in iter(lambda: planner.next(2), None)] == [(0, 1), (2, 3), (6, 7)]
    assert planner.remaining == 0 and planner.done == 4
