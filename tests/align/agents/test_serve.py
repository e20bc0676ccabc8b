"""`python -m align.agents.serve` as a process of its own, asked by OpenAI's client, httpx, curl and raw sockets."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest

from align.agents import CallFilter
from align.agents.service import AgentService, CallRequest
from rollouts.api import APICall
from rollouts.catalog import Catalog

pytestmark = pytest.mark.slow  # every test talks to a server of its own process

LEARNED = {"a fox in pixel art": "Pixel Wave - v10", "letters": "שלום - v2"}
TOKEN = "s3cret"


def start(folder, policy, *options, token=TOKEN):
    """Start the command; returns its process and, once it serves, its URL."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "align.agents.serve", "--model_name_or_path", policy, "--port", "0"]
    command += ["--catalog", folder / "catalog.jsonl", "--device", "cpu", *options]
    environment = os.environ | ({"T2I_ALIGN_TOKEN": token} if token else {})
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=log.open("w"), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while (match := re.search(r"^Serving \d+ models at (http://\S+:\d+)\.$", log.read_text(), re.MULTILINE)) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return SimpleNamespace(process=process, url=match[1], log=log, folder=folder)


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    assert server.process.stdout.read() == b""


@pytest.fixture(scope="module")
def folder_of(policy, dialogue, shop, tmp_path_factory):
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        policy.save_pretrained(folder / "policy")
        dialogue.tokenizer.save_pretrained(folder / "policy")
        dialogue.form.save(folder / "policy")
        shop.save(folder / "catalog.jsonl")
        return folder

    return make


@pytest.fixture(scope="module")
def server(folder_of):
    folder = folder_of("server")
    server = start(
        folder, folder / "policy", "--max_prompts", 8, "--max_prompt_chars", 500, "--max_body_bytes", 20_000,
        "--max_queue", 16, "--body_timeout", 1.0, "--watch_seconds", 0,
    )  # fmt: skip
    yield server
    stop(server)


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as client:
        yield client


def test_call(client, shop):
    body = {"prompt": list(LEARNED), "top_k": 2, "formats": ["a1111", "infotext", "comfyui", "diffusers"], "seed": 4}
    answers = client.post("/call", json=body).raise_for_status().json()["answers"]
    for (prompt, model), answer in zip(LEARNED.items(), answers, strict=True):
        assert answer["prompt"] == prompt and answer["call"] == shop[model].default_call().to_dict()
        assert answer["alternatives"][0]["model"] == model and 0.9 < answer["confidence"] <= 1
        assert answer["a1111"]["seed"] == 4 and answer["comfyui"]["sampler"]["inputs"]["seed"] == 4
        assert "Steps: 20" in answer["infotext"] and "import torch" in answer["diffusers"]
    answer = client.post("/call", json={"prompt": "a fox", "filter": {"type": "LoRA"}}).json()["answers"][0]
    assert answer["call"]["type"] == "LoRA" and "a1111" not in answer
    assert client.get("/health").json() == {"status": "ready", "models": len(shop)}


def test_openais_client(server, shop):
    openai = pytest.importorskip("openai", reason="needs the extra `bench`")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
    tools = httpx.get(f"{server.url}/tools", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    messages = [
        {"role": "system", "content": "Draw."},
        {"role": "user", "content": "something else"},
        {"role": "user", "content": [{"type": "text", "text": "a fox in pixel art"}]},
    ]
    done = client.chat.completions.create(model="any", messages=messages, tools=tools, temperature=0)
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == tools[0]["function"]["name"] == "text_to_image"
    assert APICall.from_json(call.function.arguments) == shop["Pixel Wave - v10"].default_call()
    assert set(json.loads(call.function.arguments)) == set(tools[0]["function"]["parameters"]["properties"])
    assert done.usage.completion_tokens > 20 and done.usage.total_tokens > done.usage.completion_tokens
    lora = client.chat.completions.create(model="any", messages=messages, extra_body={"filter": {"type": "LoRA"}})
    assert json.loads(lora.choices[0].message.tool_calls[0].function.arguments)["type"] == "LoRA"
    assert [model.id for model in client.models.list()] == ["text_to_image"]
    with pytest.raises(openai.AuthenticationError, match="the token is wrong"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="guess", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="`stream` is not supported"):
        client.chat.completions.create(model="any", messages=messages, stream=True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    command = [
        "curl",
        "-sS",
        "-H",
        f"Authorization: Bearer {TOKEN}",
        "-d",
        '{"prompt": "letters"}',
        f"{server.url}/call",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout)["answers"][0]["call"]["model"] == LEARNED["letters"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 10_000, 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[1]", 400, "the body must be a JSON object, but is list"),
        ({}, 400, "`prompt` must be text or a list of texts"),
        ({"prompt": []}, 400, "`prompt` must be text or a list of texts"),
        ({"prompt": 3}, 400, "`prompt` must be text or a list of texts"),
        ({"prompt": ["a", 3]}, 400, "`prompt` must be text, but is int"),
        ({"prompt": "a", "negative_prompt": None}, 400, "`negative_prompt` must be text"),
        (b'{"prompt": "a \\ud800 b"}', 400, "`prompt` holds half a surrogate pair"),
        ({"prompt": "x" * 501}, 413, "`prompt` has 501 characters; 500 are allowed"),
        ({"prompt": ["a"] * 9}, 413, "`prompt` holds 9 texts; 8 are allowed"),
        ({"prompt": "a", "promt": 1}, 400, "unknown field 'promt'; a request may hold prompt, negative_prompt"),
        ({"prompt": "a", "top_k": -1}, 400, "`top_k` must be a whole number from 0 to 50, but is -1"),
        ({"prompt": "a", "top_k": True}, 400, "`top_k` must be a whole number"),
        ({"prompt": "a", "formats": ["png"]}, 400, "`formats` must be a list of any of a1111"),
        ({"prompt": "a", "filter": "x"}, 422, "`filter` must be an object"),
        ({"prompt": "a", "filter": {"allow": ["no"]}}, 422, "`allow` names ['no'], which the catalogue does not have"),
        ({"prompt": "a", "filter": {"max_seconds": 1e-9}}, 422, "The filter leaves nothing to call"),
    ],
)
def test_what_is_no_request_is_refused_by_name(client, body, status, message):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post("/call", **given)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "`messages` must be a list of objects"),
        ([], "`messages` has no message of the role `user`"),
        ([{"role": "system", "content": "x"}], "`messages` has no message of the role `user`"),
        ([{"role": "user", "content": " "}], "the last message of the role `user` has no text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "the last message of the role `user` has no text"),
    ],
)
def test_what_is_no_chat_is_refused_by_name(client, messages, message):
    answer = client.post("/v1/chat/completions", json={"model": "x", "messages": messages})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_nobody_without_the_token_and_no_other_routes(server):
    for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": TOKEN}):
        for method, path in [("POST", "/call"), ("POST", "/v1/chat/completions"), ("GET", "/tools"),
                             ("GET", "/v1/models"), ("POST", "/catalog/reload")]:  # fmt: skip
            answer = httpx.request(method, server.url + path, headers=headers, content=b"{}")
            assert answer.status_code == 401 and "token" in answer.text.lower(), (path, headers)
    assert httpx.get(f"{server.url}/health").status_code == 200
    for path in ("/docs", "/openapi.json", "/call/../../etc/passwd"):
        assert httpx.get(server.url + path).status_code in (404, 405)


