"""JSON over HTTP: politely, with retries, and every answer kept on disk.

    with CachedHTTP("https://api.example.org/v1", cache_dir="cache/example") as http:
        status, body = http.fetch(Request("GET", "/models", (("limit", "100"),)), check)

Every answered request is one file. A run that was stopped, however, replays the answers it has and goes on at the first
one it lacks, so a kill loses at most the request in flight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rewards.files import write_atomically
from rewards.retries import backoff, retry_after

logger = logging.getLogger(__name__)

# The 52x are Cloudflare's "the origin did not answer", which stands before civitai.com.
RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# A 200 with a broken body is more often a changed API than bad luck: not worth the whole budget of retries.
MAX_BAD_BODIES = 3
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 300.0

_BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1


class RequestError(RuntimeError):
    """A request that could not be answered.

    Attributes:
        url: What was asked, with its query.
        status: Last HTTP status, or None when no answer came.
        attempts: How many times it was asked.
    """

    def __init__(self, reason: str, *, url: str, status: int | None, attempts: int) -> None:
        times = "once" if attempts == 1 else f"{attempts} times"
        answer = "no HTTP answer" if status is None else f"HTTP status {status}"
        super().__init__(f"Request failed: {reason} ({answer}, asked {times}): {url}")
        self.url = url
        self.status = status
        self.attempts = attempts


class BadBodyError(ValueError):
    """A 200 whose body is not what the route returns."""


# Raises BadBodyError unless a parsed body is what its route returns.
Check = Callable[[Any], None]


@dataclass(frozen=True)
class Request:
    """What identifies an answer; the token is a header and therefore no part of it."""

    method: str
    path: str
    params: tuple[tuple[str, str], ...] = ()
    body: Any = None

    def identity(self) -> dict[str, Any]:
        """The request as JSON, parameters sorted so that their order means nothing."""
        params = sorted([name, value] for name, value in self.params)
        return {"method": self.method, "path": self.path, "params": params, "body": self.body}

    def key(self) -> str:
        """SHA-256 of the identity, hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


