"""CivitaiClient against a real HTTP server that replays small pages in the recorded schema, and fails in between."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.bench.cached_http import RequestError
from align.bench.civitai_api import CivitaiClient

SHA = {letter: letter * 64 for letter in "ABCD"}


def image(image_id, prompt=None):
    meta = None if prompt is None else {"prompt": prompt, "sampler": "Euler a", "steps": 20, "cfgScale": 7}
    url = f"https://image.civitai.com/x/{image_id}.jpeg"
    return {"id": image_id, "url": url, "nsfwLevel": 1, "width": 512, "height": 768, "type": "image", "meta": meta}


def model(model_id, *images):
    version = {"id": model_id * 10, "name": "v1", "baseModel": "SD 1.5", "files": [], "images": list(images)}
    return {"id": model_id, "name": f"Model {model_id}", "type": "LORA", "nsfw": False, "modelVersions": [version]}


# Three pages, held together by opaque cursors as the site makes them.
PAGES = {
    None: ([model(1, image(100, "a fox")), model(2, image(200), image(201))], "75363|932023|257749"),
    "75363|932023|257749": ([model(3), model(4, image(400, "a hen"))], "11|22|33"),
    "11|22|33": ([model(4, image(400, "a hen")), model(5, image(500, "an owl"))], None),
}
# Both shapes `meta` has on /images, with the field names of that route.
GALLERIES = {
    "20": [
        {"id": 900, "url": "https://image.civitai.com/x/900.jpeg", "hash": "UB", "width": 640, "height": 960,
         "nsfw": False, "nsfwLevel": "None", "browsingLevel": 1, "username": "u", "modelVersionIds": [20],
         "meta": {"id": 900, "meta": {"prompt": "nested"}}},
        {"id": 901, "url": "https://image.civitai.com/x/901.jpeg", "hash": "UC", "width": 8, "height": 8,
         "nsfw": True, "nsfwLevel": "Soft", "browsingLevel": 2, "meta": {"prompt": "flat", "id": 3}},
        {"id": 902, "url": "https://image.civitai.com/x/902.jpeg", "width": 8, "height": 8, "meta": None},
    ],
    "30": [],
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        server = self.server
        server.log.append({"path": parts.path, "query": query, "body": body})
        fault = server.faults.pop(0) if server.faults else None
        status, text = fault or server.route(parts.path, query, body)
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


class Civitai(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.faults, self.pages = [], [], PAGES
        self.url = f"http://127.0.0.1:{self.server_address[1]}/api/v1"

    def route(self, path, query, body):
        if path == "/api/v1/models":
            items, following = self.pages[query.get("cursor", [None])[0]]
            metadata = {} if following is None else {"nextCursor": following}
            return 200, json.dumps({"items": items, "metadata": metadata})
        if path == "/api/v1/images":
            return self.gallery(query)
        if path == "/api/v1/model-versions/by-hash/ids":
            # A was published twice; the server says the younger one first. D is unknown.
            rows = [("A", 7, 70), ("A", 6, 60), ("B", 8, 80)]
            rows = [{"modelVersionId": v, "modelId": m, "hash": SHA[h].lower()} for h, m, v in rows if SHA[h] in body]
            return 200, json.dumps(rows)
        if path == "/api/v1/model-versions/by-hash/ABCDEF0123":
            return 200, json.dumps({"id": 80, "modelId": 8})
        return 404, json.dumps({"error": "No model with that"})

    def gallery(self, query):
        """One image a page, whatever the limit; the cursor is the position."""
        assert query["withMeta"] == ["true"]
        images = GALLERIES[query["modelVersionId"][0]]
        position = int(query.get("cursor", ["0"])[0])
        metadata = {"nextCursor": str(position + 1)} if position + 1 < len(images) else {}
        return 200, json.dumps({"items": images[position : position + 1], "metadata": metadata})

    def asked(self, path="/api/v1/models"):
        return [entry["query"].get("cursor", [None])[0] for entry in self.log if entry["path"] == path]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Civitai() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def sleeps():
    return []


@pytest.fixture
def client(server, sleeps, tmp_path):
    with CivitaiClient(server.url, cache_dir=tmp_path, sleep=sleeps.append) as client:
        yield client


def ids(models):
    return [model["id"] for model in models]


def test_pages_by_cursor_and_yields_each_model_once(client, server):
    assert ids(client.iter_models()) == [1, 2, 3, 4, 5]  # model 4 stands on two pages
    assert server.asked() == [None, "75363|932023|257749", "11|22|33"]
    assert all("page" not in entry["query"] for entry in server.log)


def test_sends_filters_as_repeated_parameters(client, server):
    list(client.iter_models(base_models=("SD 1.5", "SDXL 1.0"), types=("LORA",), sort="Most Downloaded", max_models=1))
    assert server.log[0]["query"] == {
        "limit": ["100"],
        "nsfw": ["false"],
        "withMeta": ["true"],
        "types": ["LORA"],
        "baseModels": ["SD 1.5", "SDXL 1.0"],
        "sort": ["Most Downloaded"],
    }


@pytest.mark.parametrize(("max_models", "expected"), [(0, []), (1, [1]), (3, [1, 2, 3])])
def test_max_models_asks_for_no_page_more_than_needed(client, server, max_models, expected):
    assert ids(client.iter_models(max_models=max_models)) == expected
    assert len(server.log) == {0: 0, 1: 1, 3: 2}[max_models]


def test_fills_images_only_where_no_embedded_image_has_meta(client, server):
    models = {model["id"]: model for model in client.iter_models(with_images=True, images_per_version=2)}
    assert models[1]["modelVersions"][0]["images"] == [image(100, "a fox")]
    assert models[2]["modelVersions"][0]["images"] == [
        {"id": 900, "url": "https://image.civitai.com/x/900.jpeg", "hash": "UB", "width": 640, "height": 960,
         "nsfw": "None", "nsfwLevel": 1, "meta": {"prompt": "nested"}},
        {"id": 901, "url": "https://image.civitai.com/x/901.jpeg", "hash": "UC", "width": 8, "height": 8,
         "nsfw": "Soft", "nsfwLevel": 2, "meta": {"prompt": "flat", "id": 3}},
    ]  # fmt: skip
    asked = [entry["query"] for entry in server.log if entry["path"] == "/api/v1/images"]
    assert [query["modelVersionId"] for query in asked] == [["20"], ["20"], ["30"]]
    assert all(q["nsfw"] == ["false"] and q["withMeta"] == ["true"] and q["limit"] == ["2"] for q in asked)


def test_keeps_embedded_images_when_the_gallery_is_gone_or_empty(client, server):
    server.pages = {None: ([model(2, image(200)), model(3, image(300))], None)}
    server.faults = [None, (404, "gone")]
    models = list(client.iter_models(with_images=True))
    assert [model["modelVersions"][0]["images"] for model in models] == [[image(200)], [image(300)]]


def test_page_limit_of_images_is_200(client, server):
    assert ids(client.iter_images(20, max_images=1000)) == [900, 901, 902]
    assert server.log[0]["query"]["limit"] == ["200"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>blocked</html>", "not JSON"),
        ('{"metadata": {}}', "no list `items`"),
        ('{"items": null}', "no list `items`"),
        ('{"items": ["x"]}', "no list `items`"),
        ('{"items": [], "metadata": [1]}', "`metadata`"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_bodies_are_asked_for_three_times_and_never_cached(client, server, tmp_path, body, reason):
    server.faults = [(200, body)] * 3
    with pytest.raises(RequestError, match=f"{reason}.*asked 3 times.*/models"):
        list(client.iter_models())
    assert len(server.log) == 3 and not list(tmp_path.iterdir())


def test_cursor_loop_is_an_error_and_heals_when_the_site_does(client, server):
    server.pages = {None: ([model(1)], "a"), "a": ([model(2)], "b"), "b": ([model(3)], "a")}
    found = []
    with pytest.raises(RequestError, match="cursor loop, `nextCursor` 'a'"):
        found.extend(model["id"] for model in client.iter_models())
    assert server.asked() == [None, "a", "b"]

    server.pages = PAGES | {"b": ([model(3)], None), "a": ([], "b")}
    assert ids(client.iter_models()) == [1, 2, 3]
    assert server.asked() == [None, "a", "b", "b"]  # only the page of the loop was asked for again


def test_restart_after_an_exception_asks_only_for_missing_pages(client, server, tmp_path):
    server.faults = [None, (403, "no")]
    with pytest.raises(RequestError):
        list(client.iter_models())
    with CivitaiClient(server.url, cache_dir=tmp_path) as again:
        assert ids(again.iter_models()) == [1, 2, 3, 4, 5]
        assert ids(again.iter_models()) == [1, 2, 3, 4, 5]
    second, third = "75363|932023|257749", "11|22|33"
    assert server.asked() == [None, second, second, third]


CRAWL = """
import sys
from align.bench.civitai_api import CivitaiClient
with CivitaiClient(sys.argv[1], cache_dir=sys.argv[2]) as client:
    for model in client.iter_models():
        print(model["id"], flush=True)
