"""The client against a real service and against servers that misbehave: right scores, or an error naming the URL."""

import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image

from rewards import client, load_scorer
from rewards.client import RemoteScorer, RemoteScorerError
from rewards.registry import UnknownScorerError
from rewards.score_queue import ScoreQueue
from rewards.scorer import ScoreError
from rewards.serve import bind
from rewards.service import RewardService, ServedScorer
from rewards.wire import MSGPACK, Limits

LIMITS = Limits(max_body_bytes=30_000, max_pixels=3_000, max_images=3, max_pairs=8)


def toy(prompts, images):
    """Number + grey value + width: wrong if prompts and images are mixed up."""
    pairs = zip(prompts, images, strict=True)
    return torch.tensor([float(p) + image.convert("L").getpixel((0, 0)) + image.width for p, image in pairs])


def grey(value, size=(4, 4)):
    return Image.new("L", size, value)


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def service(reports):
    service = RewardService(limits=LIMITS, max_queue=8, token="s3cret")
    for name, scorer in (("toy", toy), ("blind", lambda prompts, images: toy(["0"] * len(prompts), images))):
        queue = ScoreQueue(name, scorer, max_batch=8, max_wait=0.0, on_batch=reports.append)
        service.scorers[name] = ServedScorer(queue, {"name": name}, reads_prompts=name == "toy")
    return service


@pytest.fixture(scope="module")
def url(service, serve_on_thread):
    with serve_on_thread(service) as url:
        yield url


@pytest.fixture
def remote(url):
    scorer = RemoteScorer(url, "toy", token="s3cret", retries=0)
    yield scorer
    scorer.close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(client, "FIRST_DELAY", 0.01)


def test_a_remote_scorer_is_a_scorer(url, monkeypatch, tmp_path):
    monkeypatch.setenv("T2I_ALIGN_TOKEN", "s3cret")
    scorer = load_scorer("remote", url=f"{url}/", scorer="toy")
    grey(30, (7, 4)).save(tmp_path / "a.png")
    jpeg = BytesIO()
    grey(50, (8, 8)).save(jpeg, "JPEG")
    images = [
        grey(10),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        jpeg.getvalue(),
        np.full((4, 5, 3), 60, np.uint8),
        Image.new("CMYK", (6, 6), (0, 0, 0, 255)),
    ]
    scores = scorer([str(100 * i) for i in range(6)], images)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.tolist() == [14.0, 137.0, 237.0, 358.0, 465.0, 506.0]
    assert scorer([], []).shape == (0,)
    assert scorer.describe() == {"name": "toy"} and scorer.reads_prompts


@pytest.mark.parametrize(("batch_size", "in_flight", "num_workers"), [(64, 4, 4), (1, 3, 0), (5, 1, 2)])
def test_many_pairs_are_split_by_the_limits(url, reports, batch_size, in_flight, num_workers):
    reports.clear()
    scorer = RemoteScorer(
        url, "toy", token="s3cret", retries=0, batch_size=batch_size, in_flight=in_flight, num_workers=num_workers
    )
    pictures = [grey(value, (value + 1, 2)) for value in range(11)]
    rows = [(i, (i * i) % 11) for i in range(60)]  # pictures come again and again, in another order
    scores = scorer([str(1000 * i) for i, _ in rows], [pictures[image] for _, image in rows])
    assert scores.tolist() == [1000.0 * i + 2 * image + 1 for i, image in rows]
    assert sum(report.pairs for report in reports) == 60
    scorer.close()


def test_a_picture_travels_once_per_request(remote, reports):
    reports.clear()
    picture = grey(3)
    assert remote([str(i) for i in range(8)], [picture] * 8).tolist() == [i + 7.0 for i in range(8)]
    assert [(report.pairs, report.images) for report in reports] == [(8, 1)]


def test_large_pictures_are_split_by_bytes(remote):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 50, 50, 4), np.uint8)  # 10 kB each as PNG: two to a request
    pictures = [Image.fromarray(picture, "RGBA") for picture in pixels]
    expected = toy(["0"] * 5, pictures)
    assert torch.equal(remote(["0"] * 5, pictures), expected)


