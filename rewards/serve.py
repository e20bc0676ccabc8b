"""Serve rewards over HTTP, so that they can live on a GPU of their own.

    export T2I_ALIGN_TOKEN=$(openssl rand -hex 32)
    python -m rewards.serve --config configs/rewards/serve.yaml --host 0.0.0.0

and elsewhere, with the same token in the environment:

    scorer = rewards.load_scorer("remote", url="http://gpu-7:8300", scorer="hps_v2")

Requests that wait for the same scorer are merged into one batch. SIGTERM ends the service after everything it accepted
has been answered; a second SIGINT (Ctrl-C) ends it at once.
"""

import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Protocol

from PIL import Image

from rewards.commandline import ConfigError, run_command
from rewards.gate import Gate
from rewards.images import MAX_PIXELS
from rewards.registry import load_scorer
from rewards.score_queue import ScoreQueue
from rewards.service import RewardService, ServedScorer, build_app
from rewards.wire import Limits, import_msgpack

logger = logging.getLogger(__name__)

SERVED_NAME = re.compile(r"[\w.:-]+")
"""Names that stand in a URL as they are."""


@dataclass
class RewardServiceConfig:
    """Options of `python -m rewards.serve`."""

    scorers: list[Any] = field(
        metadata={
            "help": "What to serve: names, or mappings of the arguments of `rewards.load_scorer` (name, checkpoint, "
            "config, dtype, ...) with an optional `as`, the name in the URL. Can be given in the YAML file only."
        }
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 and ::: every one."})
    port: int = field(default=8300, metadata={"help": "TCP port; 0: any free one, which is logged."})
    token_env: str = field(
        default="T2I_ALIGN_TOKEN", metadata={"help": "Environment variable with the token that clients must send."}
    )
    allow_no_token: bool = field(
        default=False, metadata={"help": "Serve without a token on other addresses than this machine's own."}
    )
    max_body_bytes: int = field(default=2**26, metadata={"help": "Bytes of a request's body."})
    max_pixels: int = field(default=2**24, metadata={"help": "Width x height of an image."})
    max_images: int = field(default=256, metadata={"help": "Images of a request."})
    max_pairs: int = field(default=1024, metadata={"help": "Pairs of prompt and image of a request."})
    max_queue: int = field(
        default=64,
        metadata={
            "help": "Requests accepted at a time (all scorers); more get 503. Bounds memory with max_body_bytes."
        },
    )
    max_batch: int = field(default=64, metadata={"help": "Pairs that requests are merged up to."})
    max_wait_ms: float = field(
        default=5.0, metadata={"help": "Milliseconds a request waits for others while its scorer is idle; 0: none."}
    )
    body_timeout: float = field(default=60.0, metadata={"help": "Seconds in which a request's body must arrive."})

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_pixels", "max_images", "max_pairs", "max_queue", "max_batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` must be from 0 to 65535, but got {self.port}.")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"`max_pixels` must be at most {MAX_PIXELS:,}, which no scorer decodes more than.")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(f"`max_wait_ms` must be from 0 to 60000, but got {self.max_wait_ms}.")
        if not self.body_timeout > 0:
            raise ValueError(f"`body_timeout` must be more than 0, but got {self.body_timeout}.")
        self.scorers = [_scorer_arguments(entry) for entry in self.scorers]
        names = [arguments["as"] for arguments in self.scorers]
        if not names:
            raise ValueError("`scorers` is empty; name at least one, for example `scorers: [hps_v2]`.")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"`scorers` serves {twice} twice; give one of them another name with `as`.")


def main(config: RewardServiceConfig) -> None:
    """Load the scorers and serve them until SIGTERM or SIGINT."""
    check_extra_is_installed()
    token = read_token(config)
    listener = bind(config.host, config.port)  # before the weights are loaded: a taken port is told at once
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # larger images are refused
    service = RewardService(
        limits=Limits(config.max_body_bytes, config.max_pixels, config.max_images, config.max_pairs),
        max_queue=config.max_queue,
        token=token,
        body_timeout=config.body_timeout,
    )
    for arguments in config.scorers:
        service.scorers[arguments["as"]] = _load(arguments, config, service)
    sys.exit(run(service, build_app(service), listener, ", ".join(service.scorers)))


def run(service: Gate, app: Any, listener: socket.socket, what: str) -> int:
    """Serve on a bound socket until a signal comes; returns the exit code, 0 if everything accepted was answered.

    Args:
        service: What `app` serves; it is told when it has to stop.
        app: ASGI application.
        listener: See `bind`.
        what: For the log.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            logger.info("Serving %s at http://%s:%d.", what, f"[{host}]" if ":" in host else host, port)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.stopping = True  # requests on connections that are still open get 503
            super().handle_exit(sig, frame)

    uvicorn_config = uvicorn.Config(
        app,
        http="h11",  # also where a faster one is installed: what is tested is what runs
        loop="asyncio",
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep idle connections, or they would send into closing ones
        access_log=False,
        log_config=None,
        log_level="warning",
    )
    server = Server(uvicorn_config)

    def stop(sig: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # For signals before uvicorn has handlers of its own, and because it raises what it caught again when it has
    # finished, which by default would kill the process: exit code -15.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    logger.info("Stopped at once." if server.force_exit else "Stopped; every accepted request was answered.")
    return 130 if server.force_exit else 0


class Listening(Protocol):
    """Options of every command that serves."""

    host: str
    token_env: str
    allow_no_token: bool


def read_token(config: Listening) -> str | None:
    """The token from the environment.

    Raises:
        ConfigError: None where one is needed, or one that can't stand in an HTTP header.
    """
    token = os.environ.get(config.token_env)
    if token is None:
        if not (config.allow_no_token or _is_loopback(config.host)):
            raise ConfigError(
                f"`host` {config.host} can be reached from other machines: set the environment variable "
                f"{config.token_env} to a secret token, or `allow_no_token: true`."
            )
        return None
    if not token or not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"The token in {config.token_env} must be printable ASCII without spaces, and not empty.")
    return token


def bind(host: str, port: int) -> socket.socket:
    """A socket that has an address but refuses connections until the server is ready.

    Raises:
        ConfigError: Unknown host or a port that is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"Can't listen at `host` {host}, `port` {port}: {error.strerror}.") from error
    return listener


def check_extra_is_installed() -> None:
    """Raise ConfigError if a package of the extra `serve` is missing, before anything is loaded."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401

        import_msgpack()
    except ImportError as error:
        raise ConfigError(f'Serving needs `pip install "t2i-align[serve]"` ({error}).') from error


def _scorer_arguments(entry: Any) -> dict[str, Any]:
    """An entry of `scorers` as arguments of `load_scorer`, with `as`."""
    arguments = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(arguments, Mapping) or not isinstance(arguments.get("name"), str):
        raise ValueError(f"`scorers` must hold names or mappings with a `name`, but got {entry!r}.")
    served = arguments.get("as", arguments["name"])
    if not isinstance(served, str) or not SERVED_NAME.fullmatch(served) or served in (".", ".."):
        raise ValueError(
            f"A scorer's name in the URL is letters, digits and . : _ -; give {served!r} another with `as`."
        )
    return {**arguments, "as": served}


def _load(arguments: Mapping[str, Any], config: RewardServiceConfig, service: RewardService) -> ServedScorer:
    name = arguments["as"]
    try:
        scorer: Any = load_scorer(**{key: value for key, value in arguments.items() if key != "as"})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`scorers`: {name}: {error}") from error
    described = scorer.describe() if hasattr(scorer, "describe") else {"name": name}
    description = json.loads(json.dumps(described, default=str))  # as it will travel
    logger.info("Loaded %s: %s", name, description)
    queue = ScoreQueue(
        name,
        scorer,
        max_batch=config.max_batch,
        max_wait=config.max_wait_ms / 1000,
        on_batch=partial(service.metrics.count_batch, name),
    )
    return ServedScorer(queue, description, getattr(scorer, "reads_prompts", True))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_command(main, RewardServiceConfig)
