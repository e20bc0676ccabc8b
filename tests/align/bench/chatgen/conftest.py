"""An OpenAI-compatible endpoint on this machine, demonstrations, and the sentence encoder."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.bench.chatgen.roles import ROLES
from align.bench.chatgen.schema import ChatTask, Demonstration, Reference

PROMPT = "masterpiece, best quality, a red fox in the snow, winter forest, watercolor, soft light, detailed fur"


def completion(content, usage=(100, 20)):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.log.append({"body": body, "key": self.headers["Authorization"], "path": self.path})
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.delay)
        if fault == "hang":
            time.sleep(1.5)
            self.close_connection = True
            return
        status, headers, payload = fault or (200, {}, completion(server.answer(body)))
        data = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        try:
            self.send_response(status)
            for key, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the asker was killed
            return
        with server.lock:
            server.answered.append(body)

    def log_message(self, *args):
        pass


class ChatServer(ThreadingHTTPServer):
    """Answers what `answer(body)` says, after the `faults` that are lined up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.lock = threading.Lock()
        self.log, self.answered, self.faults = [], [], []
        self.delay = 0.0
        self.answer = lambda body: "Could you draw me a little fox out in the cold?"
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """An asker that was killed has hung up."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def make_demonstration(name="7-1", **fields):
    arguments = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7.0, "width": 512, "height": 512, "clip_skip": None}
    given = {"prompt": PROMPT, "negative_prompt": "blurry", "model": "Fox Painter - v1", "arguments": arguments}
    given |= {"base_model": "SD 1.5", "description": "Foxes in watercolour.", "image": f"https://i.example.org/{name}"}
    given |= {"source": {"model_id": 7, "version_id": 70, "image_id": name}}
    return Demonstration(name, **(given | fields))


def make_task(number=0, targets=(PROMPT,), kind="single", role=ROLES[30], **fields):
    demonstration = fields.pop("demonstration", None) or make_demonstration()
    reference = Reference("https://i.example.org/9", "a fox in summer") if kind == "multimodal" else None
    return ChatTask(demonstration, number, role, kind, targets, **({"reference": reference} | fields))


@pytest.fixture
def demonstration():
    return make_demonstration


@pytest.fixture
def task():
    return make_task
