"""Ray workers: the same pictures as in one process, each once, whoever dies meanwhile."""

import os
import signal
from collections import Counter

import numpy as np
import psutil
import pytest

from rollouts.api import APICall
from rollouts.costs import CostModel
from rollouts.planning import Planner, make_batches
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.workers import InProcessPool, PoolError, WorkerSpec

ray = pytest.importorskip("ray", reason="Ray is not installed")
from rollouts import ray_pool  # noqa: E402
from rollouts.ray_pool import RayOptions, RayPool  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = RenderSettings(resolution_scale=0.125, batch_size=2, pad_batches=True)
SCORER = """
import os
import numpy as np, torch

class Scorer:
    def __call__(self, prompts, images):
        if "deadly" in prompts:
            os._exit(1)
        if "hopeless" in prompts:
            raise ConnectionError("the service is gone")
        return torch.tensor([float(np.asarray(image).mean()) for image in images])

def load(**options):
    return Scorer()
"""


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Workers find the scorer, and Ray stays on this machine."""
    plugin = tmp_path_factory.mktemp("plugin")
    (plugin / "mean_scorer.py").write_text(SCORER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(plugin))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.syspath_prepend(plugin)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def requests(toy_world):
    """96 pictures of three models."""
    calls = [
        APICall.from_dict(toy_world.catalog[name].default_call().to_dict() | {"sampling steps": 4})
        for name in ("Toy SD 0 - v1", "Toy SD LoRA 0 - v1", "Toy SD 1 - v1")
    ]
    return [RenderRequest(call, f"a fox, {n}", "blurry", seed) for call in calls for n in range(8) for seed in range(4)]


@pytest.fixture(scope="module")
def expected(toy_world, requests):
    """The pictures and scores as one process makes them."""
    with InProcessPool(spec_of(toy_world)) as pool:
        return {key: (result.image, result.scores) for key, result in run(pool, toy_world, requests).items()}


def spec_of(world, **changes):
    known = {"catalog": str(world.folder / "catalog.jsonl"), "weights": str(world.folder), "settings": SETTINGS,
             "device": "cpu", "num_threads": 1, "scorers": {"mean": {"name": "mean_scorer:load"}}}  # fmt: skip
    return WorkerSpec(**(known | changes))


def run(pool, world, requests, each=lambda count: None):
    """Results by key, of which each arrives once; `each` is called with the number of finished batches."""
    jobs = [resolve(request, world.catalog, SETTINGS) for request in requests]
    batches = make_batches([job.batch_key for job in jobs], SETTINGS.batch_size)
    results = {}
    for count, finished in enumerate(pool.run(Planner(batches, {}, CostModel(), workers=2), jobs, requests)):
        for index, result in zip(finished.batch.jobs, finished.report.results, strict=True):
            assert jobs[index].key == result.key and result.key not in results
            results[result.key] = result
        each(count)
    assert results.keys() == {job.key for job in jobs}
    return results


def assert_same(results, expected):
    for key, result in results.items():
        image, scores = expected[key]
        assert np.array_equal(np.asarray(result.image), np.asarray(image)) and result.scores == scores


def test_workers_that_are_killed(toy_world, requests, expected):
    with RayPool(spec_of(toy_world), RayOptions(num_workers=2)) as pool:
        assert pool.describe_scorers() == {"mean": {"name": "Scorer"}}
        killed = []

        def kill(count):
            if count in (2, 8, 14):
                worker = sorted(pool.pids)[count % len(pool.pids)]
                killed.append(pool.pids[worker])
                os.kill(killed[-1], signal.SIGKILL)

        assert_same(run(pool, toy_world, requests, kill), expected)
        assert len(set(killed)) == 3 and pool.events["lost"] == 3 and pool.events["retried"] >= 1
        assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in killed)
        # The pool is as good as new.
        pool.events.clear()
        assert_same(run(pool, toy_world, requests), expected)
        assert pool.events == Counter()
        images = [np.full((8, 8, 3), value, np.uint8) for value in (3, 9, 5)]
        assert list(pool.score([(images[:2], ["x", "y"]), (images[2:], ["z"])])) == [
            [{"mean": 3.0}, {"mean": 9.0}], [{"mean": 5.0}],
        ]  # fmt: skip
        with pytest.raises(ConnectionError, match="the service is gone"):
            list(pool.score([(images[:1], ["hopeless"])]))


def test_a_picture_that_kills_its_workers_is_recorded(toy_world, requests, expected):
    deadly = RenderRequest(requests[0].call, "deadly", "", 1)
    with RayPool(spec_of(toy_world), RayOptions(num_workers=2)) as pool:
        results = run(pool, toy_world, [*requests[:7], deadly])
    failed = [result for result in results.values() if result.failure is not None]
    [failure] = [result.failure for result in failed]
    assert failure is not None and failure.reason == "worker_lost"
    assert pool.events["lost"] == ray_pool.MAX_ATTEMPTS
    assert_same({key: result for key, result in results.items() if result.failure is None}, expected)


def test_scoring_elsewhere_and_workers_that_grow(toy_world, requests, expected):
    options = RayOptions(num_workers=1, num_scoring_workers=1, max_memory_gb=0.1)
    with RayPool(spec_of(toy_world), options) as pool:
        assert_same(run(pool, toy_world, requests[:8]), expected)
        assert pool.events["recycled"] >= 1 and pool.events["lost"] == 0


def test_what_is_wrong_with_a_worker_is_said_at_once(toy_world, requests):
    spec = spec_of(toy_world, scorers={"none": {"name": "image_rewart"}})
    with (
        RayPool(spec, RayOptions(num_workers=1)) as pool,
        pytest.raises(ValueError, match="no scorer `image_rewart`"),
    ):
        pool.describe_scorers()


def test_a_cluster_without_room(toy_world, requests):
    options = RayOptions(num_workers=1, num_gpus=1, start_timeout=3)
    with RayPool(spec_of(toy_world), options) as pool, pytest.raises(PoolError, match="needs 1 GPUs and 1 CPUs"):
        run(pool, toy_world, requests[:1])


def test_a_cluster_that_is_not_there(toy_world):
    ray.shutdown()
    with pytest.raises(PoolError, match="no cluster at 127.0.0.1:1"):
        RayPool(spec_of(toy_world), RayOptions(address="127.0.0.1:1"))


def test_a_machine_is_lost(toy_world, requests, expected):
    """A cluster of a head without workers and three machines, one of which dies in the middle."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
    }
    small = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health, **small},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(3)]
        with RayPool(spec_of(toy_world), RayOptions(num_workers=2, address=cluster.address)) as pool:
            removed = []

            def remove(count):
                if count == 4:
                    used = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
                    busy = [node for node in nodes if node.node_id in used and _pids(node) & set(pool.pids.values())]
                    removed.append(busy[0])
                    cluster.remove_node(busy[0], allow_graceful=False)

            assert_same(run(pool, toy_world, requests, remove), expected)
            assert len(removed) == 1 and pool.events["lost"] == 1
    finally:
        ray.shutdown()
        cluster.shutdown()


def _pids(node):
    """Processes that a node's raylet has started."""
    raylet = node.all_processes["raylet"][0].process
    return {child.pid for child in psutil.Process(raylet.pid).children(recursive=True)}
