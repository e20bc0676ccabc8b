"""Read models, images and hashes from Civitai's public REST API v1.

    with CivitaiClient(cache_dir="cache/civitai") as client:
        for model in client.iter_models(types=("Checkpoint", "LORA"), base_models=("SD 1.5",), with_images=True):
            ...

Every answered request is one unit on disk. A run that was stopped, however, replays the answers it has and goes on at
the first one it lacks, so a kill loses at most the request in flight.

Routes and their limits: https://developer.civitai.com/docs/api/public-rest and the handlers in
https://github.com/civitai/civitai, `src/pages/api/v1`.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from rollouts.files import write_atomically

logger = logging.getLogger(__name__)

MAX_MODELS_PER_PAGE = 100
MAX_IMAGES_PER_PAGE = 200
MAX_HASHES_PER_CALL = 10_000

# The 52x are Cloudflare's "the origin did not answer", which stands before civitai.com.
RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# A 200 with a broken body is more often a changed API than bad luck: not worth the whole budget of retries.
MAX_BAD_BODIES = 3
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 300.0

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
# AutoV1 and CRC32 have 8 digits, AutoV2 10, AutoV3 12, SHA256 and BLAKE3 64.
_ANY_HASH = re.compile(r"[0-9A-Fa-f]{8}|[0-9A-Fa-f]{10}|[0-9A-Fa-f]{12}|[0-9A-Fa-f]{64}")
_BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1


class CivitaiAPIError(RuntimeError):
    """A request that could not be answered.

    Attributes:
        url: What was asked, with its query.
        status: Last HTTP status, or None when no answer came.
        attempts: How many times it was asked.
    """

    def __init__(self, reason: str, *, url: str, status: int | None, attempts: int) -> None:
        times = "once" if attempts == 1 else f"{attempts} times"
        answer = "no HTTP answer" if status is None else f"HTTP status {status}"
        super().__init__(f"Civitai request failed: {reason} ({answer}, asked {times}): {url}")
        self.url = url
        self.status = status
        self.attempts = attempts


class _BadBodyError(ValueError):
    """A 200 whose body is not what the route returns."""


# Raises _BadBodyError unless a parsed body is what its route returns.
_Check = Callable[[Any], None]


@dataclass(frozen=True)
class _Request:
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


class CivitaiClient:
    """Civitai's public REST API, politely and resumably. Use it as a context manager.

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
        base_url: str = "https://civitai.com/api/v1",
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
            raise ImportError('The Civitai client needs httpx: pip install "t2i-align[bench]".') from error
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

    def __enter__(self) -> CivitaiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The cache stays."""
        self._http.close()

    def iter_models(
        self,
        *,
        base_models: Sequence[str] = (),
        types: Sequence[str] = (),
        limit: int = MAX_MODELS_PER_PAGE,
        sort: str | None = None,
        period: str | None = None,
        nsfw: bool = False,
        max_models: int | None = None,
        with_images: bool = False,
        images_per_version: int = 20,
    ) -> Iterator[dict[str, Any]]:
        """Yield `/models` items, each model once.

        Embedded images often come without `meta` (prompt, sampler, ...), which only `/images` serves.

        Args:
            base_models: For example "SD 1.5"; empty is all.
            types: For example "LORA"; empty is all.
            limit: Models per page, 1 to 100.
            sort: For example "Most Downloaded"; None is the site's default.
            period: For example "AllTime"; None is the site's default.
            nsfw: Whether to ask for adult content as well.
            max_models: Stop after so many; None is all.
            with_images: Replace the images of each version of which no embedded image has `meta` by its gallery.
            images_per_version: How many images of a gallery are read.

        Raises:
            ValueError: `limit` or `images_per_version` is out of range.
            CivitaiAPIError: A page failed for good, or the cursors run in a circle.
        """
        for name, values in (("base_models", base_models), ("types", types)):
            if isinstance(values, str):
                raise ValueError(f'`{name}` must be a sequence of names such as ("{values}",), but got a string.')
        if not 1 <= limit <= MAX_MODELS_PER_PAGE:
            raise ValueError(f"`limit` must be between 1 and {MAX_MODELS_PER_PAGE} models per page, but got {limit}.")
        if with_images and images_per_version < 1:
            raise ValueError(f"`images_per_version` must be at least 1, but got {images_per_version}.")
        params = [("limit", str(limit)), ("nsfw", _flag(nsfw)), ("withMeta", "true")]
        params += [("types", value) for value in types] + [("baseModels", value) for value in base_models]
        params += [(name, value) for name, value in (("sort", sort), ("period", period)) if value is not None]
        return self._models(params, max_models, images_per_version if with_images else 0, nsfw)

    def iter_images(self, model_version_id: int, *, max_images: int, nsfw: bool = False) -> Iterator[dict[str, Any]]:
        """Yield up to `max_images` gallery images of a version in the shape of the images embedded in `/models`.

        Raises:
            ValueError: `max_images` is below 1.
            CivitaiAPIError: A page failed for good, or the cursors run in a circle.
        """
        if max_images < 1:
            raise ValueError(f"`max_images` must be at least 1, but got {max_images}.")
        # modelVersionId rather than modelId: with modelId alone the sort orders collapse to newest first.
        params = [
            ("limit", str(min(max_images, MAX_IMAGES_PER_PAGE))),
            ("modelVersionId", str(model_version_id)),
            ("nsfw", _flag(nsfw)),
            ("withMeta", "true"),
        ]
        return self._images(params, max_images)

    def resolve_hashes(self, sha256s: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Map SHA256 (upper case) to (model id, model version id), 10,000 per request.

        Unknown hashes are absent. A file published more than once belongs to its oldest (lowest) version.

        Raises:
            ValueError: A value is not a SHA256; this route takes no other hash, see `version_by_hash`.
            CivitaiAPIError: A request failed for good.
        """
        values = [sha256s] if isinstance(sha256s, str) else sha256s
        wanted = {_checked_hash(value, _SHA256, "a SHA256 of 64 hexadecimal digits") for value in values}
        ordered = sorted(wanted)
        found: dict[str, tuple[int, int]] = {}
        for start in range(0, len(ordered), MAX_HASHES_PER_CALL):
            batch = ordered[start : start + MAX_HASHES_PER_CALL]
            request = _Request("POST", "/model-versions/by-hash/ids", body=batch)
            for row in self._fetch(request, _check_hash_rows)[1]:
                sha256 = row["hash"].upper()
                pair = (row["modelId"], row["modelVersionId"])
                if sha256 in wanted and (sha256 not in found or pair[1] < found[sha256][1]):
                    found[sha256] = pair
        return found

    def version_by_hash(self, any_hash: str) -> dict[str, Any] | None:
        """The model version a file hash belongs to, or None when Civitai knows no such file.

        Args:
            any_hash: AutoV1, AutoV2, AutoV3, SHA256, CRC32 or BLAKE3, in either case.

        Raises:
            ValueError: Not hexadecimal or not 8, 10, 12 or 64 digits long.
            CivitaiAPIError: The request failed for good.
        """
        digits = _checked_hash(any_hash, _ANY_HASH, "a hash of 8, 10, 12 or 64 hexadecimal digits")
        request = _Request("GET", f"/model-versions/by-hash/{digits}")
        status, body = self._fetch(request, _check_object, absent_ok=True)
        return None if status == 404 else body

    def _models(
        self, params: list[tuple[str, str]], max_models: int | None, images: int, nsfw: bool
    ) -> Iterator[dict[str, Any]]:
        seen: set[Any] = set()
        count = 0
        for model in self._items("/models", params) if max_models is None or max_models > 0 else ():
            # The catalogue moves while it is paged, so a model can turn up on two pages.
            identity = model.get("id")
            if identity is not None:
                if identity in seen:
                    continue
                seen.add(identity)
            if images:
                self._fill_images(model, images, nsfw)
            yield model
            count += 1
            if count == max_models:
                return

    def _images(self, params: list[tuple[str, str]], max_images: int) -> Iterator[dict[str, Any]]:
        for count, image in enumerate(self._items("/images", params), start=1):
            yield _embedded_shape(image)
            if count >= max_images:
                return

    def _fill_images(self, model: dict[str, Any], count: int, nsfw: bool) -> None:
        """Give each version whose embedded images lack `meta` its gallery, if it has one."""
        for version in model.get("modelVersions") or ():
            if not isinstance(version, dict) or not isinstance(version.get("id"), int):
                continue
            embedded = version.get("images") or []
            if any(isinstance(image, dict) and image.get("meta") for image in embedded):
                continue
            try:
                gallery = list(self.iter_images(version["id"], max_images=count, nsfw=nsfw))
            except CivitaiAPIError as error:
                if error.status != 404:
                    raise
                logger.warning("No gallery for version %s of model %s: %s", version["id"], model.get("id"), error)
                continue
            if gallery:
                version["images"] = gallery

    def _items(self, path: str, params: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """All items of a cursor-paged route."""
        seen: set[str] = set()
        cursor: str | None = None
        while True:
            extra = [] if cursor is None else [("cursor", cursor)]
            request = _Request("GET", path, tuple(params + extra))
            _, page = self._fetch(request, _check_page)
            yield from page["items"]
            following = (page.get("metadata") or {}).get("nextCursor")
            if following is None or following == "":
                return
            cursor = str(following)
            if cursor in seen:
                # Kept, this page would lead every restart into the same circle.
                self._cache_file(request).unlink(missing_ok=True)
                reason = f"cursor loop, `nextCursor` {cursor!r} came a second time"
                raise CivitaiAPIError(reason, url=self._url(request), status=200, attempts=1)
            seen.add(cursor)

    def _fetch(self, request: _Request, check: _Check, *, absent_ok: bool = False) -> tuple[int, Any]:
        """Status (200, or 404 with `absent_ok`) and checked JSON body, from the cache or the network."""
        path = self._cache_file(request)
        cached = self._read_cache(path, request, check, absent_ok)
        if cached is None:
            cached = self._ask(request, check, absent_ok)
            self._write_cache(path, request, *cached)
        return cached

    def _ask(self, request: _Request, check: _Check, absent_ok: bool) -> tuple[int, Any]:
        """One request with retries."""
        import httpx

        url = self._url(request)
        bad_bodies = 0
        status: int | None = None
        for attempt in range(1, self.max_retries + 2):
            self._wait_for_turn()
            retry_after: float | None = None
            try:
                response = self._http.request(request.method, url, json=request.body)
                status = response.status_code
                if status == 200:
                    return 200, _parse(self._redact(response.text), check)
                if status == 404 and absent_ok:
                    return 404, None
                reason = self._redact(f"{response.reason_phrase or 'error'}: {' '.join(response.text.split())[:200]}")
                if status not in RETRYABLE_STATUS:
                    raise CivitaiAPIError(reason, url=url, status=status, attempts=attempt)
                retry_after = _retry_after(response.headers.get("Retry-After"))
            except _BadBodyError as error:
                bad_bodies += 1
                reason = str(error)
            except httpx.TransportError as error:
                status, reason = None, self._redact(f"{type(error).__name__}: {error}")
            except httpx.DecodingError as error:
                bad_bodies += 1
                reason = self._redact(f"the body cannot be decoded ({error})")
            except httpx.HTTPError as error:  # too many redirects: the same again next time
                raise CivitaiAPIError(
                    self._redact(f"{type(error).__name__}: {error}"), url=url, status=status, attempts=attempt
                ) from error
            if attempt > self.max_retries or bad_bodies >= MAX_BAD_BODIES:
                break
            delay = _backoff(attempt) if retry_after is None else retry_after
            logger.warning("Civitai: %s; attempt %d of %s again in %.1f s", reason, attempt + 1, url, delay)
            self._sleep(delay)
        raise CivitaiAPIError(reason, url=url, status=status, attempts=attempt)

    def _wait_for_turn(self) -> None:
        if self.min_interval and self._last_start is not None:
            remaining = self._last_start + self.min_interval - time.monotonic()
            if remaining > 0:
                self._sleep(remaining)
        self._last_start = time.monotonic()

    def _url(self, request: _Request) -> str:
        query = urllib.parse.urlencode(request.params)
        return f"{self.base_url}{request.path}" + (f"?{query}" if query else "")

    def _redact(self, text: str) -> str:
        """A server may echo headers: keep the token out of whatever is stored or shown."""
        return text.replace(self._token, "[token]") if self._token else text

    def _cache_file(self, request: _Request) -> Path:
        return self.cache_dir / f"{request.key()}.json"

    def _read_cache(self, path: Path, request: _Request, check: _Check, absent_ok: bool) -> tuple[int, Any] | None:
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

    def _write_cache(self, path: Path, request: _Request, status: int, body: Any) -> None:
        entry = {"request": request.identity(), "status": status, "fetched_at": time.time(), "body": body}
        write_atomically(path, json.dumps(entry).encode())


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _checked_hash(value: Any, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"Expected {expected}, but got {value!r}.")
    return value.upper()


def _parse(text: str, check: _Check) -> Any:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadBodyError(f"the body is not JSON ({text[:80]!r})") from error
    check(body)
    return body


def _check_object(body: Any) -> None:
    if not isinstance(body, dict):
        raise _BadBodyError(f"the body is not a JSON object but {type(body).__name__}")


def _check_page(body: Any) -> None:
    _check_object(body)
    if not isinstance(body.get("items"), list) or not all(isinstance(item, dict) for item in body["items"]):
        raise _BadBodyError("the page has no list `items` of objects")
    if not isinstance(body.get("metadata") or {}, dict):
        raise _BadBodyError("`metadata` of the page is not an object")


def _check_hash_rows(body: Any) -> None:
    fields = {"hash": str, "modelId": int, "modelVersionId": int}
    if not isinstance(body, list):
        raise _BadBodyError("the body is not a list of {modelVersionId, modelId, hash}")
    for row in body:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise _BadBodyError(f"a row is not {{modelVersionId, modelId, hash}}: {row!r}"[:200])


def _embedded_shape(image: dict[str, Any]) -> dict[str, Any]:
    """An `/images` record in the shape of an image inside `/models`.

    There `nsfw` is a name ("None", "Soft", ...) and `nsfwLevel` a bit mask (1 is PG); here `nsfw` is a boolean,
    `nsfwLevel` the name and `browsingLevel` the mask. `meta` comes flat or wrapped as {id, meta}.
    """
    meta = image.get("meta")
    if isinstance(meta, dict) and "meta" in meta and meta.keys() <= {"id", "meta"}:
        meta = meta["meta"]
    shaped = {name: image.get(name) for name in ("id", "url", "width", "height")}
    shaped["meta"] = meta if isinstance(meta, dict) else None
    shaped |= {name: image[name] for name in ("hash", "type", "nsfw", "nsfwLevel") if name in image}
    if isinstance(image.get("nsfwLevel"), str):
        shaped["nsfw"] = shaped.pop("nsfwLevel")
    if isinstance(image.get("browsingLevel"), int):
        shaped["nsfwLevel"] = image["browsingLevel"]
    return shaped


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date), capped; None when absent, malformed or past."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,12}", value):
        seconds = float(value)
    else:
        try:
            date = email.utils.parsedate_to_datetime(value)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    # Zero or less would turn the retries into a burst: back off as if the header were missing.
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds > 0 else None


def _backoff(attempt: int) -> float:
    """Exponential with jitter: between half and all of 1, 2, 4, ... seconds, capped."""
    return min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
