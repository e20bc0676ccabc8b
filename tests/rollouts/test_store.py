import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rollouts import requests, store_check, store_index
from rollouts.api import APICall
from rollouts.picture_writer import request_to_dict
from rollouts.requests import BatchKey, RenderFailure, RenderJob, RenderRequest, RenderResult
from rollouts.store import TRANSIENT, ImageStore, request_from_dict
from rollouts.store_check import check_store, repair_store
from rollouts.store_errors import StoreError

FORK = multiprocessing.get_context("fork")
CALL = APICall.from_dict(
    {"model": "Pixel Wave - v10", "type": "Checkpoint", "base Model": "SD 1.5", "width": 512, "height": 512,
     "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7, "model description": "Pixels."}
)  # fmt: skip


def make_job(number, prompt="a cat"):
    batch = BatchKey("SD 1.5", "Pixel Wave - v10", "", 1.0, "Euler a", 512, 512, 20, 7.0, 1)
    return RenderJob(hashlib.sha256(str(number).encode()).hexdigest(), batch, prompt, "blurry", number)


def make_image(number, side=16):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def drawn(number, side=16, prompt="a cat", scores=None, image=None):
    job = make_job(number, prompt)
    request = request_to_dict(RenderRequest(CALL, prompt, "blurry", number))
    image = make_image(number, side) if image is None else image
    return job, request, RenderResult(job.key, image, seconds=0.5, scores=scores or {})


def failed(number, reason="error", message="why"):
    job, request, _ = drawn(number)
    return job, request, RenderResult(job.key, failure=RenderFailure(reason, message))


def keys(*numbers):
    return [make_job(number).key for number in numbers]


def is_picture(image, number, side=16):
    return np.array_equal(np.asarray(image), np.asarray(make_image(number, side)))


@pytest.fixture(scope="module")
def s3_server():
    """A real S3 server on 127.0.0.1; yields its address."""
    pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
    server_module = pytest.importorskip("moto.server", reason="the S3 server needs the package moto[server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """URL of a new, empty bucket."""
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{random.getrandbits(40):x}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """Arguments of ImageStore for an empty store."""
    if request.param == "local":
        return {"path": tmp_path / "store"}
    if request.param == "memory":
        return {"path": f"memory://{tmp_path.name}/store", "index": tmp_path / "index.sqlite"}
    return {"path": f"{request.getfixturevalue('s3')}/some/store", "index": tmp_path / "index.sqlite"}


@pytest.fixture
def store(place):
    with ImageStore(**place) as opened:
        yield opened


@pytest.fixture
def local(tmp_path):
    with ImageStore(tmp_path / "store") as opened:
        yield opened


# What comes back


def test_what_was_put_comes_back_also_after_reopening(place, store):
    store.put_many([drawn(1, scores={"clip": 0.25}), drawn(2), failed(3, "black", "all black")])
    store.close()
    with ImageStore(**place) as again:
        assert len(again) == 3
        for number in (1, 2):
            assert is_picture(again.load(make_job(number).key), number)
        one, three = again.get(make_job(1).key), again.get(make_job(3).key)
        assert (one.status, one.failure, one.seconds) == ("ok", None, 0.5)
        assert one.uri.endswith(f"store/images/{one.key[:2]}/{one.key}.png")
        assert abs(one.created - time.time()) < 60
        assert (three.status, three.failure, three.uri) == ("failed", ("black", "all black"), None)
        assert again.get("0" * 64) is None
        assert again.scores(keys(1, 2, 3), "clip") == {make_job(1).key: 0.25}
        assert check_store(again, deep=True).ok


def test_metadata_is_enough_to_draw_again(store):
    prompt = "a\ncat \ud800 'quoted' \0 -- ; DROP TABLE pictures"
    store.put_many([drawn(5, prompt=prompt)])
    found = store.get(make_job(5).key).metadata
    assert request_from_dict(found["request"]) == RenderRequest(CALL, prompt, "blurry", 5)
    job = make_job(5, prompt)
    assert RenderJob(job.key, BatchKey(**found["job"].pop("batch_key")), **found["job"]) == job


def test_a_message_may_hold_any_text(local):
    local.put_many([failed(1, message="half \ud800 \0 '")])
    assert local.get(make_job(1).key).failure.message == "half ? \0 '"


def test_pictures_that_fsspec_reads_elsewhere(place, store):
    import fsspec

    store.put_many([drawn(1)])
    with fsspec.open(store.get(make_job(1).key).uri, "rb") as file:
        assert is_picture(Image.open(file), 1)


def test_missing_is_the_difference_of_sets(local, monkeypatch):
    monkeypatch.setattr("rollouts.store._CHUNK", 7)
    local.put_many([drawn(n) if n % 3 else failed(n) for n in range(0, 60, 2)])
    asked = [*keys(*range(60)), *keys(5, 6, 7)]
    expected = keys(*range(1, 60, 2))
    assert local.missing(asked) == expected
    assert set(local.get_many(asked)) == set(keys(*range(0, 60, 2)))
    assert local.missing([]) == []


def test_many_keys_are_looked_up_at_once(local):
    with store_index.transaction(local._db):
        store_index.insert_rows(
            local._db, (store_index.IndexRow(key, None, 1, "", 0.0, {}, {}) for key in keys(*range(30_000)))
        )
    statements = []
    local._db.set_trace_callback(statements.append)
    assert len(local.missing(keys(*range(60_000)))) == 30_000
    assert len(local.get_many(keys(*range(20_000, 60_000)), metadata=False)) == 10_000
    assert len(statements) <= 4


# What replaces what


def test_the_first_picture_stays(store):
    store.put_many([drawn(1)])
    before = store.get(make_job(1).key)
    store.put_many([drawn(1, image=make_image(99)), failed(1)])
    assert store.get(make_job(1).key) == before and is_picture(store.load(make_job(1).key), 1)


def test_a_picture_replaces_a_failure_and_a_failure_a_failure(store):
    store.put_many([failed(1), failed(2, "error")])
    store.put_many([drawn(1), failed(2, "out_of_memory", "later")])
    assert is_picture(store.load(make_job(1).key), 1)
    assert store.get(make_job(2).key).failure == ("out_of_memory", "later")


def test_failures_that_may_go_away_are_tried_again_if_asked(local):
    lasting = {"no_file", "pickle", "invalid_call", "unknown_model", "unknown_sampler", "wrong_architecture",
               "not_finite", "black"}  # fmt: skip
    assert lasting | set(TRANSIENT) == set(requests.REASONS) and not lasting & set(TRANSIENT)
    local.put_many([failed(i, reason) for i, reason in enumerate(requests.REASONS)])
    every = keys(*range(len(requests.REASONS)))
    assert local.missing(every) == []
    again = local.missing([*every, *keys(1000)], retry_failed=True)
    assert again == [*(key for key, r in zip(every, requests.REASONS, strict=True) if r in TRANSIENT), *keys(1000)]


def test_dropped_pictures_keep_their_scores_and_come_back(store):
    store.put_many([drawn(1, scores={"clip": 0.5}), drawn(2)])
    size = store.get(make_job(1).key).bytes
    assert store.drop_images([*keys(1), "0" * 64]) == size > 0
    row = store.get(make_job(1).key)
    assert (row.status, row.uri, row.bytes) == ("ok", None, 0) and row.metadata["job"]["seed"] == 1
    assert store.scores(keys(1, 2), "clip") == {make_job(1).key: 0.5}
    assert store.missing(keys(1, 2)) == [] and store.missing(keys(1, 2), need_images=True) == keys(1)
    with pytest.raises(StoreError, match="was dropped; draw it again") as caught:
        store.load(make_job(1).key)
    assert caught.value.reason == "not_stored"
    assert check_store(store, deep=True).ok
    pixels = row.pixels
    store.put_many([drawn(1)])
    assert is_picture(store.load(make_job(1).key), 1) and store.get(make_job(1).key).pixels == pixels
    assert store.scores(keys(1), "clip") == {make_job(1).key: 0.5}


def test_pictures_need_not_be_kept_at_all(store):
    store.put_many([drawn(1, scores={"clip": 0.5}), failed(2)], keep_images=False)
    assert store.get(make_job(1).key).uri is None and store.files.sizes() == {}
    assert store.scores(keys(1, 2), "clip") == {make_job(1).key: 0.5} and store.missing(keys(1, 2)) == []


def test_forgotten_keys_are_missing_again(store):
    store.put_many([drawn(1, scores={"clip": 0.5}), drawn(2), failed(3)])
    assert store.forget(keys(1, 3)) > 0
    assert store.missing(keys(1, 2, 3)) == keys(1, 3) and list(store.files.sizes()) != []
    store.put_many([drawn(4), drawn(5)])  # row ids of the forgotten ones are given away again
    assert store.scores(keys(1, 2, 3, 4, 5), "clip") == {} and len(store.files.sizes()) == 3


def test_scores_are_by_scorer_and_the_last_one_counts(local):
    local.put_many([drawn(1), drawn(2), drawn(3)])
    one, two, three = keys(1, 2, 3)
    local.put_scores([(one, "clip:a", 0.1), (two, "clip:a", float("nan")), (one, "clip:b", -3.0)])
    local.put_scores([(one, "clip:a", 0.2), (three, "clip:a", None)])
    assert local.scores([one, two, three], "clip:a") == {one: 0.2, two: None, three: None}
    assert local.scores([one, two], "clip:b") == {one: -3.0}
    assert local.scores([one], "nobody") == {} and local.scorer_ids() == ["clip:a", "clip:b"]
    with pytest.raises(StoreError, match="which is not in the store") as caught:
        local.put_scores([(two, "clip:b", 1.0), ("f" * 64, "clip:b", 1.0)])
    assert caught.value.reason == "not_stored" and local.scores([two], "clip:b") == {}


def test_asking_marks_as_used(local):
    local.put_many([drawn(1), drawn(2)])
    local._db.execute("UPDATE pictures SET used = 1000")
    local.missing(keys(1, 3))
    assert abs(local.get(make_job(1).key).used - time.time()) < 60
    assert local.get(make_job(2).key).used == 1000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((make_job(1)._replace(key="../../etc"), {}, RenderResult("../../etc", make_image(1))), "64 hexadecimal"),
        ((make_job(1), {}, RenderResult("0" * 64, make_image(1))), "can't be stored for the job"),
        ((make_job(1), {}, RenderResult(make_job(1).key)), "a picture or a failure"),
    ],
)
def test_results_that_are_none_are_refused_and_nothing_is_stored(local, row, message):
    with pytest.raises(ValueError, match=message):
        local.put_many([drawn(2), row])
    assert len(local) == 0 and local.files.sizes() == {}


# Broken files


def test_a_file_that_is_gone_or_broken_is_an_error_with_a_way_out(store):
    store.put_many([drawn(1), drawn(2), drawn(3)])
    names = [f"images/{key[:2]}/{key}.png" for key in keys(1, 2, 3)]
    other = store.files.read(names[2])
    store.files.write(names[0], other)
    store.files.write(names[1], store.files.read(names[1])[:300])
    store.files.delete([names[2], names[2]])
    for number, reason, message in ((1, "corrupt_file", "is the picture"), (2, "corrupt_file", "no intact PNG"),
                                    (3, "missing_file", "verify --deep")):  # fmt: skip
        with pytest.raises(StoreError, match=message) as caught:
            store.load(make_job(number).key)
        assert caught.value.reason == reason
    with pytest.raises(StoreError, match="draw it first"):
        store.load("0" * 64)
    assert repair_store(store, check_store(store, deep=True)).ok and store.files.sizes() == {}
    assert store.missing(keys(1, 2, 3)) == keys(1, 2, 3)


# Kills and several processes


def put_for_ever(path, start, done):
    with ImageStore(path) as store:
        for number in range(start, start + 10_000, 3):
            store.put_many([drawn(n, side=64, scores={"clip": n / 8}) for n in range(number, number + 3)])
            os.write(done, b"%d " % number)


def test_kills_lose_nothing_that_was_put(tmp_path, monkeypatch):
    monkeypatch.setattr(store_check, "TEMPORARY_AGE", 0)  # nobody else is writing
    chance, scored, orphans = random.Random(0), set(), set()
    for start in range(0, 120_000, 10_000):
        receive, send = os.pipe()
        process = FORK.Process(target=put_for_ever, args=(tmp_path / "store", start, send))
        process.start()
        os.close(send)
        said = os.read(receive, 10)  # it is at work
        time.sleep(chance.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with os.fdopen(receive, "rb") as rest:
            said += rest.read()
        scored |= {n + i for n in map(int, said.split()) for i in range(3)}
        with ImageStore(tmp_path / "store") as store:
            rows = {row.key: row.metadata["job"]["seed"] for row in store.everything(metadata=True)}
            scored |= {n for n in range(max(scored) + 1, max(scored) + 4) if make_job(n).key in rows}  # put, not said
            assert set(rows) == set(keys(*scored, *orphans))
            assert set(store.scores(rows, "clip")) == set(keys(*scored))
            for key in rows if len(rows) < 50 else chance.sample(sorted(rows), 50):
                assert is_picture(store.load(key), rows[key], side=64)
            report = check_store(store, deep=True)
            assert not report.missing and not report.corrupt
            assert repair_store(store, report).ok
            orphans |= {store.get(key).metadata["job"]["seed"] for key in report.orphans}
    assert len(scored) >= 36
    assert not list((tmp_path / "store").rglob("*.tmp"))


def put_some(path, numbers, barrier):
    barrier.wait()
    with ImageStore(path) as store:
        for number in numbers:
            store.put_many([drawn(number, scores={"clip": float(number)}), drawn(number + 1)])


def test_processes_write_at_once_and_a_reader_sees_whole_rows(tmp_path):
    barrier = FORK.Barrier(4)
    ranges = [range(0, 40), range(20, 60), range(40, 80)]
    processes = [FORK.Process(target=put_some, args=(tmp_path / "store", r, barrier)) for r in ranges]
    for process in processes:
        process.start()
    barrier.wait()
    with ImageStore(tmp_path / "store") as store:
        while any(process.is_alive() for process in processes):
            for row in store.get_many(keys(*random.sample(range(81), 10))).values():
                assert row.metadata["job"]["seed"] is not None
                store.load(row.key)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert store.missing(keys(*range(82))) == keys(81)
        assert store.scores(keys(*range(81)), "clip") == {make_job(n).key: float(n) for n in range(80)}
        assert check_store(store, deep=True).ok


def test_threads_share_a_store(local):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: local.put_many([drawn(n), drawn(n + 1, scores={"clip": float(n)})]), range(0, 80, 2)))
        assert all(pool.map(lambda n: is_picture(local.load(make_job(n).key), n), range(80)))
    assert len(local) == 80 and len(local.scores(keys(*range(80)), "clip")) == 40 and check_store(local, deep=True).ok


def test_a_locked_index_is_waited_for_then_an_error(tmp_path):
    with ImageStore(tmp_path, busy_seconds=0.1) as store:
        store.put_many([drawn(1)])
        with closing(sqlite3.connect(store.index, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="another process is writing") as caught:
                store.put_many([drawn(2)])
            assert caught.value.reason == "locked"
            assert is_picture(store.load(make_job(1).key), 1) and store.missing(keys(2)) == keys(2)
            other.execute("ROLLBACK")
        store.put_many([drawn(2)])
        assert len(store) == 2


# Versions


def test_a_store_of_a_newer_version_is_left_alone(tmp_path):
    ImageStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as db:
        db.execute("PRAGMA user_version = 7")
    before = (tmp_path / "index.sqlite").read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreError, match="version 7.*versions up to 1.*install") as caught:
            ImageStore(tmp_path, read_only=read_only)
        assert caught.value.reason == "newer_version"
    assert (tmp_path / "index.sqlite").read_bytes() == before


def test_an_older_store_is_brought_up_to_date_or_left_as_it_was(tmp_path, monkeypatch):
    with ImageStore(tmp_path) as store:
        store.put_many([drawn(1)])

    def fails(db):
        db.execute("ALTER TABLE pictures ADD COLUMN half INTEGER")
        raise sqlite3.DatabaseError("migration")

    def works(db):
        db.execute("ALTER TABLE pictures ADD COLUMN colour TEXT DEFAULT 'blue'")

    monkeypatch.setattr(store_index, "MIGRATIONS", [*store_index.MIGRATIONS, fails])
    with pytest.raises(sqlite3.DatabaseError, match="migration"):
        ImageStore(tmp_path)
    with pytest.raises(StoreError, match="open it once where it can be written to"):
        ImageStore(tmp_path, read_only=True)
    monkeypatch.setattr(store_index, "MIGRATIONS", [*store_index.MIGRATIONS[:1], works])
    with ImageStore(tmp_path) as store:
        assert is_picture(store.load(make_job(1).key), 1)
        assert [row[1] for row in store._db.execute("PRAGMA table_info(pictures)")][-1] == "colour"
        assert store._db.execute("SELECT colour FROM pictures").fetchall() == [("blue",)]
        assert store._db.execute("PRAGMA user_version").fetchone() == (2,)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="version 2"):
        ImageStore(tmp_path)


# Where it can't be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "s3://bucket/x"}, "`index` is needed.*name a file on a local disk"),
        ({"path": "s3://bucket/x", "index": "s3://bucket/index"}, "`index` must be a file on a local disk"),
        ({"path": "nosuch://x", "index": "i"}, "nosuch"),
        ({"path": "{tmp}/nothing", "create": False}, "There is no image store"),
        ({"path": "{tmp}/nothing", "read_only": True}, "There is no image store"),
        ({"path": "{tmp}/file/store"}, "choose another place"),
        ({"path": "{tmp}/file"}, "choose another place"),
        ({"path": "{tmp}", "index": "{tmp}"}, "choose another place"),
    ],
)
def test_places_that_can_be_no_store(tmp_path, arguments, message):
    (tmp_path / "file").write_text("x")
    arguments = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(StoreError, match=message):
        ImageStore(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bucket_that_does_not_exist(s3, tmp_path):
    with ImageStore("s3://not-there-at-all/x", index=tmp_path / "index.sqlite") as store:
        with pytest.raises(StoreError, match="not-there-at-all") as caught:
            store.put_many([drawn(1)])
        assert caught.value.reason == "io" and len(store) == 0


def test_a_database_of_another_program_is_not_touched(tmp_path):
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    before = (tmp_path / "index.sqlite").read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        ImageStore(tmp_path)
    assert (tmp_path / "index.sqlite").read_bytes() == before


def test_what_others_write_to_a_bucket_is_seen(s3, tmp_path):
    import boto3

    with ImageStore(s3, index=tmp_path / "index.sqlite") as store:
        store.put_many([drawn(1)])
        (name,) = store.files.sizes()
        data = store.files.read(name)
        other = name.replace(make_job(1).key, make_job(1).key[:2] + "0" * 62)
        boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key=other, Body=data)
        assert store.files.sizes() == {name: len(data), other: len(data)}
        assert check_store(store).orphans == [Path(other).stem]


@contextmanager
def ordinary_user():
    """Permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_can_be_read_and_says_so_when_written():
    folder = Path(tempfile.mkdtemp(prefix="t2i_store_"))  # pytest's own are closed to other users
    try:
        with ImageStore(folder) as store:
            store.put_many([drawn(1)])
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with ordinary_user():
            with pytest.raises(StoreError, match="writable") as caught:
                ImageStore(folder)
            assert caught.value.reason == "read_only"
            with ImageStore(folder, read_only=True) as store:
                assert is_picture(store.load(make_job(1).key), 1) and store.missing(keys(1, 2)) == keys(2)
                assert check_store(store, deep=True).ok
                for write in (lambda: store.put_many([drawn(2)]), lambda: store.put_scores([]),
                              lambda: store.drop_images(keys(1))):  # fmt: skip
                    with pytest.raises(StoreError, match="opened with `read_only`"):
                        write()
            with pytest.raises(StoreError, match="permission") as caught:
                ImageStore(folder / "below")
            assert caught.value.reason == "read_only"
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def put_with_limit(path, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    with ImageStore(path) as store:
        try:
            store.put_many([drawn(2), drawn(3, side=512)])
        except StoreError as error:
            answers.put((error.reason, str(error), len(store), is_picture(store.load(make_job(1).key), 1)))


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    with ImageStore(tmp_path) as store:
        store.put_many([drawn(1)])
    answers = FORK.Queue()
    process = FORK.Process(target=put_with_limit, args=(tmp_path, answers))
    process.start()
    reason, message, rows, intact = answers.get(timeout=30)
    process.join()
    assert (reason, rows, intact) == ("disk_full", 1, True) and "ulimit -f" in message
    with ImageStore(tmp_path) as store:
        assert not list(tmp_path.rglob("*.tmp")) and set(store.get_many(keys(1, 2, 3))) == set(keys(1))
        for name in store.files.sizes():
            assert store.read_picture(Path(name).stem).size > 0  # no half of a picture
        store.put_many([drawn(2), drawn(3, side=512)])
        assert check_store(store, deep=True).ok and is_picture(store.load(make_job(3).key), 3, side=512)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("side", [16, 200], ids=["the index fills it", "pictures fill it"])
def test_a_full_disk_loses_nothing(small_disk, side):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    stored = 0
    with ImageStore(small_disk / "store") as store:
        with pytest.raises(StoreError) as caught:
            for stored in range(10_000):
                store.put_many([drawn(stored, side)])
        assert caught.value.reason in ("disk_full", "io") and "full" in str(caught.value)
        assert len(store) == stored > 2
        for number in (0, stored - 1):
            assert is_picture(store.load(make_job(number).key), number, side)
        with pytest.raises(StoreError):
            store.put_many([drawn(n, side) for n in range(stored, stored + 300)])
        ballast.unlink()
        store.put_many([drawn(stored, side)])
        store.close()
    with ImageStore(small_disk / "store") as store:
        report = check_store(store, deep=True)
        assert not report.missing and not report.corrupt and not report.temporary
        assert store.missing(keys(*range(stored + 1))) == []
        assert repair_store(store, report).ok


# Rows of a picture that says what it is


def test_the_file_names_everything_that_the_row_does(local):
    local.put_many([drawn(1)])
    found = local.read_picture(make_job(1).key)
    row = local.get(make_job(1).key)
    assert (found.key, found.metadata, found.seconds, found.pixels, found.size) == (
        row.key, json.loads(json.dumps(row.metadata)), row.seconds, row.pixels, row.bytes
    )  # fmt: skip
