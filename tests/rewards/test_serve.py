"""`python -m rewards.serve` as a process of its own: right scores under load, and an end that loses nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rewards import load_scorer
from rewards.client import RemoteScorer
from rewards.commandline import ConfigError, parse_config
from rewards.serve import RewardServiceConfig, bind, main, read_token
from rewards.wire import JSON, pack

REPOSITORY = Path(__file__).parents[2]
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SLOW_SCORER = '''
import time

import torch


def load(*, checkpoint=None, config=None, tokenizer=None, device=None, dtype=None, seconds=0.0):
    """Number + grey value after some seconds."""

    def score(prompts, images):
        time.sleep(seconds)
        return torch.tensor([float(p) + image.getpixel((0, 0)) for p, image in zip(prompts, images, strict=True)])

    return score
'''


def start(folder, **config):
    """Start the command; returns its process and, once it serves, its URL."""
    (folder / "slow_scorer.py").write_text(SLOW_SCORER)
    (folder / "serve.yaml").write_text(yaml.safe_dump({"port": 0} | config))
    log = folder / "log.txt"
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.serve", "--config", str(folder / "serve.yaml")],
        env=os.environ | {"PYTHONPATH": str(folder), "T2I_ALIGN_TOKEN": "s3cret"},
        stderr=log.open("w"),
    )
    deadline = time.monotonic() + 60
    while (match := re.search(r"^Serving .* at (http://\S+:\d+)\.$", log.read_text(), re.MULTILINE)) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return SimpleNamespace(process=process, url=match[1], log=log)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of `load_scorer` for HPS v2 at toy size."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "hps.safetensors"
    save_file(open_clip.CLIP(**TINY).state_dict(), path)
    return {"name": "hps_v2", "checkpoint": str(path), "config": TINY, "device": "cpu"}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    slow = {"name": "slow_scorer:load", "as": "slow", "seconds": 0.2}
    server = start(
        tmp_path_factory.mktemp("server"), scorers=[tiny, slow], max_queue=6, max_batch=16, max_body_bytes=200_000
    )
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def pictures(number):
    """Noise of different shapes and modes."""
    rng = np.random.default_rng(number)
    sizes = [(int(width), int(height)) for width, height in rng.integers(8, 60, (6, 2))]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]
    return [image.convert(mode) for image, mode in zip(images, ("RGB", "RGBA", "L", "P", "LA", "RGB"), strict=True)]


def test_every_score_is_right_under_load(server, tiny):
    """Eight clients at once with pairs of their own, while others send rubbish, hang up or have no token."""
    local = load_scorer(**tiny)
    shared = Image.fromarray(np.random.default_rng(99).integers(0, 256, (40, 40, 3), np.uint8))
    got, failures, done = {}, [], threading.Event()

    def client(number):
        remote = RemoteScorer(server.url, "hps_v2", token="s3cret", retries=30, batch_size=3, in_flight=2)
        try:
            images = [*pictures(number), shared, shared]
            for turn in range(3):
                prompts = [f"client {number} turn {turn} picture {i}" for i in range(len(images))]
                got[number, turn] = (prompts, images, remote(prompts, images))
        except Exception as error:
            failures.append(error)
        finally:
            remote.close()

    def vandal():
        good = {"Authorization": "Bearer s3cret", "Content-Type": JSON}
        message = pack({"prompts": ["1"], "images": [_png(1)]}, JSON)
        address = f"{server.url}/score/hps_v2"
        with httpx.Client(trust_env=False) as http:
            while not done.is_set():
                statuses = [
                    http.post(address, content=b"{", headers=good).status_code,
                    http.post(address, content=message, headers=good | {"Authorization": "Bearer x"}).status_code,
                    http.post(address, content=b"x" * 300_000, headers=good).status_code,
                ]
                if any(
                    status not in (expected, 503) for status, expected in zip(statuses, (400, 401, 413), strict=True)
                ):
                    failures.append(statuses)
                with suppress(httpx.TimeoutException):  # hangs up before it has its answer
                    httpx.post(f"{server.url}/score/slow", content=message, headers=good, timeout=0.02, trust_env=False)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    enemy = threading.Thread(target=vandal)
    for thread in (enemy, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    enemy.join(20)
    assert failures == [] and len(got) == 24
    for prompts, images, scores in got.values():
        torch.testing.assert_close(scores, local(prompts, images), rtol=0, atol=1e-6)
    every = torch.stack([scores for _, _, scores in got.values()])
    assert every.std() > 1e-3  # scores that are all alike would prove nothing
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer s3cret"}, trust_env=False).text
    total = {
        name: float(value) for name, value in re.findall(r'^t2i_reward_(\w+){scorer="hps_v2"} (\S+)$', metrics, re.M)
    }
    assert total["pairs_total"] == 24 * 8 and total["row_errors_total"] == 0
    assert total["batch_pairs_count"] < 24 * 3  # each call of a client is three requests: some were merged


def test_remote_and_local_describe_themselves_alike(server, tiny):
    remote = RemoteScorer(server.url, "hps_v2", token="s3cret", retries=0)
    assert remote.describe() == load_scorer(**tiny).describe()
    assert len(remote.describe()["sha256"]) == 64


def test_sigterm_during_a_batch(tmp_path):
    """What was accepted is answered rightly, what comes later is refused or finds nobody, and the exit code is 0."""
    slow = {"name": "slow_scorer:load", "as": "slow", "seconds": 0.5}
    server = start(tmp_path, scorers=[slow], max_batch=2, max_wait_ms=0)
    answers = {}

    def ask(number):
        body = pack({"prompts": [str(number)], "images": [_png(number)]}, JSON)
        headers = {"Authorization": "Bearer s3cret", "Content-Type": JSON}
        answers[number] = httpx.post(
            f"{server.url}/score/slow", content=body, headers=headers, timeout=20, trust_env=False
        )

    def in_flight():
        metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer s3cret"}, trust_env=False).text
        return int(re.search(r"^t2i_reward_in_flight_requests (\d+)$", metrics, re.M)[1])

    idle = httpx.Client(trust_env=False)  # a connection that is kept open must not hold the service up
    assert idle.get(f"{server.url}/health").status_code == 200
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while in_flight() < 6:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    assert server.process.wait(10) == 0, server.log.read_text()
    assert {number: answer.json()["scores"] for number, answer in answers.items()} == {n: [2.0 * n] for n in range(6)}
    assert "every accepted request was answered" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    with pytest.raises(httpx.TransportError):
        idle.get(f"{server.url}/health")
    idle.close()


def _png(value):
    file = BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def test_the_config_file():
    path = REPOSITORY / "configs/rewards/serve.yaml"
    config = parse_config(RewardServiceConfig, args=["--config", str(path), "--port", "0"])
    assert config.port == 0 and config.max_wait_ms == 5.0
    assert config.scorers == [
        {"name": "image_reward", "as": "image_reward"},
        {"name": "hps_v2", "version": "v2.1", "as": "hps_v2"},
    ]
    text = path.read_text()
    assert text.startswith("# ") and "python -m rewards.serve --config configs/rewards/serve.yaml" in text
    assert RewardServiceConfig(["clip_score"]).scorers == [{"name": "clip_score", "as": "clip_score"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": []}, "`scorers` is empty"),
        ({"scorers": ["clip_score", {"name": "clip_score"}]}, "serves clip_score twice; give one of them another name"),
        ({"scorers": [{"checkpoint": "x"}]}, "must hold names or mappings with a `name`, but got {'checkpoint': 'x'}"),
        ({"scorers": [3]}, "but got 3"),
        (
            {"scorers": [{"name": "clip_score", "as": "a/b"}]},
            "letters, digits and . : _ -; give 'a/b' another with `as`",
        ),
        ({"port": 65536}, "`port` must be from 0 to 65535, but got 65536"),
        ({"max_queue": 0}, "`max_queue` must be at least 1, but got 0"),
        ({"max_pixels": 10**9}, "`max_pixels` must be at most 89,478,485"),
        ({"max_wait_ms": -1.0}, "`max_wait_ms` must be from 0 to 60000, but got -1.0"),
        ({"body_timeout": float("nan")}, "`body_timeout` must be more than 0, but got nan"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        RewardServiceConfig(**{"scorers": ["clip_score"]} | options)


def test_tokens(monkeypatch):
    monkeypatch.delenv("T2I_ALIGN_TOKEN", raising=False)
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert read_token(RewardServiceConfig(["clip_score"], host=host)) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-7"):
        with pytest.raises(ConfigError, match=rf"`host` {host} can be reached .* T2I_ALIGN_TOKEN .* `allow_no_token"):
            read_token(RewardServiceConfig(["clip_score"], host=host))
    assert read_token(RewardServiceConfig(["clip_score"], host="0.0.0.0", allow_no_token=True)) is None
    monkeypatch.setenv("MY_TOKEN", "abc")
    assert read_token(RewardServiceConfig(["clip_score"], host="0.0.0.0", token_env="MY_TOKEN")) == "abc"
    for bad in ("", "a b", "é"):
        monkeypatch.setenv("T2I_ALIGN_TOKEN", bad)
        with pytest.raises(ConfigError, match="token in T2I_ALIGN_TOKEN must be printable ASCII"):
            read_token(RewardServiceConfig(["clip_score"]))


def test_what_can_not_be_served(tmp_path, monkeypatch):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"Can't listen at `host` 127.0.0.1, `port` {port}: Address already in use"
        ):
            main(RewardServiceConfig(["clip_score"], port=port))
    with pytest.raises(ConfigError, match="Can't listen at `host` no.such.host.invalid"):
        main(RewardServiceConfig(["clip_score"], host="no.such.host.invalid", allow_no_token=True))
    for entry, message in [
        ("clip_scor", "`scorers`: clip_scor: There is no scorer `clip_scor`.*Did you mean `clip_score`"),
        ({"name": "hps_v2", "checkpoint": "gone.pt"}, "`scorers`: hps_v2: There is no checkpoint at gone.pt"),
        ({"name": "hps_v2", "sise": 3}, "`scorers`: hps_v2: hps_v2 has no option `sise`"),
    ]:
        with pytest.raises(ConfigError, match=message):
            main(RewardServiceConfig([entry], port=0))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r'Serving needs `pip install "t2i-align\[serve\]"`'):
        main(RewardServiceConfig(["clip_score"], port=0))
