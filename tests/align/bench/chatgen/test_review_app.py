"""The review over HTTP: answers, refusals, and what no page of another site and no row of a stranger can get."""

import json
import re
import socket

import pytest

from align.bench.chatgen.review import Hosts, ReviewQueue
from align.bench.chatgen.review_app import HEADERS, ReviewService, build_app
from align.bench.chatgen.review_store import REASONS, ReviewStore, load_decisions

pytest.importorskip("fastapi", reason="needs the extra `serve`")
testclient = pytest.importorskip("starlette.testclient")

ORIGIN = "http://127.0.0.1:8500"
PAYLOAD = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\u2028{{7*7}}'


def row(number, *images, text="a fox pls", **other):
    content = [{"type": "text", "text": text, "image": None}]
    content += [{"type": "image", "text": None, "image": image} for image in images]
    return {
        "id": f"d/{number}", "prompt": "fox, 8k", "negative_prompt": "blurry", "model": "Pixel", "role": "cook, 40",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Here."}],
        "arguments": {"sampler": "Euler a", "steps": 20, "cfg_scale": 7.5, "clip_skip": None}, "generator": "template",
        "input_type": "multimodal", "source": {"reference": {"image": "a.png", "prompt": "a cat"}, "turns": ["x", "y"]},
    } | other  # fmt: skip


@pytest.fixture
def client_of(tmp_path):
    clients = []

    def make(rows, **options):
        store = ReviewStore(tmp_path / "review.sqlite")
        queue = ReviewQueue(rows, store, reviews=2)
        service = ReviewService(queue, hosts=Hosts("127.0.0.1", 8500, ["review.example"]), **options)
        clients.append(testclient.TestClient(build_app(service), base_url=ORIGIN))
        return clients[-1].__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(client_of):
    return client_of([row(number) for number in range(3)])


def post(client, path, headers=None, **body):
    return client.post(path, json=body, headers=headers)


def decide(client, reviewer, shown, verdict, **more):
    body = {"reviewer": reviewer, "row": shown["id"], "content": shown["content"], "verdict": verdict}
    return post(client, "/decide", **body | more)


def test_the_way_of_a_row(client, tmp_path):
    assert client.get("/setup").json()["reasons"][0]["name"] == next(iter(REASONS))
    answer = post(client, "/next", reviewer="anna").json()
    assert answer["progress"] == {"total": 3, "complete": 0, "mine": 0, "conflicts": 0}
    shown = answer["row"]
    assert shown["id"] == "d/0" and shown["role"] == "cook, 40" and shown["negative_prompt"] == "blurry"
    assert shown["messages"][0] == {"role": "user", "parts": [{"text": "a fox pls"}]}
    assert ["steps", "20"] in shown["facts"] and ["Picture shows", "a cat"] in shown["facts"]
    assert ["Model", "Pixel"] in shown["facts"] and shown["turns"] == ["x", "y"]
    assert not any("clip" in name for name, _ in shown["facts"])
    stored = decide(client, "anna", shown, "edit", texts=["a fox"], seconds=3.5).json()
    assert stored["decision"]["texts"] == ["a fox"] and stored["progress"]["mine"] == 1
    assert post(client, "/next", reviewer="ben").json()["row"]["id"] == "d/0"
    assert client.get("/row", params={"row": "d/0"}).json()["conflict"] is None  # ben sees nothing of anna's opinion
    assert client.get("/decided", params={"reviewer": "anna"}).json()["mine"]["verdict"] == "edit"
    assert decide(client, "ben", shown, "drop", reason="irrelevant").status_code == 200
    (conflict,) = client.get("/conflicts").json()["conflicts"]
    assert [one["verdict"] for one in conflict["opinions"]] == ["edit", "drop"] and conflict["settlement"] is None
    assert decide(client, "carl", shown, "keep", settles=True).status_code == 200
    conflict = client.get("/row", params={"row": "d/0"}).json()["conflict"]
    assert conflict["settlement"]["reviewer"] == "carl"
    statistics = client.get("/statistics").json()
    assert statistics["settled"] == 1 and statistics["states"]["keep"] == 1
    assert statistics["agreement"]["percent"] == 0 and len(statistics["reviewers"]) == 2
    undone = post(client, "/undo", reviewer="ben").json()
    assert undone["mine"]["reason"] == "irrelevant" and undone["row"]["id"] == "d/0"
    assert [d.reviewer for d in load_decisions(tmp_path / "review.sqlite")] == ["anna", "carl"]
    assert post(client, "/undo", reviewer="nobody").json()["row"] is None


