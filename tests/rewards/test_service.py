"""The service's routes over a real socket: answers, refusals with their reasons, and limits while a body arrives."""

import json
import socket
import threading
import time
from io import BytesIO

import httpx
import msgpack
import pytest
import torch
from PIL import Image

from rewards.score_queue import ScoreQueue
from rewards.service import RewardService, ServedScorer
from rewards.wire import JSON, MSGPACK, Limits, pack

TOKEN = {"Authorization": "Bearer s3cret"}
DESCRIPTION = {"name": "toy", "sha256": "0f"}


def png(value, size=(4, 4)):
    file = BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


class Toy:
    """Scores number + grey value; waits for `gate`."""

    def __init__(self):
        self.gate, self.scored = threading.Event(), []
        self.gate.set()

    def __call__(self, prompts, images):
        assert self.gate.wait(10)
        self.scored += prompts
        if "boom" in prompts:
            raise RuntimeError("no score for boom")
        pairs = zip(prompts, images, strict=True)
        return torch.tensor([float(prompt or "nan") + image.getpixel((0, 0)) for prompt, image in pairs])


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module")
def service(toy):
    service = RewardService(limits=Limits(20_000, 10_000, 2, 4), max_queue=3, token="s3cret", body_timeout=0.5)
    queue = ScoreQueue("toy", toy, max_batch=2, max_wait=0.0)
    service.scorers = {"toy": ServedScorer(queue, DESCRIPTION)}
    return service


@pytest.fixture(scope="module")
def url(service, serve_on_thread):
    with serve_on_thread(service) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, headers=TOKEN, trust_env=False, timeout=10) as client:
        yield client


def post(http, message, media=MSGPACK, path="/score/toy", **headers):
    body = message if isinstance(message, bytes) else pack(message, media)
    return http.post(path, content=body, headers={"Content-Type": media} | headers)


def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("media", [JSON, MSGPACK])
@pytest.mark.parametrize("accept", [JSON, MSGPACK, "*/*"])
def test_scores(http, media, accept):
    message = {"prompts": ["1", "", "3"], "images": [png(10), png(20)], "image_index": [1, 0, 0]}
    answer = post(http, message, media, Accept=accept)
    given = media if accept == "*/*" else accept
    assert (answer.status_code, answer.headers["content-type"]) == (200, given)
    content = answer.json() if given == JSON else msgpack.unpackb(answer.content)
    assert content == {"scores": [21.0, None, 13.0], "errors": {"1": "the score is not finite."}, "scorer": DESCRIPTION}