def test_rows_that_can_not_be_scored(remote, tmp_path):
    broken = BytesIO()
    Image.effect_noise((40, 40), 90).save(broken, "PNG")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 4), np.uint8), "RGBA")
    rows = [
        ("1", grey(1)),
        (None, grey(1)),
        ("\ud800", grey(1)),
        ("2", tmp_path / "gone.png"),
        ("3", grey(1, (100, 31))),
        ("4", broken.getvalue()[:-200]),
        ("5" * 25_000, noise),
        ("6", Image.new("I;16", (4, 4))),
        ("7", grey(1)),
    ]
    scored = remote.score([prompt for prompt, _ in rows], [image for _, image in rows])
    assert scored.scores[[0, 8]].tolist() == [6.0, 12.0] and scored.scores[1:8].isnan().all()
    reasons = [
        "the prompt is None, not a text",
        "not a text",
        "gone.png: No such file",
        "100x31 is more than 3,000 pixels",
        "can't be decoded",
        "bytes; the service takes 30,000",
        "deeper than 8 bits",
    ]
    assert list(scored.errors) == list(range(1, 8))
    for reason, error in zip(reasons, scored.errors.values(), strict=True):
        assert reason in error
    with pytest.raises(ScoreError, match=r"Row 1: the prompt is None, not a text. \(1 more rows failed.\)"):
        remote(["1", None, "\ud800"], [grey(1)] * 3)
    with pytest.raises(ScoreError, match="got 1 prompts and 2 images"):
        remote(["1"], [grey(1)] * 2)
    with pytest.raises(ScoreError, match="put a single one in a list"):
        remote("1", [grey(1)])


def test_a_scorer_of_images_takes_any_prompt(url):
    scorer = RemoteScorer(url, "blind", token="s3cret", retries=0)
    assert scorer(["", None], [grey(1), grey(2)]).tolist() == [5.0, 6.0]
    assert not scorer.reads_prompts


def test_many_threads_and_other_processes(remote, url):
    remote(["1"], [grey(1)])
    again = pickle.loads(pickle.dumps(remote))
    results = {}

    def ask(number):
        pairs = [(f"{number}", grey(number, (i + 1, 1))) for i in range(5)]
        results[number] = again([p for p, _ in pairs], [image for _, image in pairs]).tolist()

    again.retries = 8  # the queue takes eight requests
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {number: [2.0 * number + i + 1 for i in range(5)] for number in range(6)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": "x"}, ValueError, "`checkpoint` of a remote scorer is set where it runs"),
        ({"dtype": "bfloat16"}, ValueError, "`dtype` of a remote scorer"),
        ({"scorer": None}, ValueError, "needs `url`, like .*, and `scorer`"),
        ({"url": "gpu-7:8300"}, ValueError, "`url` must be like http://host:8300, but got 'gpu-7:8300'"),
        ({"url": "http://h:99999"}, ValueError, "`url` must be like"),
        ({"url": "http://me:secret@h"}, ValueError, "^`url` must hold no user, password, query or fragment[^@]*$"),
        ({"timeout": 0}, ValueError, "`timeout` must be more than 0 seconds, but got 0"),
        ({"retries": -1}, ValueError, "`retries` must be at least 0, but got -1"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"version": "v2.1"}, UnknownScorerError, "remote has no option `version`"),
        ({"token_env": "UNSET_TOKEN"}, RemoteScorerError, "/score/toy answered HTTP 401: the header"),
        ({"token_env": "WRONG_TOKEN"}, RemoteScorerError, "/score/toy answered HTTP 401: the token is wrong"),
        ({"token_env": "BAD_TOKEN"}, ValueError, "`token` must be printable ASCII without spaces"),
        (
            {"scorer": "clip"},
            RemoteScorerError,
            "/score/clip answered HTTP 404: no scorer 'clip' here; there are blind",
        ),
        ({"scorer": "a/b c"}, RemoteScorerError, "/score/a%2Fb%20c answered HTTP 404"),
    ],
)
def test_loading_what_can_not_work(url, monkeypatch, options, error, message):
    monkeypatch.setenv("T2I_ALIGN_TOKEN", "s3cret")
    monkeypatch.setenv("WRONG_TOKEN", "x")
    monkeypatch.setenv("BAD_TOKEN", "a b")
    with pytest.raises(error, match=message):
        load_scorer("remote", **{"url": url, "scorer": "toy"} | options)


