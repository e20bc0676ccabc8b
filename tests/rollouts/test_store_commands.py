import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rollouts.requests import BatchKey, RenderFailure, RenderJob, RenderResult
from rollouts.store import ImageStore
from rollouts.store_check import check_store, rebuild_index
from rollouts.store_commands import ExportConfig, PruneConfig, VerifyConfig, export, prune, verify
from rollouts.store_errors import StoreError

PROMPTS = ["a cat", "test train \ud800\n../../dog", "=cmd()|'/C calc'!A0"]


def make_job(number):
    batch = BatchKey("SD 1.5", f"Model {number % 2}", "Ink" if number == 3 else "", 1.0, "Euler a", 64, 64, 20, 7.0, 1)
    return RenderJob(hashlib.sha256(str(number).encode()).hexdigest(), batch, PROMPTS[number % 3], "blurry", number)


def make_image(number, side=16):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def keys(*numbers):
    return [make_job(number).key for number in numbers]


def put(store, *numbers, failed=(), scores=True):
    rows = []
    for number in numbers:
        job = make_job(number)
        score = {"clip": number / 4} if scores else {}
        rows.append((job, {"seed": number}, RenderResult(job.key, make_image(number), seconds=1.5, scores=score)))
    for number in failed:
        job = make_job(number)
        rows.append((job, {"seed": number}, RenderResult(job.key, failure=RenderFailure("black", "all black"))))
    store.put_many(rows)


@pytest.fixture
def store(tmp_path):
    """Pictures 0 to 5, the last one dropped; 6 failed. All have scores but the failure."""
    with ImageStore(tmp_path / "store") as opened:
        put(opened, *range(6), failed=[6])
        opened.drop_images(keys(5))
        yield opened


def path_of(store, number):
    return Path(store.files.uri(f"images/{make_job(number).key[:2]}/{make_job(number).key}.png"))


def arguments(store):
    return {"store": str(store.index.parent)}


def break_things(store):
    """0 gone, 1 cut off, 2 exchanged, 3 with other pixels; 7 without a row, 8 without a row and broken; a left-over."""
    put(store, 7, 8)
    lone = {number: path_of(store, number).read_bytes() for number in (7, 8)}
    store.forget(keys(7, 8))
    path_of(store, 0).unlink()
    path_of(store, 1).write_bytes(path_of(store, 1).read_bytes()[:-300])
    path_of(store, 2).write_bytes(path_of(store, 4).read_bytes())
    store.forget(keys(3), keep_files=True)
    path_of(store, 3).unlink()
    before = path_of(store, 4).read_bytes()
    job = make_job(3)
    store.put_many([(job, {}, RenderResult(job.key, make_image(3), scores={"clip": 1.0}))])
    store._db.execute("UPDATE pictures SET pixels = ? WHERE key = ?", ("0" * 64, job.key))
    path_of(store, 7).parent.mkdir(exist_ok=True)
    path_of(store, 7).write_bytes(lone[7])
    path_of(store, 8).write_bytes(lone[8][:100])
    left = path_of(store, 4).with_name(f".{path_of(store, 4).name}.{'0' * 16}.tmp")
    left.write_bytes(before[:50])
    os.utime(left, (time.time() - 3600,) * 2)
    left.with_name(f".{path_of(store, 4).name}.{'1' * 16}.tmp").write_bytes(b"a writer is at work")
    (path_of(store, 4).parent / "notes.txt").write_text("of the user")
    return left


def test_an_intact_store_is_called_intact(store):
    report = verify(VerifyConfig(**arguments(store), deep=True))
    assert (report.drawn, report.dropped, report.failed, report.ok) == (5, 1, 1, True)
    assert report.bytes == sum(path.stat().st_size for path in (store.index.parent / "images").rglob("*.png"))


def test_verify_finds_what_is_wrong(store, caplog):
    left = break_things(store)
    shallow = check_store(store)
    assert shallow.missing == keys(0) and set(shallow.corrupt) == set(keys(1, 2))
    report = check_store(store, deep=True)
    assert report.missing == keys(0) and set(report.corrupt) == set(keys(1, 2, 3))
    assert set(report.orphans) == set(keys(7, 8))
    assert [Path(name).name for name in report.temporary] == [left.name]
    assert [Path(name).name for name in report.foreign] == ["notes.txt"]
    with pytest.raises(SystemExit) as caught, caplog.at_level("INFO"):
        verify(VerifyConfig(**arguments(store), deep=True))
    assert caught.value.code == 1
    assert "1 missing, 3 corrupt, 2 not in the index, 1 temporary files" in caplog.text


def test_repair_forgets_what_is_broken_and_takes_up_the_rest(store):
    left = break_things(store)
    assert verify(VerifyConfig(**arguments(store), deep=True, repair=True)).ok
    assert store.missing(keys(*range(9))) == keys(0, 1, 2, 8)
    for number in (3, 4, 7):
        assert np.array_equal(np.asarray(store.load(make_job(number).key)), np.asarray(make_image(number)))
    assert store.get(make_job(7).key).metadata["request"] == {"seed": 7} and store.get(make_job(7).key).seconds == 1.5
    assert store.scores(keys(*range(9)), "clip") == dict(zip(keys(4, 5), (1.0, 1.25), strict=True))
    assert not left.exists() and (path_of(store, 4).parent / "notes.txt").exists()
    assert len(list(store.index.parent.rglob("*.tmp"))) == 1 and check_store(store, deep=True).ok