def test_who_is_there(http):
    anonymous = httpx.get(f"{http.base_url}/health", trust_env=False)
    assert (anonymous.status_code, anonymous.json()) == (200, {"status": "ready", "scorers": ["toy"]})
    limits = {"max_body_bytes": 20_000, "max_pixels": 10_000, "max_images": 2, "max_pairs": 4}
    assert http.get("/score/toy").json() == {
        "name": "toy",
        "scorer": DESCRIPTION,
        "reads_prompts": True,
        "limits": limits,
    }
    post(http, {"prompts": ["1"], "images": [png(1)]})
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 't2i_reward_requests_total{scorer="toy",status="200"}' in metrics.text
    assert "t2i_reward_in_flight_requests 0\n" in metrics.text
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer s3cre", "bearer s3cret2", "s3cret", "Basic s3cret", "Bearer \xe9"]
)
def test_wrong_tokens(http, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    body = pack({"prompts": ["1"], "images": [png(1)]}, MSGPACK)
    with httpx.Client(base_url=http.base_url, trust_env=False) as stranger:
        for answer in (
            stranger.post("/score/toy", content=body, headers=headers | {"Content-Type": MSGPACK}),
            stranger.post("/score/unknown", content=body, headers=headers),  # nor what is served
            stranger.get("/score/toy", headers=headers),
            stranger.get("/metrics", headers=headers),
        ):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert ("missing" if header is None else "is wrong") in answer.json()["error"]


@pytest.mark.parametrize(
    ("message", "media", "headers", "status", "reason"),
    [
        (b"no", JSON, {}, 400, "the body is not JSON: Expecting value"),
        (b"\x81\xa7", MSGPACK, {}, 400, "the body is not MessagePack: Unpack failed"),
        (b"", MSGPACK, {}, 400, "the body is not MessagePack"),
        ({"prompts": ["1"], "images": [b"JFIF"]}, MSGPACK, {}, 422, "`images[0]` is neither PNG nor WebP"),
        ({"prompts": ["1"], "images": [png(1)[:30]]}, MSGPACK, {}, 422, "`images[0]` is a damaged PNG."),
        ({"prompts": ["1"], "images": [png(1, (100, 101))]}, MSGPACK, {}, 413, "`images[0]` has 100x101 pixels"),
        ({"prompts": ["1"], "images": [png(1)] * 3}, JSON, {}, 413, "`images` has 3 entries"),
        ({"prompts": ["1"] * 5, "images": [png(1)]}, JSON, {}, 413, "`prompts` has 5 entries"),
        (b"x" * 20_001, MSGPACK, {}, 413, "the body is larger than the 20,000 bytes allowed"),
        ({"prompts": ["1"], "images": [png(1)]}, "text/plain", {}, 415, "Content-Type must be"),
        (b"", MSGPACK, {"Content-Encoding": "gzip"}, 415, "compressed bodies are not taken"),
        ({"prompts": ["boom"], "images": [png(1)]}, MSGPACK, {}, 500, "toy failed: RuntimeError('no score for boom')"),
    ],
)
def test_refusals(http, message, media, headers, status, reason):
    body = pack(message, JSON if media == JSON else MSGPACK) if isinstance(message, dict) else message
    answer = post(http, body, media, **headers)
    assert answer.status_code == status and answer.headers["content-type"] == JSON
    error = answer.json()["error"]
    assert reason in error and "Traceback" not in error and 'File "' not in error
    assert post(http, {"prompts": ["1"], "images": [png(1)]}).status_code == 200  # on the same connection


def test_unknown_names_and_routes(http):
    answer = post(http, b"", path="/score/clip")
    assert answer.status_code == 404 and answer.json()["error"] == "no scorer 'clip' here; there are toy."
    assert http.get("/scores").status_code == 404
    assert http.put("/score/toy").status_code == 405 and "error" in http.put("/score/toy").json()


def test_a_body_without_length_is_cut_off(http):
    sent = []

    def endless():
        while len(sent) < 1000:
            sent.append(1)
            yield b"x" * 10_000

    answer = http.post("/score/toy", content=endless(), headers={"Content-Type": MSGPACK})
    assert answer.status_code == 413 and "larger than the 20,000 bytes" in answer.json()["error"]


def raw(url):
    """A socket that has sent the head of a request and half of its body."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    head = "POST /score/toy HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
    connection.sendall(f"{head}Content-Type: {MSGPACK}\r\nContent-Length: 100\r\n\r\n".encode() + b"x" * 50)
    return connection


def test_a_body_that_does_not_come(url, service):
    with raw(url) as connection:
        until(lambda: service._in_flight == 1)
        answer = b""
        while not answer.endswith(b"}"):  # head and body come apart
            answer += connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.5 seconds" in answer
    assert service._in_flight == 0


def test_hanging_up_in_the_middle_of_a_body(url, service, http):
    raw(url).close()
    until(lambda: 'status="499"' in http.get("/metrics").text)
    assert service._in_flight == 0
    assert post(http, {"prompts": ["1"], "images": [png(1)]}).status_code == 200


def test_a_full_queue_and_clients_that_hang_up(http, toy, service):
    toy.gate.clear()
    toy.scored.clear()
    answers = {}

    def ask(number, timeout=10):
        body = pack({"prompts": [str(number), "0"], "images": [png(1), png(2)]}, JSON)
        try:
            answers[number] = httpx.post(
                f"{http.base_url}/score/toy",
                content=body,
                headers=TOKEN | {"Content-Type": JSON},
                timeout=timeout,
                trust_env=False,
            )
        except httpx.ReadTimeout:
            answers[number] = "hung up"

    threads = []
    for number, timeout in ((1, 10), (2, 0.3), (3, 10)):  # one is being scored, two wait, one of them not for long
        threads.append(threading.Thread(target=ask, args=(number, timeout)))
        threads[-1].start()
        until(lambda expected=number: service._in_flight == expected)
    full = post(http, {"prompts": ["9"], "images": [png(1)]})
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")
    assert full.json() == {"error": "3 requests are waiting already."}
    until(lambda: service._in_flight == 2)
    assert len(service.scorers["toy"].queue) == 1
    toy.gate.set()
    for thread in threads:
        thread.join(10)
    assert answers[2] == "hung up"
    assert [answers[number].json()["scores"] for number in (1, 3)] == [[2.0, 2.0], [4.0, 2.0]]
    assert toy.scored == ["1", "0", "3", "0"]


def test_a_stopping_service_takes_nothing(http, service):
    service.stopping = True
    try:
        answer = post(http, {"prompts": ["1"], "images": [png(1)]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "stopping")
    finally:
        service.stopping = False


def test_an_error_of_the_service_itself(http, service, monkeypatch):
    monkeypatch.setitem(service.scorers, "toy", ServedScorer(service.scorers["toy"].queue, {"name": object()}))
    answer = post(http, {"prompts": ["1"], "images": [png(1)]}, JSON)
    assert answer.status_code == 500
    assert json.loads(answer.content) == {"error": "TypeError in the service; its log says more."}
    monkeypatch.undo()
    assert post(http, {"prompts": ["1"], "images": [png(1)]}).status_code == 200
