"""CachedHTTP against a real HTTP server that fails in many ways before it answers."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.bench.cached_http import BadBodyError, CachedHTTP, Request, RequestError

TOKEN = "0123456789abcdef0123456789abcdef"
MODELS = Request("GET", "/models", (("limit", "100"),))


def is_page(body):
    if not isinstance(body, dict) or "items" not in body:
        raise BadBodyError("the page has no `items`")


class Handler(BaseHTTPRequestHandler):
    """Answers {"items": [path]} unless the server still has a fault to show."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        server = self.server
        server.log.append({"path": self.path, "headers": dict(self.headers), "time": time.monotonic()})
        fault = server.faults.pop(0) if server.faults else (200, {}, json.dumps({"items": [self.path]}))
        if fault == "hang":
            time.sleep(0.6)
            self.close_connection = True
            return
        # Half a body, and then the line goes dead.
        status, headers, text = (200, {"Content-Length": "1000"}, '{"items": [') if fault == "drop" else fault
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())
        self.close_connection = fault == "drop"

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.log, server.faults = [], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/api/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def sleeps():
    return []


@pytest.fixture
def http(server, sleeps, tmp_path):
    with CachedHTTP(server.url, cache_dir=tmp_path, sleep=sleeps.append) as http:
        yield http


ANSWER = (200, {"items": ["/api/v1/models?limit=100"]})


def test_asks_once_and_then_reads_the_cache(http, server, tmp_path):
    assert http.fetch(MODELS, is_page) == http.fetch(MODELS, is_page) == ANSWER
    with CachedHTTP(server.url, cache_dir=tmp_path) as again:
        assert again.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 1
    http.forget(MODELS)
    assert http.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 2


def test_order_of_parameters_means_nothing_but_method_and_body_do(http, server):
    one, other = ("a", "1"), ("b", "2")
    for request in (
        Request("GET", "/x", (one, other)),
        Request("GET", "/x", (other, one)),
        Request("POST", "/x", (one, other)),
        Request("POST", "/x", (one, other), body=[1]),
    ):
        http.fetch(request, is_page)
    assert len(server.log) == 3


def test_honours_retry_after_in_seconds_and_as_a_date(http, server, sleeps):
    server.faults = [
        (429, {"Retry-After": "1"}, "slow down"),
        (503, {"Retry-After": formatdate(time.time() + 30, usegmt=True)}, "busy"),
        (503, {"Retry-After": "999999"}, "busy"),
    ]
    assert http.fetch(MODELS, is_page) == ANSWER
    assert sleeps[0] == 1.0
    assert 28 <= sleeps[1] <= 30
    assert sleeps[2] == 300.0  # capped