def test_a_folder_without_any_picture_is_not_taken_for_a_loss(store):
    (store.index.parent / "images").rename(store.index.parent / "not mounted")
    with pytest.raises(StoreError, match="None of the 5 pictures.*is the disk mounted"):
        verify(VerifyConfig(**arguments(store), repair=True))
    (store.index.parent / "not mounted").rename(store.index.parent / "images")
    assert check_store(store, deep=True).ok and len(store.scores(keys(*range(6)), "clip")) == 6


def content(store):
    rows = [row._replace(created=0, used=0) for row in store.everything(metadata=True)]
    return sorted(rows, key=lambda row: row.key), store.scores(keys(*range(2000)), "clip")


@pytest.mark.parametrize("how", ["garbage", "empty", "gone"])
def test_a_lost_index_is_made_again_from_the_pictures(store, how):
    rows, _ = content(store)
    store.close()
    if how == "gone":
        store.index.unlink()
    else:
        store.index.write_bytes(os.urandom(5000) if how == "garbage" else b"")
    options = arguments(store)
    if how == "garbage":
        with pytest.raises(StoreError, match="verify --repair true") as caught:
            ImageStore(options["store"])
        assert caught.value.reason == "corrupt"
    with pytest.raises((SystemExit, StoreError)):
        verify(VerifyConfig(**options))
    assert verify(VerifyConfig(**options, repair=True, deep=True)).ok
    with ImageStore(options["store"]) as again:
        assert content(again)[0] == [row for row in rows if row.uri is not None]


def test_of_a_broken_index_all_that_can_be_read_is_kept(tmp_path):
    with ImageStore(tmp_path / "store") as store:
        put(store, *range(300), failed=range(300, 1200))
        store.drop_images(keys(*range(20, 300)))
        rows, scores = content(store)
    data = bytearray(store.index.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 8192] = b"\xff" * 8192
    store.index.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        verify(VerifyConfig(**arguments(store)))
    assert caught.value.code == 1
    rebuilt = rebuild_index(tmp_path / "store")
    assert rebuilt.pictures == 20 and rebuilt.unreadable == 0
    assert rebuilt.moved_to is not None and rebuilt.moved_to.read_bytes() == bytes(data)
    with ImageStore(tmp_path / "store") as again:
        kept, kept_scores = content(again)
        assert {row.key for row in kept} >= set(keys(*range(20))) and all(row in rows for row in kept)
        assert len(kept) == 20 + rebuilt.others > 800 and kept_scores.items() <= scores.items()
        assert len(kept_scores) == rebuilt.scores > 200
        assert verify(VerifyConfig(**arguments(store), deep=True)).ok


def test_repair_makes_no_store_of_a_wrong_path(store, tmp_path):
    with pytest.raises(StoreError, match="There is no image store"):
        verify(VerifyConfig(store=str(tmp_path / "typo"), repair=True))
    assert not (tmp_path / "typo").exists()
    store.close()
    store.index.unlink()
    with closing(sqlite3.connect(store.index)) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    before = store.index.read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        verify(VerifyConfig(**arguments(store), repair=True))
    assert store.index.read_bytes() == before


def test_an_intact_index_that_is_made_again_is_the_same(store):
    before = content(store)
    store.close()
    rebuild_index(store.index.parent)
    with ImageStore(store.index.parent) as again:
        assert content(again) == before


def load(folder, tmp_path):
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_an_export_is_a_data_set(store, tmp_path, format):
    store.put_scores([(make_job(0).key, "hps v2/x", None)])
    assert export(ExportConfig(**arguments(store), output=str(tmp_path / "out"), format=format)) == 5
    table = load(tmp_path / "out", tmp_path)
    by_key = {row["key"]: row for row in table}
    assert set(by_key) == set(keys(*range(5)))
    for number in range(5):
        row = by_key[make_job(number).key]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(make_image(number)))
        assert (
            row["prompt"] == PROMPTS[number % 3].replace("\ud800", "?") and row["checkpoint"] == f"Model {number % 2}"
        )
        assert row["score_clip"] == number / 4 and row["score_hps v2/x"] is None
        assert json.loads(row["request"]) == {"seed": number}
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert names == sorted(f"images/{key[:2]}/{key}.png" for key in by_key)


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        ({"model": "model 1"}, [1, 3]), ({"model": "ink"}, [3]), ({"prompt": "DOG"}, [1, 4]), ({"prompt": "zebra"}, []),
        ({"model": "model 1", "prompt": "cat"}, [3]), ({"status": "failed"}, [6]), ({"status": "dropped"}, [5]),
        ({"status": "all"}, range(7)), ({"status": "all", "model": "model 0"}, [0, 2, 4, 6]),
    ],
)  # fmt: skip
def test_an_export_has_what_was_chosen(store, tmp_path, selection, numbers):
    export(ExportConfig(**arguments(store), output=str(tmp_path / "out"), **selection))
    rows = pq.read_table(tmp_path / "out" / "metadata.parquet").to_pylist()
    assert {row["key"] for row in rows} == set(keys(*numbers))
    for row in rows:
        assert (row["file_name"] is not None) == (row["status"] == "ok")
        assert (row["reason"], row["message"]) == (
            ("black", "all black") if row["status"] == "failed" else (None, None)
        )
    if selection == {"status": "all"}:
        table = load(tmp_path / "out", tmp_path)
        assert [image is None for image in table["image"]] == [status != "ok" for status in table["status"]]