"""


def test_sigkill_while_paging_repeats_at_most_one_page(server, tmp_path):
    cursors = [None, *(f"c{page}" for page in range(1, 100)), None]
    server.pages = {cursors[page]: ([model(page + 1)], cursors[page + 1]) for page in range(100)}
    command = [sys.executable, "-c", CRAWL, server.url, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        for _ in range(20):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = server.asked()
    assert 20 <= len(before) < 100

    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == [str(i + 1) for i in range(100)]
    after = server.asked()[len(before) :]
    assert len(set(before) & set(after)) <= 1
    assert sorted(set(before) | set(after), key=str) == sorted(server.pages, key=str)
    assert len(after) == len(set(after))


def test_resolve_hashes_takes_the_oldest_version_and_leaves_out_unknown_ones(client, server):
    resolved = client.resolve_hashes([SHA["B"], SHA["A"].lower(), SHA["D"], SHA["A"]])
    assert resolved == {SHA["A"]: (6, 60), SHA["B"]: (8, 80)}
    assert server.log[0]["body"] == [SHA["A"], SHA["B"], SHA["D"]]
    # Neither order nor case is part of the question.
    assert client.resolve_hashes(iter([SHA["D"], SHA["A"], SHA["B"].lower()])) == resolved
    assert len(server.log) == 1


def test_resolve_hashes_asks_ten_thousand_at_a_time(client, server):
    client.resolve_hashes(f"{number:064X}" for number in range(20_001))
    assert [len(entry["body"]) for entry in server.log] == [10_000, 10_000, 1]
    assert client.resolve_hashes([]) == {}
    assert len(server.log) == 3


@pytest.mark.parametrize("bad", ["ABCDEF0123", "Z" * 64, SHA["A"] + "\n", "", 5])
def test_resolve_hashes_names_what_is_no_sha256(client, server, bad):
    with pytest.raises(ValueError, match="64 hexadecimal digits, but got") as caught:
        client.resolve_hashes([SHA["A"], bad])
    assert repr(bad) in str(caught.value)
    assert not server.log


def test_resolve_hashes_refuses_rows_of_another_shape(client, server):
    server.faults = [(200, "[70, 60]")] * 3  # what the route returned in its first version
    with pytest.raises(RequestError, match="modelVersionId, modelId, hash"):
        client.resolve_hashes([SHA["A"]])


def test_version_by_hash_caches_hits_and_misses(client, server):
    for _ in range(2):
        assert client.version_by_hash("abcdef0123") == {"id": 80, "modelId": 8}
        assert client.version_by_hash("0" * 64) is None
    assert [entry["path"].rpartition("/")[2] for entry in server.log] == ["ABCDEF0123", "0" * 64]


@pytest.mark.parametrize("bad", ["", "ABCDEF012", "../models", "G" * 8, "A" * 63])
def test_version_by_hash_refuses_what_is_no_hash(client, server, bad):
    with pytest.raises(ValueError, match="8, 10, 12 or 64 hexadecimal digits"):
        client.version_by_hash(bad)
    assert not server.log


def test_bad_query_arguments_are_refused_before_anything_is_asked(client, server):
    with pytest.raises(ValueError, match="`limit`"):
        client.iter_models(limit=101)
    with pytest.raises(ValueError, match="`types` must be a sequence"):
        client.iter_models(types="LORA")
    with pytest.raises(ValueError, match="`images_per_version`"):
        client.iter_models(with_images=True, images_per_version=0)
    assert not server.log