class Misbehaving(BaseHTTPRequestHandler):
    """Describes itself properly and answers score requests with the answers it was given, one after the other."""

    def do_GET(self):
        limits = {"max_body_bytes": 10**6, "max_pixels": 10**6, "max_images": 8, "max_pairs": 8}
        self.reply(200, MSGPACK, msgpack.packb({"scorer": {"name": "x"}, "reads_prompts": True, "limits": limits}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.times.append(time.monotonic())
        status, answer, headers = self.server.answers.pop(0)
        if status is None:
            self.close_connection = True
            return self.connection.close()
        body = answer if isinstance(answer, bytes) else msgpack.packb(answer)
        return self.reply(status, MSGPACK, body, headers)

    def reply(self, status, media, body, headers=()):
        self.send_response(status)
        for name, value in ({"Content-Type": media, "Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.answers, server.times = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def good(*scores, errors=None):
    return 200, {"scores": list(scores), "errors": errors or {}, "scorer": {"name": "x"}}, {}


def test_busy_servers_and_broken_connections_are_tried_again(server):
    busy = (503, b"{}", {"Retry-After": "0.3"})
    server.answers = [(429, b"", {}), (None, b"", {}), busy, (502, b"<html>", {"Content-Type": "text/html"}), good(0.5)]
    scorer = RemoteScorer(server.url, "x", retries=4)
    assert scorer(["a"], [grey(1)]).tolist() == [0.5]
    assert len(server.times) == 5
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert gaps[2] >= 0.3 and max(gaps[0], gaps[1], gaps[3]) < 0.3


def test_retries_end_in_an_exception_that_names_the_url(server):
    server.answers = [(503, json.dumps({"error": "full."}).encode(), {"Content-Type": "application/json"})] * 3
    with pytest.raises(
        RemoteScorerError, match=rf"{server.url}/score/x gave no answer in 3 attempts. Last: HTTP 503: f"
    ):
        RemoteScorer(server.url, "x", retries=2)(["a"], [grey(1)])
    assert len(server.times) == 3
    listener = bind("127.0.0.1", 0)  # an address where nobody listens
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(RemoteScorerError, match=rf"{url}/score/x gave no .* Last: ConnectError: .*refused"):
        RemoteScorer(url, "x", retries=1)(["a"], [grey(1)])


def test_a_server_that_does_not_answer():
    with bind("127.0.0.1", 0) as silent:
        silent.listen()
        scorer = RemoteScorer(f"http://127.0.0.1:{silent.getsockname()[1]}", "x", retries=1, timeout=0.1)
        with pytest.raises(RemoteScorerError, match="in 2 attempts. Last: ReadTimeout"):
            scorer(["a"], [grey(1)])


@pytest.mark.parametrize("status", [302, 400, 413, 422, 500])
def test_refusals_are_final(server, status):
    server.answers = [(status, b"because", {"Content-Type": "text/plain"}), good(0.5)]
    with pytest.raises(RemoteScorerError, match=rf"{server.url}/score/x answered HTTP {status}: because"):
        RemoteScorer(server.url, "x", retries=3)(["a"], [grey(1)])
    assert len(server.times) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (good(0.5), "makes no sense: 1 scores for 2 pairs"),
        (good(0.5, 0.5, 0.5), "makes no sense: 3 scores for 2 pairs"),
        (good(0.5, None), "makes no sense: the score of row 1 is None"),
        (good(0.5, True), "the score of row 1 is True"),
        (good("0.5", 0.5), "the score of row 0 is '0.5'"),
        (good(0.5, float("nan")), "the score of row 1 is nan"),
        (good(0.5, 0.5, errors={"2": "x"}), r"errors of rows \[2\] of 2"),
        (good(0.5, 0.5, errors={"x": "x"}), "makes no sense: invalid literal"),
        ((200, {"scorer": {"name": "x"}}, {}), "makes no sense: 'scores'"),
        ((200, {"scores": [0.5, 0.5], "errors": [], "scorer": {"name": "x"}}, {}), "makes no sense"),
        (
            (200, {"scores": [0.5, 0.5], "errors": {}, "scorer": {"name": "y"}}, {}),
            "now serves .*'y'.* instead of .*'x'",
        ),
        ((200, [0.5, 0.5], {}), "can't be read: the body must be a mapping"),
        ((200, b"\x93", {}), "can't be read: the body is not MessagePack"),
        ((200, b"<html>", {"Content-Type": "text/html"}), "can't be read: it is neither MessagePack nor JSON"),
    ],
)
def test_wrong_answers_are_errors(server, answer, message):
    server.answers = [answer]
    with pytest.raises(RemoteScorerError, match=rf"{server.url}/score/x.* {message}"):
        RemoteScorer(server.url, "x", retries=0).score(["a", "b"], [grey(1), grey(2)])


def test_rows_that_failed_over_there(server):
    server.answers = [good(None, 0.25, errors={"0": "bad picture"})]
    scored = RemoteScorer(server.url, "x", retries=0).score(["a", "b"], [grey(1), grey(2)])
    assert scored.errors == {0: "bad picture"} and scored.scores[0].isnan() and scored.scores[1] == 0.25