def test_too_large_and_too_slow_bodies(server, client):
    answer = client.post("/call", content=b" " * 20_001)
    assert answer.status_code == 413 and "20,000 bytes" in answer.json()["error"]
    chunked = client.post("/call", content=(b" " * 5_000 for _ in range(10)))
    assert chunked.status_code == 413
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as slow:
        slow.sendall(
            f"POST /call HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 50\r\n\r\n{{".encode()
        )
        assert b"408" in slow.recv(4096).split(b"\r\n")[0]


def test_many_at_once_get_their_own_answers(server, client):
    prompts = list(LEARNED) * 20

    def ask(prompt):
        while True:
            answer = client.post("/call", json={"prompt": prompt})
            if answer.status_code != 503:  # 16 at a time; the others try again
                return answer.json()["answers"][0]
            time.sleep(0.02)

    with ThreadPoolExecutor(24) as pool:
        for prompt, answer in zip(prompts, pool.map(ask, prompts), strict=True):
            assert answer["call"]["model"] == LEARNED[prompt]


def test_exports_are_of_the_catalogue_that_was_asked(agent_of, shop):
    agent = agent_of()
    service = AgentService(agent)
    request = CallRequest(({"prompt": "a fox in pixel art", "negative prompt": ""},), CallFilter(), 0, ("a1111",))
    answers = agent.answer(request.instructions)
    agent.reload(Catalog([entry for entry in shop.values() if entry.name != "Pixel Wave - v10"]))
    written = service._written(request.instructions[0], answers[0], request)
    assert written["call"]["model"] == "Pixel Wave - v10" and written["a1111"]["steps"] == 20
    service.close()


def test_a_catalogue_that_changes_is_read_again(folder_of, shop):
    folder = folder_of("reloaded")
    server = start(folder, folder / "policy", "--watch_seconds", 0.1, token=None)
    try:

        def models():
            return httpx.get(f"{server.url}/health").json()["models"]

        def until(count):
            deadline = time.monotonic() + 20
            while models() != count:
                assert time.monotonic() < deadline, server.log.read_text()
                time.sleep(0.05)

        rest = Catalog([entry for entry in shop.values() if entry.name != "Pixel Wave - v10"])
        rest.save(folder / "catalog.jsonl")
        until(len(shop) - 1)
        answer = httpx.post(f"{server.url}/call", json={"prompt": "a fox in pixel art"}).json()["answers"][0]
        assert answer["call"]["model"] in rest
        (folder / "catalog.jsonl").write_text("no catalogue\n")
        while "the old one stays" not in server.log.read_text():
            time.sleep(0.05)
        refused = httpx.post(f"{server.url}/catalog/reload")
        assert refused.status_code == 409 and "the old catalogue stays" in refused.json()["error"]
        assert models() == len(rest)
        shop.save(folder / "catalog.jsonl")
        assert httpx.post(f"{server.url}/catalog/reload").json() == {"models": len(shop)}
    finally:
        stop(server)


def test_what_was_accepted_is_answered_before_the_end(folder_of):
    folder = folder_of("stopped")
    # Requests wait a second for company, so that the signal finds them in the queue.
    server = start(folder, folder / "policy", "--max_wait_ms", 1000, token=None)
    answers = []

    def ask():
        answers.append(httpx.post(f"{server.url}/call", json={"prompt": "letters"}, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop(server)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert {answer.json()["answers"][0]["call"]["model"] for answer in answers} == {LEARNED["letters"]}


def test_a_public_address_needs_a_token(folder_of):
    folder = folder_of("public")
    command = [sys.executable, "-m", "align.agents.serve", "--model_name_or_path", folder / "policy", "--catalog",
               folder / "catalog.jsonl", "--host", "0.0.0.0", "--port", "0"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "T2I_ALIGN_TOKEN"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "can be reached from other machines" in done.stderr
