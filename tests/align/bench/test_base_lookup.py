"""Base checkpoints looked up by hash, against a local server that speaks Civitai's routes."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.bench.base_lookup import look_up_bases, missing_hashes
from align.bench.civitai_api import CivitaiClient
from align.bench.config import DABenchConfig

SHA = {name: (name * 64)[:64].upper() for name in "abcdef"}


def model(model_id, sha256, name):
    """A raw `/models` object of one checkpoint version; version ids are model ids plus 1000."""
    file = {
        "type": "Model",
        "name": f"{name}.safetensors",
        "downloadUrl": f"https://example.org/{model_id}",
        "metadata": {"format": "SafeTensor"},
        "pickleScanResult": "Success",
        "virusScanResult": "Success",
        "hashes": {"AutoV2": sha256[:10], "SHA256": sha256},
    }
    image = {"id": 1, "nsfw": "None", "meta": {"prompt": "x"}}
    version = {"id": model_id + 1000, "name": "v1", "baseModel": "SD 1.5", "files": [file], "images": [image]}
    return {"id": model_id, "name": name, "type": "Checkpoint", "nsfw": False, "modelVersions": [version]}


MODELS = {7: model(7, SHA["a"], "Found by AutoV2"), 8: model(8, SHA["b"], "Found by SHA256")}


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            data = json.dumps(body if body is not None else {"error": "none"}).encode()
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            asked.append(self.path)
            kind, value = self.path.rsplit("/", 2)[1:]
            by_hash = {SHA["a"][:10]: {"id": 1007, "modelId": 7}}
            self.answer(by_hash.get(value) if kind == "by-hash" else MODELS.get(int(value)))

        def do_POST(self):
            asked.append(self.path)
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = {SHA["b"]: {"modelVersionId": 1008, "modelId": 8, "hash": SHA["b"]}}
            self.answer([known[value] for value in wanted if value in known])

        def log_message(self, *_):
            """Quiet."""

    asked = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/api/v1", asked
    http.shutdown()


def part(*images_hashes, hashes=(), unavailable=()):
    images = [{"checkpoint_hashes": list(value)} for value in images_hashes]
    return {
        "versions": [{"model_id": 1, "hashes": list(hashes), "images": images}],
        "unavailable": [{"model_id": 2, "hashes": list(unavailable)}],
    }


def test_missing_hashes_are_those_no_version_has():
    long, short, old = SHA["c"], SHA["c"][:10], "12345678"
    parts = [
        part((SHA["a"][:10],), (SHA["d"], SHA["d"][:10]), (old,), (SHA["e"],), hashes=[SHA["d"][:10]]),
        part((long, short), (long, short), unavailable=[SHA["e"]]),
    ]
    # d is known by its short form, e exists but can't be called, eight digits are no identity, c is named twice.
    assert missing_hashes(parts) == sorted([SHA["a"][:10], long])


def test_found_models_become_a_part_without_images(server, tmp_path):
    url, asked = server
    (tmp_path / "part-0.json").write_text(json.dumps(part((SHA["a"][:10],), (SHA["b"],), (SHA["f"],))))
    config = DABenchConfig(source="s", output="o")
    with CivitaiClient(url, cache_dir=tmp_path / "cache") as client:
        path = look_up_bases([tmp_path / "part-0.json"], client, config, tmp_path / "part-bases.json")
        found = json.loads(path.read_bytes())
        assert [(v["version_id"], v["model_name"]) for v in found["versions"]] == [
            (1007, "Found by AutoV2"),
            (1008, "Found by SHA256"),
        ]
        assert all(v["images"] == [] and v["looked_up"] for v in found["versions"])
        stage = found["funnel"]["looked-up bases"]
        assert (stage["in"], stage["out"], stage["removed"]) == (3, 2, {"hash_unknown": 1})
        asked.clear()
        assert look_up_bases([tmp_path / "part-0.json"], client, config, path) == path
        assert asked == [], "what is there is not asked for again"
