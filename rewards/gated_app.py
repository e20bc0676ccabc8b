"""The FastAPI application around a gate: bodies, clients that hang up, refusals, and an end that loses nothing."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rewards.batch_queue import BatchQueue, QueueClosedError
from rewards.gate import CLIENT_GONE, RETRY_AFTER, Answer, Refusal

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

Asked = TypeVar("Asked")
Found = TypeVar("Found")
Gone = Callable[[], Awaitable[Any]]
"""Returns when the client has hung up."""


def gated_app(title: str, close: Callable[[], Any], refused: Callable[[str, Refusal], Answer]) -> "FastAPI":
    """An application without routes.

    Args:
        title: Of the application.
        close: Called at the end, on a thread; returns when everything accepted has been answered.
        refused: The answer to a refused request, given its path.

    Raises:
        ImportError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise ImportError('Serving needs `pip install "t2i-align[serve]"`.') from error

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(close)

    # No schema and no documentation pages: bodies are not described by Python types, and the pages load scripts.
    app = FastAPI(title=title, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, refusal: Refusal) -> "Response":
        return response(refused(request.url.path, refusal))

    @app.exception_handler(HTTPException)
    async def on_no_route(request: Request, error: HTTPException) -> "Response":
        return response(refused(request.url.path, Refusal(error.status_code, error.detail, error.headers)))

    return app


def response(answer: Answer) -> "Response":
    """An answer as Starlette wants it."""
    from starlette.responses import Response

    return Response(answer.body, answer.status, answer.headers, answer.media)


async def chunks(request: "Request") -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Refusal: The client hung up.
    """
    from starlette.requests import ClientDisconnect

    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise Refusal(CLIENT_GONE, "the client hung up") from error


def gone(request: "Request") -> Gone:
    """See `Gone`; for use once the body has been read."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait


async def answer_of(queue: BatchQueue[Asked, Found], asked: Asked, gone: Gone) -> Found:
    """A queue's answer to a request; if the client hangs up first, the request leaves the queue.

    Raises:
        Refusal: The queue is closed, or the client hung up; and whatever the queue's worker gave instead of an answer.
    """
    try:
        job = queue.submit(asked)
    except QueueClosedError as error:
        raise Refusal(503, "the service is stopping", RETRY_AFTER) from error
    answer, hung_up = asyncio.wrap_future(job.future), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(CLIENT_GONE, "the client hung up")
        return answer.result()
    finally:
        hung_up.cancel()
        answer.cancel()
        queue.cancel(job)
