"""A rollout whose process is killed, again and again, at random moments."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from rollouts.store import ImageStore
from rollouts.store_check import check_store

# One process imports everything and forks the rollouts, so that a kill hits the work and not the imports.
DRIVER = """
    import json, os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from rollouts.run import RunConfig, main
    import rollouts.workers, rollouts.rendering, diffusers, transformers, brightness  # noqa

    options, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    from rollouts.store import ImageStore

    def start():
        child = os.fork()
        if child == 0:
            try:
                main(RunConfig(**options))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return child

    killed, done, slowest = 0, [], 2.5
    while killed < kills:
        child = start()
        time.sleep(chance.uniform(0.2, slowest))
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert status == 0, status
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        try:
            with ImageStore(options["output"] + "/store", create=False) as store:
                done.append({row.key: row.created for row in store.everything()})
        except Exception as error:
            done.append({})
    child = start()
    _, status = os.waitpid(child, 0)
    print(json.dumps({"killed": killed, "status": status, "done": done}))
"""
BRIGHTNESS = """
    import numpy as np, torch
    def load(**options):
        return lambda prompts, images: torch.tensor([float(np.asarray(image).mean()) for image in images])
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_twenty_times(tmp_path, toy_world):
    """What was stored before a kill is not drawn again after it, and in the end everything is there once."""
    (tmp_path / "brightness.py").write_text(textwrap.dedent(BRIGHTNESS))
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    entries = [e for e in toy_world.catalog.values() if e.base_model == "SD 1.5"]
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": f"a fox, {n}",
            "candidates": [{"call": e.default_call().to_dict() | {"sampling steps": 10}} for e in entries],
        }
        for n in range(200)
    ]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "calls": str(tmp_path / "calls.jsonl"), "catalog": str(toy_world.folder / "catalog.jsonl"),
        "weights": str(toy_world.folder), "output": str(tmp_path / "out"), "num_images": 2, "resolution_scale": 0.125,
        "device": "cpu", "num_threads": 1, "pad_batches": True, "scorers": {"bright": {"name": "brightness:load"}},
    }  # fmt: skip
    command = [sys.executable, str(tmp_path / "driver.py"), json.dumps(options), "20", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    total = 200 * len(entries) * 2
    assert report["killed"] == 20 and report["status"] == 0, done.stderr[-2000:]
    with ImageStore(tmp_path / "out" / "store") as store:
        final = {row.key: row for row in store.everything()}
        assert len(final) == total and all(row.uri is not None for row in final.values())
        progress = [len(before) for before in report["done"]]
        assert progress == sorted(progress) and 0 < progress[-1] < total
        for before in report["done"]:  # rows that were there stay as they are
            assert all(final[key].created == created for key, created in before.items())
        [scorer_id] = store.scorer_ids()
        scores = store.scores(final, scorer_id)
        for key in list(final)[:: total // 60]:
            assert scores[key] == pytest.approx(np.asarray(store.load(key)).mean(), abs=1e-3)
        assert scores.keys() == final.keys()
        found = check_store(store, deep=True)
        assert not (found.missing or found.corrupt or found.orphans), found
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["drawn_now"] == total - progress[-1] and summary["failed"] == 0