@pytest.mark.parametrize("header", ["0", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-5", "Wed, 99 Zzz 9999 99:99:99"])
def test_useless_retry_after_means_exponential_backoff(http, server, sleeps, header):
    server.faults = [(429, {"Retry-After": header}, "")] * 4
    assert http.fetch(MODELS, is_page) == ANSWER
    assert len(sleeps) == 4
    for wait, full in zip(sleeps, [1, 2, 4, 8], strict=True):
        assert full / 2 <= wait <= full


@pytest.mark.parametrize("fault", ["drop", (500, {}, ""), (502, {}, "<html>"), (504, {}, ""), (200, {}, "<html>")])
def test_transient_failures_are_retried(http, server, sleeps, fault):
    server.faults = [fault]
    assert http.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 2 and len(sleeps) == 1


def test_timeouts_are_retried(server, sleeps, tmp_path):
    server.faults = ["hang"]
    with CachedHTTP(server.url, cache_dir=tmp_path, timeout=0.2, sleep=sleeps.append) as http:
        assert http.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 2 and len(sleeps) == 1


def test_expired_retries_name_url_status_and_attempts(server, sleeps, tmp_path):
    server.faults = [(503, {}, "busy")] * 3
    with (
        CachedHTTP(server.url, cache_dir=tmp_path, max_retries=2, sleep=sleeps.append) as http,
        pytest.raises(RequestError, match=r"HTTP status 503, asked 3 times.*/models\?limit=100") as caught,
    ):
        http.fetch(MODELS, is_page)
    assert (caught.value.status, caught.value.attempts) == (503, 3)
    assert caught.value.url == server.url + "/models?limit=100"
    assert len(server.log) == 3 and len(sleeps) == 2


def test_refused_connections_end_in_an_error_without_status(sleeps, tmp_path):
    with (
        CachedHTTP("http://127.0.0.1:9/api/v1", cache_dir=tmp_path, max_retries=1, sleep=sleeps.append) as http,
        pytest.raises(RequestError, match="ConnectError.*no HTTP answer") as caught,
    ):
        http.fetch(MODELS, is_page)
    assert (caught.value.status, caught.value.attempts) == (None, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_refusals_are_not_retried(http, server, sleeps, status):
    server.faults = [(status, {}, "no")]
    with pytest.raises(RequestError, match=f"status {status}, asked once"):
        http.fetch(MODELS, is_page)
    assert len(server.log) == 1 and not sleeps


def test_redirects_in_a_circle_are_not_retried(http, server, sleeps):
    server.faults = [(302, {"Location": "/api/v1/models"}, "")] * 30
    with pytest.raises(RequestError, match="TooManyRedirects.*asked once"):
        http.fetch(MODELS, is_page)
    assert not sleeps


def test_an_absent_thing_is_an_answer_where_it_may_be_absent(http, server, tmp_path):
    server.faults = [(404, {}, "no such model")]
    assert http.fetch(MODELS, is_page, absent_ok=True) == http.fetch(MODELS, is_page, absent_ok=True) == (404, None)
    assert len(server.log) == 1
    assert http.fetch(MODELS, is_page) == ANSWER  # who expects it to exist asks again


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        ("<html>blocked</html>", {}, "not JSON"),
        ("[" * 100_000, {}, "not JSON"),
        ('{"metadata": {}}', {}, "no `items`"),
        ("plain", {"Content-Encoding": "gzip"}, "cannot be decoded"),
    ],
)
def test_broken_bodies_are_asked_for_three_times_and_never_cached(http, server, tmp_path, body, headers, reason):
    server.faults = [(200, headers, body)] * 3
    with pytest.raises(RequestError, match=f"{reason}.*asked 3 times.*/models"):
        http.fetch(MODELS, is_page)
    assert len(server.log) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", '{"request"', "[]", "null", '{"request": {}, "status": 200}'])
def test_damaged_cache_files_are_fetched_again(http, server, tmp_path, damage):
    http.fetch(MODELS, is_page)
    [path] = tmp_path.iterdir()
    path.write_text(damage)
    assert http.fetch(MODELS, is_page) == http.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 2


def test_max_age_expires_cached_answers(server, tmp_path):
    with CachedHTTP(server.url, cache_dir=tmp_path, max_age=3600) as http:
        http.fetch(MODELS, is_page)
        http.fetch(MODELS, is_page)
        assert len(server.log) == 1
        [path] = tmp_path.iterdir()
        entry = json.loads(path.read_text())
        path.write_text(json.dumps(entry | {"fetched_at": entry["fetched_at"] - 3601}))
        http.fetch(MODELS, is_page)
    assert len(server.log) == 2


def test_token_is_sent_but_never_stored_logged_or_shown(server, tmp_path, caplog, sleeps):
    caplog.set_level("DEBUG")
    echo = json.dumps({"items": [], "you": f"Bearer {TOKEN}"})
    server.faults = [(503, {}, f"your token {TOKEN}"), (200, {}, echo), (403, {}, f"bad token {TOKEN}")]
    with CachedHTTP(server.url, cache_dir=tmp_path, token=TOKEN, sleep=sleeps.append) as http:
        assert http.fetch(MODELS, is_page) == (200, {"items": [], "you": "Bearer [token]"})
        with pytest.raises(RequestError) as caught:
            http.fetch(Request("GET", "/images"), is_page)
        assert TOKEN not in repr(http)
    assert [entry["headers"]["Authorization"] for entry in server.log] == [f"Bearer {TOKEN}"] * 3
    assert TOKEN not in str(caught.value) and "[token]" in str(caught.value)
    assert "[token]" in caplog.text and TOKEN not in caplog.text
    [path] = tmp_path.iterdir()
    assert TOKEN.encode() not in path.read_bytes()


def test_answers_do_not_depend_on_the_token(http, server, tmp_path):
    http.fetch(MODELS, is_page)
    with CachedHTTP(server.url, cache_dir=tmp_path, token=TOKEN) as other:
        assert other.fetch(MODELS, is_page) == ANSWER
    assert len(server.log) == 1


def test_min_interval_spaces_requests(server, tmp_path):
    with CachedHTTP(server.url, cache_dir=tmp_path, min_interval=0.15) as http:
        for number in range(3):
            http.fetch(Request("GET", f"/models/{number}"), is_page)
    times = [entry["time"] for entry in server.log]
    assert len(times) == 3 and all(later - earlier > 0.13 for earlier, later in zip(times, times[1:], strict=False))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"base_url": "example.org"}, "base_url"),
        ({"base_url": "https://example.org/api/v1?token=x"}, "base_url"),
        ({"max_retries": -1}, "max_retries"),
        ({"timeout": 0}, "timeout"),
        ({"token": "secret\nvalue"}, "bearer token"),
    ],
)
def test_bad_arguments(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        CachedHTTP(**({"base_url": "https://example.org/api", "cache_dir": tmp_path} | arguments))
    assert "secret" not in str(caught.value)