@pytest.mark.parametrize(
    "path", ["/", "/review.js", "/parts.js", "/review.css", "/setup", "/statistics", "/no", "/docs"]
)
def test_every_answer_is_fenced_in(client, path):
    answer = client.get(path)
    assert answer.status_code == (404 if path in ("/no", "/docs") else 200)
    for name, value in HEADERS.items():
        assert answer.headers.get_list(name) == [value]
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
        "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(client):
    page = client.get("/").text
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:|https?:", page)
    for path in ("/review.js", "/parts.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", client.get(path).text
        )
    assert not re.search(r"@import|url\(|https?:", client.get("/review.css").text)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8500", "127.0.0.1", "127.0.0.1:8501", "localhost.evil.example:8500", "10.0.0.1:8500",
     "127.0.0.1:8500@evil.example", "127.0.0.1:8500, evil.example", ""],
)  # fmt: skip
def test_other_hosts_get_nothing(client, host):
    for path in ("/", "/setup", "/image?row=d/0&index=0"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 403 and "not called by this name" in answer.json()["error"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert post(client, "/next", {"Host": host, "Origin": f"http://{host}"}, reviewer="anna").status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost:8500", "LOCALHOST:8500", "[::1]:8500", "review.example", "review.example:9"]
)
def test_the_servers_own_names(client, host):
    assert client.get("/setup", headers={"Host": host}).status_code == 200
    assert post(client, "/next", {"Host": host, "Origin": f"https://{host}"}, reviewer="anna").status_code == 200


def test_names_of_other_addresses():
    every = Hosts("0.0.0.0", 8500)
    for host in ("10.1.2.3:8500", "[fe80::1]:8500", "localhost:8500", f"{socket.gethostname()}:8500"):
        assert every.allow(host)
    assert not every.allow("evil.example:8500") and not every.allow("10.1.2.3:8501")
    one = Hosts("gpu-7", 80)
    assert one.allow("gpu-7") and one.allow("GPU-7:80") and not one.allow("localhost") and not one.allow("10.0.0.1")
    assert Hosts("::1", 8500).allow("[::1]:8500") and not Hosts("::1", 8500).allow("[::2]:8500")


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Origin": "http://evil.example"}, 403, "the page of another site"),
        ({"Origin": "null"}, 403, "the page of another site"),
        ({"Origin": "http://127.0.0.1:9999"}, 403, "the page of another site"),
        ({"Origin": "http://localhost:8500"}, 403, "the page of another site"),
        ({"Origin": ""}, 403, "the page of another site"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "the page of another site"),
        ({"Sec-Fetch-Site": "same-site"}, 403, "the page of another site"),
        ({"Content-Type": "text/plain"}, 415, "must be sent as application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "must be sent as application/json"),
        ({"Content-Type": "application/jsonp"}, 415, "must be sent as application/json"),
    ],
)
def test_other_sites_change_nothing(client, tmp_path, headers, status, message):
    shown = post(client, "/next", reviewer="anna").json()["row"]
    body = {"reviewer": "anna", "row": "d/0", "content": shown["content"], "verdict": "keep"}
    for path in ("/decide", "/next", "/undo", "/session"):
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"} | headers)
        assert (answer.status_code, message in answer.json()["error"]) == (status, True)
        assert "access-control-allow-origin" not in answer.headers
    assert load_decisions(tmp_path / "review.sqlite") == []
    assert client.get("/decide").status_code == client.post("/setup").status_code == 405
    good = {"Content-Type": "application/json; charset=utf-8", "Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/decide", content=json.dumps(body), headers=good).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"row": "d/9"}, 404, "there is no such row"),
        ({"row": ["d/0"]}, 404, "there is no such row"),
        ({"row": None}, 404, "there is no such row"),
        ({"content": "old"}, 409, "the row has changed since it was shown"),
        ({"verdict": "undo"}, 400, "`verdict` must be one of keep, drop, edit, but is 'undo'"),
        ({"verdict": ["keep"]}, 400, "`verdict` must be one of"),
        ({"verdict": "drop"}, 400, "`reason` belongs to a drop"),
        ({"verdict": "drop", "reason": "because"}, 400, "`reason` belongs to a drop"),
        ({"verdict": "drop", "reason": ["other"]}, 400, "`reason` belongs to a drop"),
        ({"reason": "other"}, 400, "`reason` belongs to a drop"),
        ({"texts": ["x"]}, 400, "`texts` belong to an edit"),
        ({"verdict": "edit"}, 400, "`texts` must be a list of 1 texts"),
        ({"verdict": "edit", "texts": ["x", "y"]}, 400, "`texts` must be a list of 1 texts"),
        ({"verdict": "edit", "texts": [3]}, 400, "`texts` must be a list of 1 texts"),
        ({"verdict": "edit", "texts": [" \n"]}, 422, "a text is empty"),
        ({"verdict": "edit", "texts": ["a fox pls"]}, 422, "the texts are as they were"),
        ({"verdict": "edit", "texts": ["x" * 501]}, 413, "more than the 500 characters"),
        ({"verdict": "edit", "texts": ["\ud800"]}, 422, "half a surrogate pair"),
        ({"seconds": -1}, 400, "`seconds` must be a number from 0 to 86400"),
        ({"seconds": float("nan")}, 400, "`seconds` must be a number"),
        ({"seconds": True}, 400, "`seconds` must be a number"),
        ({"seconds": "5"}, 400, "`seconds` must be a number"),
        ({"settles": 1}, 400, "`settles` must be true or false"),
        ({"settles": True}, 409, "nothing to settle"),
        ({"comment": "x"}, 400, "unknown field 'comment'"),
        ({"reviewer": None}, 400, "a reviewer's name"),
        ({"reviewer": ""}, 400, "a reviewer's name"),
        ({"reviewer": " anna"}, 400, "a reviewer's name"),
        ({"reviewer": "anna "}, 400, "a reviewer's name"),
        ({"reviewer": "an\nna"}, 400, "a reviewer's name"),
        ({"reviewer": "<b>anna</b>"}, 400, "a reviewer's name"),
        ({"reviewer": "a\u202enna"}, 400, "a reviewer's name"),
        ({"reviewer": "x" * 41}, 400, "a reviewer's name"),
        ({"reviewer": "Jose\u0301"}, 400, "a reviewer's name"),
        ({"reviewer": "BEN"}, 409, "there is a reviewer ben already"),
    ],
)
def test_decisions_that_are_none(client_of, tmp_path, change, status, message):
    client = client_of([row(0), row(1)], max_text_chars=500)
    shown = post(client, "/next", reviewer="ben").json()["row"]
    assert decide(client, "ben", shown, "keep").status_code == 200
    body = {"reviewer": "anna", "row": "d/0", "content": shown["content"], "verdict": "keep"} | change
    answer = client.post("/decide", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert [d.reviewer for d in load_decisions(tmp_path / "review.sqlite")] == ["ben"]


@pytest.mark.parametrize("name", ["anna", "Ångström 2", "李明", "O'Neil", "j.-p. x", "7", "x" * 40])
def test_names(client, name):
    assert post(client, "/next", reviewer=name).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 5_000, 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[1]", 400, "must be a JSON object, but is list"),
        (b" " * 10_001, 413, "larger than the 10,000 bytes"),
    ],
)
def test_bodies_that_are_none(client_of, content, status, message):
    client = client_of([row(0)], max_body_bytes=10_000)
    for path in ("/next", "/decide", "/undo", "/session"):
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, message in answer.json()["error"]) == (status, True)


