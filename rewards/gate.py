"""What an HTTP service does before it looks at a request: token, admission, size and time of the body."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds a client should wait when the queue is full: about a batch."""
CLIENT_GONE = 499
"""nginx's status for a client that hung up; it is seen in metrics only."""


class Refusal(Exception):
    """A request that is not answered.

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


class Gate:
    """Lets requests in.

    Attributes:
        stopping: Set it to refuse everything from now on.
    """

    def __init__(self, *, max_body_bytes: int, max_queue: int, token: str | None = None, body_timeout: float = 60.0):
        """Open.

        Args:
            max_body_bytes: Of a request.
            max_queue: Requests being received, waiting or being answered at a time; more are refused.
            token: Bearer token that requests must carry; None: no check.
            body_timeout: Seconds in which a request's body must have arrived.
        """
        self.max_body_bytes, self.max_queue, self.body_timeout = max_body_bytes, max_queue, body_timeout
        self.stopping = False
        self._token = token
        self._in_flight = 0

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal (401) unless the request carries the token."""
        given = headers.get("authorization", "").encode()
        # Bytes, since compare_digest takes no strings with other than ASCII characters.
        if self._token is not None and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            reason = "the token is wrong" if given else "the header `Authorization: Bearer TOKEN` is missing"
            raise Refusal(401, reason, {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def admitted(self) -> Generator[None]:
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

    async def receive(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> bytes:
        """The body of a request.

        Raises:
            Refusal: It is too large (413) or too slow (408).
        """
        too_large = Refusal(413, f"the body is larger than the {self.max_body_bytes:,} bytes allowed")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                async for chunk in body:
                    content += chunk
                    if len(content) > self.max_body_bytes:
                        raise too_large
        except TimeoutError as error:
            raise Refusal(408, f"the body did not arrive within {self.body_timeout:g} seconds") from error
        return bytes(content)


def refused(refusal: Refusal) -> Answer:
    """The answer that says why; always JSON."""
    return Answer(refusal.status, "application/json", json.dumps({"error": f"{refusal}."}).encode(), refusal.headers)
