"""`python -m rollouts.run` on toy models: what it writes, what it does not do twice, and what goes wrong."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
from PIL import Image

from rewards.unified import UnifiedMetricError
from rollouts.run import RunConfig, main
from rollouts.store import ImageStore
from rollouts.store_errors import StoreError

BRIGHTNESS = '''
"""A scorer of its own: how bright a picture is, and how often it was asked."""
from pathlib import Path
import numpy as np, torch

class Brightness:
    def __init__(self, sign, log):
        self.sign, self.log = sign, log
    def __call__(self, prompts, images):
        if self.log:
            with Path(self.log).open("a") as file:
                file.writelines(f"{prompt}\\n" for prompt in prompts)
        if any("unscorable" in prompt for prompt in prompts):
            raise ValueError("no such thing")
        return torch.tensor([self.sign * float(np.asarray(image).mean()) / 255 for image in images])
    def describe(self):
        return {"name": "brightness", "sign": self.sign}

def load(*, sign=1.0, log=None, checkpoint=None, config=None, tokenizer=None, device=None, dtype=None):
    return Brightness(sign, log)
'''
NEGATIVE = "blurry"


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """Options of a scorer that lives outside of the project."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "brightness_scorer.py").write_text(textwrap.dedent(BRIGHTNESS))
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugin"))
    yield {"name": "brightness_scorer:load", "log": str(tmp_path / "scored.log")}
    sys.modules.pop("brightness_scorer", None)


@pytest.fixture
def calls(tmp_path, toy_world):
    """Two prompts, each with a call of every toy model, a response that is no call and one nobody can draw."""
    candidates = [{"call": entry.default_call().to_dict(), "origin": "default"} for entry in toy_world.catalog.values()]
    for candidate in candidates:
        candidate["call"]["sampling steps"] = 3
    refused = [
        {"response": "{", "call": None, "error": "not_json"},
        {"call": candidates[0]["call"] | {"model": "Nobody - v1"}},
        {"call": candidates[0]["call"] | {"width": 511}},
    ]
    rows = [
        {"prompt_id": f"p{n}", "instruction": {"prompt": prompt, "negative prompt": NEGATIVE},
         "candidates": candidates + refused}
        for n, prompt in enumerate(["a red fox", "a lighthouse"])
    ]  # fmt: skip
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tmp_path, toy_world, calls):
    """Options of a run that takes a second."""
    return {
        "calls": str(calls), "catalog": str(toy_world.folder / "catalog.jsonl"), "weights": str(toy_world.folder),
        "output": str(tmp_path / "out"), "num_images": 2, "resolution_scale": 0.125, "device": "cpu",
    }  # fmt: skip


def run(options, **changes):
    return main(RunConfig(**(options | changes)))


def scored(options):
    table = datasets.Dataset.from_parquet(options["output"] + "/scored.parquet")
    return [row["candidates"] for row in table]


def test_a_rollout(options, brightness):
    summary = run(options, scorers={"bright": brightness})
    assert (summary["pictures"], summary["drawn_now"], summary["failed"]) == (24, 24, 0)
    assert summary["reasons"] == {"not_json": 2, "unknown_model": 2, "invalid_call": 2}
    assert summary["now"]["checkpoint_loads"] == 3 and summary["now"]["lora_loads"] >= 3
    for candidates in scored(options):
        for candidate in candidates[:6]:
            pictures = [np.asarray(Image.open(path)) for path in candidate["images"]]
            assert all(picture.shape == (64, 64, 3) or picture.shape == (128, 128, 3) for picture in pictures)
            assert candidate["scores"]["bright"] == pytest.approx([p.mean() / 255 for p in pictures], abs=1e-6)
            assert 0 <= candidate["reward"] <= 1 and candidate["error"] is None
        assert [candidate["error"].split(":")[0] for candidate in candidates[6:]] == [
            "not_json", "unknown_model", "invalid_call",
        ]  # fmt: skip
        assert all(candidate["reward"] is None for candidate in candidates[6:])
    assert (candidates := scored(options)[0])[0]["seeds"] == candidates[1]["seeds"]


def test_what_is_done_is_not_done_again(options, brightness, tmp_path):
    first = run(options, scorers={"bright": brightness})
    before = scored(options)
    again = run(options, scorers={"bright": brightness})
    assert first["drawn_now"] == 24 and again["drawn_now"] == 0 and again["now"]["rescored"] == 0
    assert scored(options) == before
    assert len((tmp_path / "scored.log").read_text().splitlines()) == 24
    more = run(options, scorers={"bright": brightness}, num_images=3)
    assert more["drawn_now"] == 12


