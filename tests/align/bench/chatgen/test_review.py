"""`python -m align.bench.chatgen.review`: its options, the file of the queue, and the command as a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from align.bench.chatgen.review import ReviewConfig, main, read_queue
from align.bench.chatgen.review_store import ReviewError, load_decisions
from rewards.commandline import ConfigError


def row(number, text="a fox pls"):
    content = [{"type": "text", "text": text, "image": None}]
    return {"id": f"d/{number}", "messages": [{"role": "user", "content": content}], "prompt": "fox, 8k"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: a row must be a JSON object with a text `id`"),
        ('{"id": 3}', "a text `id`"),
        ('{"id": "\\ud800", "messages": []}', "line 2: .*surrogates not allowed"),
        ('{"id": "x"}', "`messages` must be a list"),
        ('{"id": "x", "messages": []}', "`messages` must be a list"),
        ('{"id": "x", "messages": [{"role": "user", "content": [{"type": "text"}]}]}', "`messages` must be a list"),
        (
            '{"id": "x", "messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}',
            "`messages` must",
        ),
        (
            '{"id": "x", "messages": [{"role": "user", "content": "x"}], "prompt": 3}',
            "`prompt` must be text, but is int",
        ),
        (
            '{"id": "x", "messages": [{"role": "user", "content": "x"}], "arguments": 3}',
            "`arguments` must be an object",
        ),
        (json.dumps(row(0)), "line 2: the id 'd/0' has been there before"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, message):
    path = tmp_path / "queue.jsonl"
    path.write_text(f"{json.dumps(row(0))}\n{line}\n")
    with pytest.raises(ReviewError, match=message):
        read_queue(path)


def test_a_queue_is_read_in_order(tmp_path):
    path = tmp_path / "queue.jsonl"
    path.write_text("\n".join(json.dumps(row(number, "line\u2028separator")) for number in (3, 1, 2)) + "\n\n", "utf-8")
    assert [entry["id"] for entry in read_queue(path)] == ["d/3", "d/1", "d/2"]
    for content, message in ((b"\n", "has no rows"), (b"\xff", "Can't read `queue`")):
        path.write_bytes(content)
        with pytest.raises(ReviewError, match=message):
            read_queue(path)
    with pytest.raises(ReviewError, match="Can't read `queue` .*No such file"):
        read_queue(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reviews": 0}, "`reviews` must be at least 1, but is 0"),
        ({"port": -1}, "`port` must be from 0 to 65535, but is -1"),
        ({"lease_seconds": 0.0}, "`lease_seconds` must be above 0, but is 0.0"),
        ({"body_timeout": float("nan")}, "`body_timeout` must be above 0, but is nan"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ReviewConfig(queue="queue.jsonl", **options)


def test_what_can_not_be_served(tmp_path, monkeypatch):
    monkeypatch.delenv("T2I_ALIGN_TOKEN", raising=False)
    path = tmp_path / "queue.jsonl"
    with pytest.raises(ReviewError, match="Can't read `queue`"):
        main(ReviewConfig(queue=str(path)))
    path.write_text(json.dumps(row(0)))
    with pytest.raises(ConfigError, match="`images` .*gone is no folder"):
        main(ReviewConfig(queue=str(path), images=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"`host` 0.0.0.0 can be reached .* T2I_ALIGN_TOKEN"):
        main(ReviewConfig(queue=str(path), host="0.0.0.0"))
    (tmp_path / "no.sqlite").write_text("no database, but long enough to look at" * 30)
    with pytest.raises(ReviewError, match="can't be used"):
        main(ReviewConfig(queue=str(path), database=str(tmp_path / "no.sqlite"), port=0))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_the_command(tmp_path, number, code):
    httpx = pytest.importorskip("httpx")
    (tmp_path / "queue.jsonl").write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1)) + "\n")
    command = [sys.executable, "-m", "align.bench.chatgen.review", "--queue", tmp_path / "queue.jsonl", "--database",
               tmp_path / "review.sqlite", "--port", "0"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "T2I_ALIGN_TOKEN"}
    log = tmp_path / "log.txt"
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=log.open("w"), stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while (
            match := re.search(r"^Serving 2 rows to review at (http://127\.0\.0\.1:\d+)\.$", log.read_text(), re.M)
        ) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with httpx.Client(base_url=match[1], trust_env=False) as client:
            assert "Review of chats" in client.get("/").text
            assert client.get("/setup", headers={"Host": "evil.example"}).status_code == 403
            shown = client.post("/next", json={"reviewer": "anna"}).json()["row"]
            body = {"reviewer": "anna", "row": shown["id"], "content": shown["content"], "verdict": "keep"}
            assert client.post("/decide", json=body).json()["progress"]["complete"] == 1
            process.send_signal(number)
            assert process.wait(30) == code, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text() and process.stdout.read() == b""
    assert [decision.row for decision in load_decisions(tmp_path / "review.sqlite")] == ["d/0"]
