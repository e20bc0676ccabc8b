"""A worker and the pool in this process: every picture once, scored, stored, and the same in any order."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from rollouts.api import APICall
from rollouts.costs import CostModel
from rollouts.planning import Planner, make_batches
from rollouts.requests import RenderRequest, RenderSettings, resolve
from rollouts.store import ImageStore
from rollouts.workers import InProcessPool, WorkerSpec, load_scorers, memory_in_use, score_pictures

SETTINGS = RenderSettings(resolution_scale=0.125, batch_size=3, pad_batches=True)
SD = ("Toy SD 0 - v1", "Toy SD LoRA 0 - v1", "Toy SD 1 - v1")


def requests_of(world, names=SD, prompts=("a red fox", "a lighthouse"), seeds=(1, 2)):
    calls = [APICall.from_dict(world.catalog[name].default_call().to_dict() | {"sampling steps": 2}) for name in names]
    return [RenderRequest(call, prompt, "blurry", seed) for call in calls for prompt in prompts for seed in seeds]


def spec_of(world, **changes):
    known = {"catalog": str(world.folder / "catalog.jsonl"), "weights": str(world.folder), "settings": SETTINGS,
             "device": "cpu"}  # fmt: skip
    return WorkerSpec(**(known | changes))


def planner_of(jobs):
    return Planner(make_batches([job.batch_key for job in jobs], SETTINGS.batch_size), {}, CostModel())


def draw(pool, world, requests):
    jobs = [resolve(request, world.catalog, SETTINGS) for request in requests]
    results = {}
    for finished in pool.run(planner_of(jobs), jobs, requests):
        for index, result in zip(finished.batch.jobs, finished.report.results, strict=True):
            assert jobs[index].key == result.key and result.key not in results
            results[result.key] = result
    return [results[job.key] for job in jobs]


@pytest.fixture(scope="module")
def pool(toy_world):
    with InProcessPool(spec_of(toy_world)) as pool:
        yield pool


def test_every_picture_once_and_the_same_in_any_order(pool, toy_world):
    requests = requests_of(toy_world)
    first = draw(pool, toy_world, requests)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = dict(zip(order, draw(pool, toy_world, [requests[i] for i in order]), strict=True))
    alone = draw(pool, toy_world, requests[5:6])[0]
    for index, result in enumerate(first):
        assert result.image is not None
        assert np.array_equal(np.asarray(result.image), np.asarray(shuffled[index].image))
    assert np.array_equal(np.asarray(alone.image), np.asarray(first[5].image))
    assert len({np.asarray(result.image).tobytes() for result in first}) == len(first)


def test_a_checkpoint_is_loaded_once_for_all_its_loras(pool, toy_world):
    requests = requests_of(toy_world)
    jobs = [resolve(request, toy_world.catalog, SETTINGS) for request in requests]
    before = pool.worker.renderer.spent
    reports = [finished.report for finished in pool.run(planner_of(jobs), jobs, requests)]
    spent = pool.worker.renderer.spent.minus(before)
    assert sum(report.spent.images for report in reports) == spent.images == len(jobs)
    assert spent.loads <= 2 and reports[-1].cached  # they may be in memory from before
    assert reports[-1].memory_bytes > 50e6


def test_pictures_are_scored_for_what_was_asked(toy_world, tmp_path, monkeypatch):
    """Not for the prompt with trigger words."""
    (tmp_path / "prompts_seen.py").write_text(
        "import torch\nSEEN = []\n"
        "class Scorer:\n"
        "    def __call__(self, prompts, images):\n"
        "        SEEN.extend(prompts)\n"
        "        return torch.arange(len(prompts)).float()\n"
        "def load(**options): return Scorer()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = spec_of(toy_world, scorers={"seen": {"name": "prompts_seen:load"}}, store=str(tmp_path / "store"))
    requests = requests_of(toy_world, names=SD[:1], seeds=(1,))
    with InProcessPool(spec) as pool:
        assert pool.describe_scorers() == {"seen": {"name": "Scorer"}}
        results = draw(pool, toy_world, requests)
        again = list(pool.score([([np.zeros((8, 8, 3), np.uint8)] * 2, ["x", "y"])]))
    import prompts_seen  # ty: ignore[unresolved-import]

    assert prompts_seen.SEEN[:2] == ["a red fox", "a lighthouse"] and again == [[{"seen": 0.0}, {"seen": 1.0}]]
    assert [result.scores for result in results] == [{"seen": 0.0}, {"seen": 1.0}]
    # The worker has written them, and says what the index needs.
    files = {path.stem: path for path in (tmp_path / "store").rglob("*.png")}
    assert all(result.image is None and result.file_bytes == files[result.key].stat().st_size for result in results)
    with ImageStore(tmp_path / "store") as store:
        assert [store.read_picture(result.key).pixels for result in results] == [result.pixels for result in results]


def test_pictures_that_are_not_kept_still_have_scores(toy_world, tmp_path):
    spec = spec_of(toy_world, store=str(tmp_path / "store"), keep_images=False)
    with InProcessPool(spec) as pool:
        [result] = draw(pool, toy_world, requests_of(toy_world, SD[:1], ("a fox",), (1,)))
    assert result.image is None and result.file_bytes is None and len(result.pixels) == 64
    assert not (tmp_path / "store").exists()


def test_a_worker_that_grows_is_set_up_anew(toy_world):
    requests = requests_of(toy_world, seeds=(1,))
    with InProcessPool(spec_of(toy_world), max_memory_gb=0.01) as pool:
        results = draw(pool, toy_world, requests)
        assert pool.events == Counter(recycled=3)  # after each of the three batches
    assert all(result.image is not None for result in results)


def test_a_score_that_fails_is_left_out():
    def picky(prompts, images):
        if "bad" in prompts:
            raise ValueError("not this one")
        return torch.ones(len(prompts))

    image = np.zeros((8, 8, 3), np.uint8)
    assert score_pictures({"picky": picky}, [image] * 3, ["good", "bad", "good"]) == [{"picky": 1}, {}, {"picky": 1}]
    assert score_pictures({}, [image], ["x"]) == [{}] and score_pictures({"picky": picky}, [], []) == []


def test_a_scorer_that_is_not_there_ends_the_run(toy_world):
    def gone(prompts, images):
        raise ConnectionError("the service is gone")

    with InProcessPool(spec_of(toy_world)) as pool:
        pool.worker.scorers = {"gone": gone}
        with pytest.raises(ConnectionError, match="the service is gone"):
            draw(pool, toy_world, requests_of(toy_world))


def test_columns_are_names_of_scorers_unless_they_say_otherwise():
    from rewards.registry import UnknownScorerError

    with pytest.raises(UnknownScorerError, match="no scorer `image_rewart`"):
        load_scorers({"image_rewart": {}})
    with pytest.raises(UnknownScorerError, match="no scorer `clip`"):
        load_scorers({"any": {"name": "clip"}})


def test_memory_in_use_grows_with_what_is_held():
    before = memory_in_use()
    held = np.ones(200_000_000, np.uint8)
    assert memory_in_use() - before > 150_000_000
    assert held[0] == 1