class CachedHTTP:
    """One web API whose answers are JSON. Use it as a context manager.

    Args:
        base_url: Root of the API, without a query.
        cache_dir: Where answers are kept, one JSON file each; made if missing.
        token: API key. Sent as a header only; never written to the cache, logs or errors.
        timeout: Seconds to connect, and to wait for each piece of an answer.
        max_retries: Repetitions after the first attempt at a request, on 429, 5xx, timeouts and lost connections.
        min_interval: Seconds between the starts of two requests at least.
        max_age: Seconds for which a cached answer is valid; None is for ever.
        sleep: Called with seconds to wait.

    Raises:
        ValueError: An argument is out of range, or the token holds characters no token has.
    """

    def __init__(
        self,
        base_url: str,
        *,
        cache_dir: str | os.PathLike[str],
        token: str | None = None,
        timeout: float = 30.0,
        max_retries: int = 6,
        min_interval: float = 0.0,
        max_age: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError('Web APIs need httpx: pip install "t2i-align[bench]".') from error
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise ValueError("`base_url` must be http(s)://host/path without user, password or query.")
        if max_retries < 0 or timeout <= 0 or min_interval < 0:
            raise ValueError(
                "`max_retries` and `min_interval` must be at least 0 and `timeout` above 0, "
                f"but got {max_retries}, {min_interval} and {timeout}."
            )
        # Checked here because httpx would quote an illegal header, token and all, in its error.
        if token and not _BEARER_TOKEN.fullmatch(token):
            raise ValueError("`token` is not a bearer token: only letters, digits and ._~+/-= are allowed, no blanks.")
        self.base_url = base_url.rstrip("/")
        self.cache_dir = Path(cache_dir)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        self.max_retries = max_retries
        self.min_interval = min_interval
        self.max_age = max_age
        self._token = token or None
        self._sleep = sleep
        self._last_start: float | None = None
        headers = {"Accept": "application/json", "User-Agent": "t2i-align"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.Client(timeout=timeout, headers=headers, follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The cache stays."""
        self._http.close()

    def fetch(self, request: Request, check: Check, *, absent_ok: bool = False) -> tuple[int, Any]:
        """The answer to a request, from the cache or the network.

        Args:
            request: What is asked.
            check: Raises BadBodyError unless the parsed body is what the route returns.
            absent_ok: Whether a 404 is an answer too, with None as body.

        Returns:
            Status (200 or 404) and parsed body.

        Raises:
            RequestError: The server refused, or all retries are used up.
        """
        path = self._cache_file(request)
        cached = self._read_cache(path, request, check, absent_ok)
        if cached is None:
            cached = self._ask(request, check, absent_ok)
            self._write_cache(path, request, *cached)
        return cached

    def forget(self, request: Request) -> None:
        """Remove a cached answer, so that it is asked for again."""
        self._cache_file(request).unlink(missing_ok=True)

    def url(self, request: Request) -> str:
        """The address of a request, with its query."""
        query = urllib.parse.urlencode(request.params)
        return f"{self.base_url}{request.path}" + (f"?{query}" if query else "")

    def _ask(self, request: Request, check: Check, absent_ok: bool) -> tuple[int, Any]:
        """One request with retries."""
        import httpx

        url = self.url(request)
        bad_bodies = 0
        status: int | None = None
        for attempt in range(1, self.max_retries + 2):
            self._wait_for_turn()
            wait: float | None = None
            try:
                response = self._http.request(request.method, url, json=request.body)
                status = response.status_code
                if status == 200:
                    return 200, _parse(self._redact(response.text), check)
                if status == 404 and absent_ok:
                    return 404, None
                reason = self._redact(f"{response.reason_phrase or 'error'}: {' '.join(response.text.split())[:200]}")
                if status not in RETRYABLE_STATUS:
                    raise RequestError(reason, url=url, status=status, attempts=attempt)
                wait = retry_after(response.headers.get("Retry-After"), MAX_RETRY_AFTER_SECONDS)
            except BadBodyError as error:
                bad_bodies += 1
                reason = str(error)
            except httpx.TransportError as error:
                status, reason = None, self._redact(f"{type(error).__name__}: {error}")
            except httpx.DecodingError as error:
                bad_bodies += 1
                reason = self._redact(f"the body cannot be decoded ({error})")
            except httpx.HTTPError as error:  # too many redirects: the same again next time
                raise RequestError(
                    self._redact(f"{type(error).__name__}: {error}"), url=url, status=status, attempts=attempt
                ) from error
            if attempt > self.max_retries or bad_bodies >= MAX_BAD_BODIES:
                break
            delay = backoff(attempt, BACKOFF_SECONDS, MAX_BACKOFF_SECONDS) if wait is None else wait
            logger.warning("%s; attempt %d of %s again in %.1f s", reason, attempt + 1, url, delay)
            self._sleep(delay)
        raise RequestError(reason, url=url, status=status, attempts=attempt)

    def _wait_for_turn(self) -> None:
        if self.min_interval and self._last_start is not None:
            remaining = self._last_start + self.min_interval - time.monotonic()
            if remaining > 0:
                self._sleep(remaining)
        self._last_start = time.monotonic()

    def _redact(self, text: str) -> str:
        """A server may echo headers: keep the token out of whatever is stored or shown."""
        return text.replace(self._token, "[token]") if self._token else text

    def _cache_file(self, request: Request) -> Path:
        return self.cache_dir / f"{request.key()}.json"

    def _read_cache(self, path: Path, request: Request, check: Check, absent_ok: bool) -> tuple[int, Any] | None:
        """The cached answer, or None when there is none, it is too old, or it is damaged."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            entry = json.loads(text)
            if entry["request"] != request.identity():
                raise ValueError("it answers another request")
            if self.max_age is not None and time.time() - entry["fetched_at"] > self.max_age:
                return None
            if entry["status"] == 200:
                check(entry["body"])
            elif entry["status"] != 404 or not absent_ok:
                raise ValueError(f"its status is {entry['status']!r}")
            return entry["status"], entry["body"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("Cached answer %s is damaged (%s); asking again", path, error)
            return None

    def _write_cache(self, path: Path, request: Request, status: int, body: Any) -> None:
        entry = {"request": request.identity(), "status": status, "fetched_at": time.time(), "body": body}
        write_atomically(path, json.dumps(entry).encode())


def _parse(text: str, check: Check) -> Any:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadBodyError(f"the body is not JSON ({text[:80]!r})") from error
    check(body)
    return body