def test_another_reward_uses_the_same_pictures(options, brightness, tmp_path):
    run(options)
    assert all(c["reward"] is None for c in scored(options)[0])
    summary = run(options, scorers={"bright": brightness})
    assert summary["drawn_now"] == 0 and summary["now"]["rescored"] == 24
    bright = scored(options)[0]
    summary = run(options, scorers={"bright": brightness | {"sign": -1.0}})
    assert summary["drawn_now"] == 0 and summary["now"]["rescored"] == 24
    dark = scored(options)[0]
    assert [c["scores"]["bright"] for c in dark[:6]] == [[-s for s in c["scores"]["bright"]] for c in bright[:6]]


def test_another_model_draws_only_its_own_pictures(options, toy_world, tmp_path):
    from pocket.untrained import save_lora
    from rollouts.weights import weights_sha256

    weights = tmp_path / "weights"
    shutil.copytree(toy_world.folder, weights)
    run(options, weights=str(weights))
    [lora] = [e for e in toy_world.catalog.values() if e.name == "Toy SD LoRA 0 - v1"]
    save_lora(weights / lora.files[0].uri, seed=99, format="kohya")
    rows = [json.loads(line) for line in (weights / "catalog.jsonl").read_text().splitlines()]
    for row in rows:
        if row["name"] == lora.name:
            row["files"][0] |= {"sha256": weights_sha256(weights / lora.files[0].uri), "size": None}
    (weights / "catalog.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(options, weights=str(weights), catalog=str(weights / "catalog.jsonl"))
    assert summary["drawn_now"] == 4 and summary["failed"] == 0  # 2 prompts x 2 seeds


@pytest.mark.parametrize(("keep", "kept"), [("none", 0), ("best", 4)])
def test_pictures_need_not_be_kept(options, brightness, keep, kept, tmp_path):
    options |= {"pad_batches": True}
    run(options, scorers={"bright": brightness}, output=str(tmp_path / "reference"))
    reference = scored(options | {"output": str(tmp_path / "reference")})
    summary = run(options, scorers={"bright": brightness}, keep_images=keep)
    assert summary["drawn_now"] == 24
    assert len(list((tmp_path / "out" / "store" / "images").rglob("*.png"))) == kept
    rows = scored(options)
    for row, candidates in zip(rows, reference, strict=True):
        assert [c["reward"] for c in row] == pytest.approx([c["reward"] for c in candidates])
        if keep == "best":
            best = max(range(6), key=lambda i: sum(candidates[i]["scores"]["bright"]))
            assert [any(c["images"]) for c in row[:6]] == [i == best for i in range(6)]
    costs = (tmp_path / "out" / "costs.json").read_bytes()
    assert run(options, scorers={"bright": brightness}, keep_images=keep)["drawn_now"] == 0
    assert (tmp_path / "out" / "costs.json").read_bytes() == costs
    # They come back, the same, when they are wanted.
    summary = run(options, scorers={"bright": brightness}, keep_images="all")
    assert summary["drawn_now"] == 24 - kept
    store = ImageStore(tmp_path / "out" / "store")
    old = ImageStore(tmp_path / "reference" / "store")
    for row in old.everything():
        assert np.array_equal(np.asarray(store.load(row.key)), np.asarray(old.load(row.key)))


def test_a_kill_before_the_others_are_dropped(options, brightness, tmp_path):
    """All is drawn and scored, and every picture is still there."""
    run(options, scorers={"bright": brightness})
    assert run(options, scorers={"bright": brightness}, keep_images="best")["drawn_now"] == 0
    assert len(list((tmp_path / "out" / "store" / "images").rglob("*.png"))) == 4


def test_a_metric_that_is_not_there_is_said_before_anything_is_drawn(options, brightness, tmp_path):
    with pytest.raises(UnifiedMetricError, match="Can't read"):
        run(options, scorers={"bright": brightness}, unified=str(tmp_path / "none.json"))
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_scored(options, brightness, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    rows[1]["instruction"]["prompt"] = "unscorable"
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(options, scorers={"bright": brightness}, batch_size=1)
    good, bad = scored(options)
    assert all(c["reward"] is not None for c in good[:6])
    assert all(c["reward"] is None and c["error"].startswith("no_score: bright") for c in bad[:6])
    assert all(all(c["images"]) for c in bad[:6])


def test_a_broken_model_costs_only_its_calls(options, toy_world, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(toy_world.folder, weights)
    [file] = toy_world.catalog["Toy SD LoRA 1 - v1"].files
    (weights / file.uri).unlink()
    unet = next((weights / toy_world.catalog["Toy SD 1 - v1"].files[0].uri).rglob("unet/*.safetensors"))
    unet.write_bytes(unet.read_bytes()[:-100])
    summary = run(options, weights=str(weights))
    # LoRA 1 belongs to checkpoint 1, whichever of its files is found broken first.
    broken = sum(summary["reasons"][reason] for reason in ("corrupt", "missing_file") if reason in summary["reasons"])
    assert broken == summary["failed"] == 8 and summary["drawn_now"] == 16
    # Once the files are there again, only these are drawn.
    shutil.copytree(toy_world.folder, weights, dirs_exist_ok=True)
    assert run(options, weights=str(weights), retry_failed=False)["drawn_now"] == 0
    summary = run(options, weights=str(weights))
    assert (summary["drawn_now"], summary["failed"]) == (8, 0)


def test_too_many_failures_end_with_exit_code_1(options):
    with pytest.raises(SystemExit) as caught:
        run(options, max_failed_share=0.3)  # 6 of 18 calls can't be drawn
    assert caught.value.code == 1
    assert scored(options)  # and everything is written all the same
    assert run(options, max_failed_share=0.34)["drawn_now"] == 0


def test_a_full_disk_keeps_the_scores(options, brightness, monkeypatch):
    """The file system refuses pictures, as one without room does; the index still fits."""
    from rollouts.store_files import LocalFiles

    def full(self, name, data):
        raise StoreError("disk_full", f"No room for {name}.")

    monkeypatch.setattr(LocalFiles, "write", full)
    summary = run(options, scorers={"bright": brightness})
    assert summary["pictures_not_stored"] == summary["drawn_now"] == 24
    assert all(c["reward"] is not None and c["images"] == [None, None] for c in scored(options)[0][:6])


def test_a_store_that_is_no_folder(options, brightness, tmp_path):
    """Workers write the pictures there, and the index is on a local disk."""
    where = {"store": f"memory://{tmp_path.name}", "store_index": str(tmp_path / "index.sqlite")}
    assert run(options, **where, num_images=1)["drawn_now"] == 12
    assert all(c["images"][0].startswith("memory://") for c in scored(options)[0][:6])
    again = run(options, **where, num_images=1, scorers={"bright": brightness})
    assert (again["drawn_now"], again["now"]["rescored"]) == (0, 12)


def test_a_store_of_a_newer_version(options):
    run(options, num_images=1)
    index = options["output"] + "/store/index.sqlite"
    with sqlite3.connect(index) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer"):
        run(options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep_images": "some"}, "`keep_images` must be one of all, best, none, but is 'some'"),
        ({"keep_images": "best"}, "`keep_images: best` needs `scorers`"),
        ({"num_images": 0}, "`num_images` must be at least 1"),
        ({"num_workers": 2}, "`num_workers: 2` needs `pool: ray`"),
        ({"pool": "threads"}, "`pool` must be one of"),
        ({"max_failed_share": 2.0}, "`max_failed_share` must lie"),
        ({"scorers": {"clip_score": 3}}, "`scorers`: clip_score must be a mapping"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options, wrong, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**(options | wrong))


def command(*args):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, "-m", "rollouts.run", *args], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.slow
def test_the_command(options, tmp_path):
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = command(*flags, "--report_to", "wandb")
    assert done.returncode == 0, done.stderr
    assert "24 drawn now" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "scored.parquet", "summary.json", "costs.json", "config.yaml", "store",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calls", "none.jsonl"], "error: There is no table of calls at none.jsonl"),
        (["--catalog", "none.jsonl"], "error: There is no catalogue file at none.jsonl"),
        (["--store", "s3://bucket/x"], "error: "),
        (["--store", "/dev/null/store"], "error: "),
        (["--unified", "none.json"], "error: Can't read none.json"),
    ],
)
def test_errors_of_the_command_are_one_line(options, flags, message):
    known = [text for name, value in options.items() if f"--{name}" not in flags for text in (f"--{name}", str(value))]
    done = command(*known, *flags)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(message) and "Traceback" not in done.stderr
