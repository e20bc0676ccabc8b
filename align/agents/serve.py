"""Serve an agent over HTTP, for programs and for OpenAI's clients.

    python -m align.agents.serve --model_name_or_path runs/rrhf --dataset data/dabench
    curl -d '{"prompt": "a cute corgi, pixel art", "top_k": 3, "filter": {"type": "LoRA"}}' http://127.0.0.1:8400/call

Routes: `POST /call` (`prompt`: text or a list; `negative_prompt`, `filter`, `top_k`, `formats`: any of a1111, infotext,
comfyui, diffusers; `seed`), `POST /v1/chat/completions` and `GET /v1/models` (OpenAI's form: the last user message is
the prompt, the answer a tool call; `GET /tools` is its schema), `POST /catalog/reload`, `GET /health`.

Requests that wait are answered in one batch. The catalogue's file is read again when it changes (`watch_seconds`) or on
`POST /catalog/reload`; one that can't be used leaves the old one in place. SIGTERM ends the service after everything it
accepted has been answered; a second SIGINT (Ctrl-C) ends it at once.
"""

import logging
import sys
import threading
from dataclasses import dataclass, field

from align.agents.config import AGENT_ERRORS, AgentConfig
from align.agents.service import AgentService, build_app
from rewards.commandline import ConfigError, run_command
from rewards.serve import bind, read_token, run
from rollouts.catalog import CatalogError

logger = logging.getLogger(__name__)


@dataclass
class ServeConfig(AgentConfig):
    """Options of `python -m align.agents.serve`."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 and ::: every one."})
    port: int = field(default=8400, metadata={"help": "TCP port; 0: any free one, which is logged."})
    token_env: str = field(
        default="T2I_ALIGN_TOKEN", metadata={"help": "Environment variable with the token that clients must send."}
    )
    allow_no_token: bool = field(
        default=False, metadata={"help": "Serve without a token on other addresses than this machine's own."}
    )
    max_batch: int = field(default=32, metadata={"help": "Prompts that are answered together."})
    max_wait_ms: float = field(
        default=5.0, metadata={"help": "Milliseconds a request waits for others while the agent is idle; 0: none."}
    )
    max_prompts: int = field(default=64, metadata={"help": "Prompts of a request."})
    max_prompt_chars: int = field(default=20_000, metadata={"help": "Characters of a prompt."})
    max_body_bytes: int = field(default=2**20, metadata={"help": "Bytes of a request's body."})
    max_queue: int = field(default=64, metadata={"help": "Requests accepted at a time; more get 503."})
    body_timeout: float = field(default=30.0, metadata={"help": "Seconds in which a request's body must arrive."})
    watch_seconds: float = field(
        default=5.0, metadata={"help": "Look so often whether the catalogue's file has changed; 0: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_prompts", "max_prompt_chars", "max_body_bytes", "max_queue"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` must be from 0 to 65535, but is {self.port}.")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(f"`max_wait_ms` must be from 0 to 60000, but is {self.max_wait_ms}.")
        if not self.body_timeout > 0:
            raise ValueError(f"`body_timeout` must be above 0, but is {self.body_timeout}.")
        if self.watch_seconds < 0:
            raise ValueError(f"`watch_seconds` must be 0 or more, but is {self.watch_seconds}.")


def main(config: ServeConfig) -> None:
    """Load the agent and serve it until SIGTERM or SIGINT."""
    check_extra_is_installed()
    token = read_token(config)
    listener = bind(config.host, config.port)  # before the weights are loaded: a taken port is told at once
    service = AgentService(
        config.load_agent(), catalog_path=str(config.catalog_path), max_batch=config.max_batch,
        max_wait=config.max_wait_ms / 1000, max_prompts=config.max_prompts, max_prompt_chars=config.max_prompt_chars,
        max_body_bytes=config.max_body_bytes, max_queue=config.max_queue, token=token,
        body_timeout=config.body_timeout,
    )  # fmt: skip
    if config.watch_seconds:
        threading.Thread(target=watch, args=(service, config.watch_seconds), name="catalogue", daemon=True).start()
    sys.exit(run(service, build_app(service), listener, f"{len(service.agent.catalog)} models"))


def watch(service: AgentService, seconds: float, stop: threading.Event | None = None) -> None:
    """Read the catalogue's file again whenever it has changed.

    Args:
        service: Whose.
        seconds: Between two looks.
        stop: Ends it; None: nothing does.
    """
    stop = stop or threading.Event()
    seen = _stamp(service)
    while not stop.wait(seconds):
        now = _stamp(service)
        if now is None or now == seen:
            continue
        seen = now
        try:
            service.load_catalog()
        except CatalogError as error:
            logger.warning("The catalogue has changed, but the old one stays: %s", error)


def check_extra_is_installed() -> None:
    """Raise ConfigError if a package of the extra `serve` is missing, before anything is loaded."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'Serving needs `pip install "t2i-align[serve]"` ({error}).') from error


def _stamp(service: AgentService) -> tuple[int, int] | None:
    from pathlib import Path

    try:
        status = Path(str(service.catalog_path)).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


if __name__ == "__main__":
    run_command(main, ServeConfig, errors=AGENT_ERRORS)