def test_numbers_and_rows_that_are_none(client):
    assert client.get("/decided", params={"reviewer": "anna", "before": "1 OR 1"}).status_code == 400
    assert client.get("/decided", params={"reviewer": "anna", "before": "-1"}).status_code == 400
    assert client.get("/decided").status_code == 400
    assert client.get("/row").status_code == client.get("/row?row=../d/0").status_code == 404


def test_the_token(client_of):
    client = client_of([row(0, "a.png")], token="s3cret")
    assert client.get("/").status_code == client.get("/review.js").status_code == 200  # they tell nothing
    for path in (
        "/setup",
        "/row?row=d/0",
        "/decided?reviewer=a",
        "/conflicts",
        "/statistics",
        "/image?row=d/0&index=0",
    ):
        assert client.get(path).status_code == 401, path
    for path in ("/next", "/decide", "/undo"):
        assert post(client, path, reviewer="anna").status_code == 401
    for token in ("guess", "", None, 3, "é", "\ud800", ["s3cret"]):
        answer = client.post(
            "/session", content=json.dumps({"token": token}), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
    assert client.get("/setup", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    answer = post(client, "/session", token="s3cret")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "s3cret" not in cookie
    assert client.get("/setup").status_code == 200  # the client keeps the cookie
    client.cookies.clear()
    name, value = cookie.split(";")[0].split("=")
    for wrong in (f"{name}=x", f"{name}=", f"x={value}", f"{name}=é"):
        assert client.get("/setup", headers={"Cookie": wrong.encode()}).status_code == 401


def test_what_strangers_wrote_travels_as_json_only(client_of):
    hostile = row(0, text=PAYLOAD, prompt=PAYLOAD, model=PAYLOAD, role=PAYLOAD, arguments={PAYLOAD: PAYLOAD})
    client = client_of([hostile, row(1, text="half \ud800 a pair")])
    answer = post(client, "/next", reviewer="anna")
    assert answer.headers["content-type"] == "application/json" and answer.headers["cache-control"] == "no-store"
    assert answer.json()["row"]["prompt"] == PAYLOAD
    assert client.get("/row?row=d/1").json()["row"]["messages"][0]["parts"][0]["text"] == "half \ud800 a pair"


def test_a_database_that_fails_is_told_and_the_next_request_works(client_of, tmp_path):
    client = client_of([row(0)])
    shown = post(client, "/next", reviewer="anna").json()["row"]
    db = ReviewStore(tmp_path / "review.sqlite")
    db._db.execute("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
    answer = decide(client, "anna", shown, "keep")
    assert answer.status_code == 503 and answer.json()["error"] == "nothing was stored: disk is full."
    assert answer.headers["x-content-type-options"] == "nosniff"
    db._db.execute("DROP TRIGGER full")
    db.close()
    assert decide(client, "anna", shown, "keep").status_code == 200
