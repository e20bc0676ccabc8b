"""The reward service without its sockets: who may ask what, how much at a time, and what the answer is.

`build_app` makes a FastAPI application of it; `python -m rewards.serve` runs that.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rewards.score_queue import QueueClosedError, ScoreQueue, ScorerFailedError
from rewards.scorer import Scored
from rewards.service_metrics import CONTENT_TYPE, ServiceMetrics
from rewards.wire import JSON, Limits, MessageError, ScoreRequest, answer_message, media_type, pack, read_request

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds a client should wait when the queue is full: about a batch."""
CLIENT_GONE = 499
"""nginx's status for a client that hung up; it is seen in metrics only."""


class Refusal(Exception):
    """A request that gets no scores.

    Attributes:
        status: HTTP status.
        headers: Of the answer.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status, self.headers = status, dict(headers or {})


class Answer(NamedTuple):
    """What goes back to a client."""

    status: int
    media: str
    body: bytes
    headers: dict[str, str]


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


class RewardService:
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
        self.limits, self.max_queue, self.body_timeout = limits, max_queue, body_timeout
        self.metrics = metrics or ServiceMetrics()
        self.scorers: dict[str, ServedScorer] = {}
        self.stopping = False
        self._token = token
        self._in_flight = 0

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
            with self._admitted():
                request, media = await self._receive(headers, body)
                scored = await self._wait(served.queue, request, gone)
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

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal (401) unless the request carries the token."""
        given = headers.get("authorization", "").encode()
        # Bytes, since compare_digest takes no strings with other than ASCII characters.
        if self._token is not None and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            reason = "the token is wrong" if given else "the header `Authorization: Bearer TOKEN` is missing"
            raise Refusal(401, reason, {"WWW-Authenticate": "Bearer"})

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

    @contextmanager
    def _admitted(self) -> Generator[None]:
        """A place for a request, taken before its body is read: `max_queue` bounds memory too."""
        if self.stopping:
            raise Refusal(503, "the service is stopping", RETRY_AFTER)
        if self._in_flight >= self.max_queue:
            raise Refusal(503, f"{self.max_queue} requests are waiting already", RETRY_AFTER)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _receive(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> tuple[ScoreRequest, str]:
        """The request, and the format its answer should have."""
        media = media_type(headers.get("content-type"))
        if media is None:
            raise Refusal(415, "Content-Type must be application/msgpack or application/json")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "compressed bodies are not taken; pictures are compressed already")
        too_large = Refusal(413, f"the body is larger than the {self.limits.max_body_bytes:,} bytes allowed")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.max_body_bytes:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                async for chunk in body:
                    content += chunk
                    if len(content) > self.limits.max_body_bytes:
                        raise too_large
        except TimeoutError as error:
            raise Refusal(408, f"the body did not arrive within {self.body_timeout:g} seconds") from error
        try:
            # On a thread: unpacking and hashing megabytes would hold up everyone else.
            request = await asyncio.to_thread(read_request, bytes(content), media, self.limits)
        except MessageError as error:
            raise Refusal(error.status, str(error).rstrip(".")) from error
        return request, media_type(headers.get("accept")) or media

    async def _wait(self, queue: ScoreQueue, request: ScoreRequest, gone: Callable[[], Awaitable[Any]]) -> Scored:
        """Scores from a queue; if the client hangs up first, the request leaves the queue."""
        try:
            job = queue.submit(request)
        except QueueClosedError as error:
            raise Refusal(503, "the service is stopping", RETRY_AFTER) from error
        answer, hung_up = asyncio.wrap_future(job.future), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Refusal(CLIENT_GONE, "the client hung up")
            return answer.result()
        except ScorerFailedError as error:
            raise Refusal(500, str(error)) from error
        finally:
            hung_up.cancel()
            answer.cancel()
            queue.cancel(job)


def refused(refusal: Refusal) -> Answer:
    """The answer that says why; always JSON."""
    return Answer(refusal.status, JSON, pack({"error": f"{refusal}."}, JSON), refusal.headers)


def build_app(service: RewardService) -> "FastAPI":
    """The application with its routes.

    `POST /score/{scorer}` scores, `GET /score/{scorer}` describes, `GET /health` and `GET /metrics` are for operators.

    Raises:
        ImportError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response
    except ImportError as error:
        raise ImportError('The reward service needs `pip install "t2i-align[serve]"`.') from error

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No schema and no documentation pages: bodies are not described by Python types, and the pages load scripts.
    app = FastAPI(title="t2i-align rewards", openapi_url=None, lifespan=lifespan)

    def respond(answer: Answer) -> Response:
        return Response(answer.body, answer.status, answer.headers, answer.media)

    async def chunks(request: Request) -> AsyncIterator[bytes]:
        try:
            async for chunk in request.stream():
                yield chunk
        except ClientDisconnect as error:
            raise Refusal(CLIENT_GONE, "the client hung up") from error

    @app.post("/score/{scorer}")
    async def score(scorer: str, request: Request) -> Response:
        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return respond(await service.score(scorer, request.headers, chunks(request), gone))

    @app.get("/score/{scorer}")
    async def describe(scorer: str, request: Request) -> Response:
        return Response(json.dumps(service.describe(scorer, request.headers), default=str), media_type=JSON)

    @app.get("/health")
    async def health() -> Response:
        return Response(json.dumps(service.health()), 503 if service.stopping else 200, media_type=JSON)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(service.render_metrics(request.headers), media_type=CONTENT_TYPE)

    @app.exception_handler(Refusal)
    async def on_refusal(_: Request, refusal: Refusal) -> Response:
        return respond(refused(refusal))

    @app.exception_handler(HTTPException)
    async def on_no_route(_: Request, error: HTTPException) -> Response:
        return respond(refused(Refusal(error.status_code, error.detail, error.headers)))

    return app