def test_prune_by_age_and_bytes_takes_the_least_recently_used(store):
    for number in range(5):
        age = (10 - number) * 86_400
        store._db.execute("UPDATE pictures SET used = ? WHERE key = ?", (time.time() - age, make_job(number).key))
    sizes = [store.get(key).bytes for key in keys(*range(5))]
    done = prune(PruneConfig(**arguments(store), unused_days=8.5, dry_run=True))
    assert done == {"pictures": 2, "bytes": sum(sizes[:2]), "failures": 0}
    assert all(path_of(store, number).exists() for number in range(5))
    assert prune(PruneConfig(**arguments(store), unused_days=8.5)) == done
    assert [path_of(store, number).exists() for number in range(5)] == [False] * 2 + [True] * 3
    done = prune(PruneConfig(**arguments(store), max_bytes=sum(sizes[3:])))
    assert done == {"pictures": 1, "bytes": sizes[2], "failures": 0}
    assert prune(PruneConfig(**arguments(store), max_bytes=sum(sizes[3:])))["pictures"] == 0
    assert prune(PruneConfig(**arguments(store), max_bytes=sum(sizes[3:]) - 1))["pictures"] == 1
    assert len(store.scores(keys(*range(6)), "clip")) == 6 and store.missing(keys(*range(6))) == []
    assert check_store(store, deep=True).ok


def test_prune_forgets_failures(store):
    assert prune(PruneConfig(**arguments(store), failed=True)) == {"pictures": 0, "bytes": 0, "failures": 1}
    assert store.missing(keys(*range(7))) == keys(6)


def write_scored(path, uris):
    candidates = [[{"response": "{}", "images": [uri, None], "scores": {"clip": [0.5, None]}}] for uri in uris]
    pq.write_table(pa.table({"prompt_id": [str(i) for i in range(len(uris))], "candidates": candidates}), path)


def test_prune_keeps_what_a_table_refers_to(store, tmp_path, caplog):
    scored = tmp_path / "scored.parquet"
    write_scored(scored, [store.get(key).uri for key in keys(1, 4)])
    assert prune(PruneConfig(**arguments(store), keep_referenced_by=str(scored), unused_days=1))["pictures"] == 0
    assert prune(PruneConfig(**arguments(store), keep_referenced_by=str(scored)))["pictures"] == 3
    assert [path_of(store, number).exists() for number in range(5)] == [False, True, False, False, True]
    assert prune(PruneConfig(**arguments(store), keep_referenced_by=str(scored), max_bytes=0))["pictures"] == 0
    assert "More than `max_bytes` is left" in caplog.text
    write_scored(scored, ["other/" + "0" * 64 + ".png"])
    with pytest.raises(StoreError, match="names no picture of this store"):
        prune(PruneConfig(**arguments(store), keep_referenced_by=str(scored)))
    scored.write_text("no table")
    with pytest.raises(StoreError, match="can't read .*scored.parquet"):
        prune(PruneConfig(**arguments(store), keep_referenced_by=str(scored)))
    assert path_of(store, 1).exists()


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"max_bytes": -1}, {"unused_days": -0.5}])
def test_prune_without_a_rule_is_refused(options):
    with pytest.raises(ValueError, match="Say what to prune|must be at least 0"):
        PruneConfig(store="x", **options)


def command(*words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "rollouts.store", *words], capture_output=True, text=True, env=environment
    )


def test_the_command_line(store, tmp_path):
    where = str(store.index.parent)
    result = command("verify", "--store", where, "--deep", "true")
    assert result.returncode == 0 and "5 pictures" in result.stderr
    path_of(store, 0).unlink()
    assert command("verify", "--store", where).returncode == 1
    result = command("verify", "--store", str(tmp_path / "typo"))
    assert result.returncode == 2 and result.stderr.startswith("error: There is no image store")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "typo").exists()


@pytest.mark.parametrize("words", [[], ["prunes"], ["--store", "x"]])
def test_an_unknown_word_is_one_line(words):
    result = command(*words)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "verify, export, prune" in result.stderr


def test_help():
    assert "python -m rollouts.store verify" in command("--help").stdout
    result = command("prune", "--help")
    assert (
        result.returncode == 0 and "--keep_referenced_by" in result.stdout and "prune" in result.stdout.split("\n")[0]
    )
