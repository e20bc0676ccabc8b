"""The reward service without its sockets: who may ask what, how much at a time, and what the answer is.

`build_app` makes a FastAPI application of it; `python -m rewards.serve` runs that.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rewards.gate import Answer, Gate, Refusal, refused
from rewards.gated_app import answer_of, chunks, gated_app, gone, response
from rewards.score_queue import ScoreQueue, ScorerFailedError
from rewards.service_metrics import CONTENT_TYPE, ServiceMetrics
from rewards.wire import JSON, Limits, MessageError, ScoreRequest, answer_message, media_type, pack, read_request

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedScorer:
    """A scorer at work.

    Attributes:
        queue: Where its requests wait.
        description: Its `describe()`.
        reads_prompts: False for scorers of the image alone.
    """

    queue: ScoreQueue
    description: dict[str, Any]
    reads_prompts: bool = True


class RewardService(Gate):
    """Scorers by name behind a token, limits and queues."""

    def __init__(
        self, *, limits: Limits, max_queue: int, token: str | None = None, body_timeout: float = 60.0,
        metrics: ServiceMetrics | None = None,
    ):  # fmt: skip
        """Without scorers yet.

        Args:
            limits: Of each request.
            max_queue: Requests being received, waiting or being scored at a time; more are refused.
            token: Bearer token that every request except `/health` must carry; None: no check.
            body_timeout: Seconds in which a request's body must have arrived.
            metrics: Where to count.
        """
        super().__init__(
            max_body_bytes=limits.max_body_bytes, max_queue=max_queue, token=token, body_timeout=body_timeout
        )
        self.limits = limits
        self.metrics = metrics or ServiceMetrics()
        self.scorers: dict[str, ServedScorer] = {}

    async def score(
        self, name: str, headers: Mapping[str, str], body: AsyncIterator[bytes], gone: Callable[[], Awaitable[Any]]
    ) -> Answer:
        """Answer a request for scores.

        Args:
            name: Of the scorer.
            headers: Of the request, case-insensitive.
            body: Chunks as they arrive.
            gone: Returns when the client has hung up.
        """
        started = time.perf_counter()
        try:
            self.check_token(headers)
            served = self.find(name)
            with self.admitted():
                request, media = await self._receive(headers, body)
                try:
                    scored = await answer_of(served.queue, request, gone)
                except ScorerFailedError as error:
                    raise Refusal(500, str(error)) from error
            message = answer_message(scored.scores.tolist(), scored.errors, served.description)
            answer = Answer(200, media, pack(message, media), {})
        except Refusal as refusal:
            answer = refused(refusal)
        except Exception as error:  # a bug of ours: let through, it would close the connection with an answer under way
            logger.exception("The request could not be answered.")
            answer = refused(Refusal(500, f"{type(error).__name__} in the service; its log says more"))
        self.metrics.count_request(name if name in self.scorers else "", answer.status, time.perf_counter() - started)
        return answer

    def describe(self, name: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """What a client has to know about a scorer: its description and the limits of a request.

        Raises:
            Refusal: Wrong token or no such scorer.
        """
        self.check_token(headers)
        served = self.find(name)
        return {
            "name": name,
            "scorer": served.description,
            "reads_prompts": served.reads_prompts,
            "limits": asdict(self.limits),
        }

    def health(self) -> dict[str, Any]:
        """Names of the scorers, and whether requests are taken."""
        return {"status": "stopping" if self.stopping else "ready", "scorers": sorted(self.scorers)}

    def render_metrics(self, headers: Mapping[str, str]) -> str:
        """Counters in Prometheus' format.

        Raises:
            Refusal: Wrong token.
        """
        self.check_token(headers)
        return self.metrics.render({name: len(s.queue) for name, s in self.scorers.items()}, self._in_flight)

    def find(self, name: str) -> ServedScorer:
        """The scorer of a name; raises Refusal (404) that lists all names."""
        if name not in self.scorers:
            raise Refusal(404, f"no scorer {name!r:.100} here; there are {', '.join(sorted(self.scorers))}")
        return self.scorers[name]

    def close(self) -> None:
        """Finish what is in the queues; returns when every scorer is idle."""
        self.stopping = True
        for served in self.scorers.values():
            served.queue.close()

    async def _receive(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> tuple[ScoreRequest, str]:
        """The request, and the format its answer should have."""
        media = media_type(headers.get("content-type"))
        if media is None:
            raise Refusal(415, "Content-Type must be application/msgpack or application/json")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "compressed bodies are not taken; pictures are compressed already")
        content = await self.receive(headers, body)
        try:
            # On a thread: unpacking and hashing megabytes would hold up everyone else.
            request = await asyncio.to_thread(read_request, content, media, self.limits)
        except MessageError as error:
            raise Refusal(error.status, str(error).rstrip(".")) from error
        return request, media_type(headers.get("accept")) or media


def build_app(service: RewardService) -> "FastAPI":
    """The application with its routes.

    `POST /score/{scorer}` scores, `GET /score/{scorer}` describes, `GET /health` and `GET /metrics` are for operators.

    Raises:
        ImportError: FastAPI is not installed.
    """
    app = gated_app("t2i-align rewards", service.close, lambda path, refusal: refused(refusal))
    from fastapi import Request
    from starlette.responses import Response

    @app.post("/score/{scorer}")
    async def score(scorer: str, request: Request) -> Response:
        return response(await service.score(scorer, request.headers, chunks(request), gone(request)))

    @app.get("/score/{scorer}")
    async def describe(scorer: str, request: Request) -> Response:
        return Response(json.dumps(service.describe(scorer, request.headers), default=str), media_type=JSON)

    @app.get("/health")
    async def health() -> Response:
        return Response(json.dumps(service.health()), 503 if service.stopping else 200, media_type=JSON)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(service.render_metrics(request.headers), media_type=CONTENT_TYPE)

    return app
