"""A scorer that lives in another process: the client of `python -m rewards.serve`."""

import ipaddress
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import torch
from torch import Tensor

from rewards.batching import prefetch
from rewards.images import ImageError, ImageSource
from rewards.retries import backoff, retry_after
from rewards.scorer import Scored, check_pairs, rows_by_image
from rewards.wire import JSON, MSGPACK, Limits, MessageError, encode_image, is_text, media_type, pack, unpack

logger = logging.getLogger(__name__)

RETRIED = (429, 502, 503, 504)
"""Statuses that say "later": too many requests, or a service (or a proxy before it) that is not there right now."""
FIRST_DELAY, MAX_DELAY = 0.5, 30.0
"""Seconds before the second attempt and between later ones; each is up to twice the one before."""
_OVERHEAD = 16
"""Bytes that MessagePack adds to a text, a picture or a number, at most."""


class RemoteScorerError(RuntimeError):
    """A reward service gave no scores; the message names the URL and the last reason."""


class Service(NamedTuple):
    """What a reward service says about one of its scorers."""

    description: dict[str, Any]
    reads_prompts: bool
    limits: Limits


@dataclass
class _Batch:
    """A request that is being put together."""

    rows: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    image_index: list[int] = field(default_factory=list)
    size: int = 256  # keys and the like

    def add(self, row: int, prompt: str, image: bytes) -> None:
        if not self.images or self.images[-1] is not image:
            self.images.append(image)
            self.size += len(image) + _OVERHEAD
        self.rows.append(row)
        self.prompts.append(prompt)
        self.image_index.append(len(self.images) - 1)
        self.size += _size(prompt)


class RemoteScorer:
    """A scorer of a reward service; called like any other, and safe to call from several threads.

    Pictures travel without loss: PNG and lossless WebP files as they are, everything else as PNG in its own mode. Modes
    that PNG does not have (CMYK, YCbCr, …) are converted to RGB here, as a scorer would do after resizing.

    Attributes:
        name: Of the scorer at the service.
        url: Of the service.
    """

    def __init__(
        self, url: str, name: str, *, token: str | None = None, timeout: float = 120.0, retries: int = 8,
        batch_size: int = 64, in_flight: int = 4, num_workers: int = 4,
    ):  # fmt: skip
        """Nothing is sent before the first use.

        Args:
            url: `http://host:port` or `https://…`.
            name: Of the scorer at the service.
            token: Bearer token.
            timeout: Seconds to wait for an answer, queueing included, before the request is tried again.
            retries: Attempts after the first, when there is no connection or the service is busy.
            batch_size: Pairs per request, if the service takes as many.
            in_flight: Requests at a time.
            num_workers: Threads that decode and encode images; 0: none.

        Raises:
            ValueError: An option out of range.
        """
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number from 0 to 65535
            usable = False
        if not usable:
            raise ValueError(f"`url` must be like http://host:8300, but got {url!r}.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("`url` must hold no user, password, query or fragment; the token is given apart from it.")
        for option, value, least in (
            ("retries", retries, 0), ("batch_size", batch_size, 1), ("in_flight", in_flight, 1),
            ("num_workers", num_workers, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"`{option}` must be at least {least}, but got {value}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be more than 0 seconds, but got {timeout}.")
        if token is not None and not (token and all("!" <= character <= "~" for character in token)):
            raise ValueError("`token` must be printable ASCII without spaces, and not empty.")
        self.url, self.name = url.rstrip("/"), name
        self.timeout, self.retries = timeout, retries
        self.batch_size, self.in_flight, self.num_workers = batch_size, in_flight, num_workers
        self._token = token

    def __call__(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> Tensor:
        """Score `images[i]` for `prompts[i]`: float32 on the CPU, shape (n,); see `rewards.scorer.Scorer`.

        Raises:
            ScoreError: A row that can't be scored.
            RemoteScorerError: The service can't be reached, refuses, or answers something else.
        """
        return self.score(prompts, images).or_raise()

    def score(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> Scored:
        """Like a call, but rows that can't be scored are NaN with a reason instead of an exception.

        Raises:
            ScoreError: Numbers of prompts and images that differ.
            RemoteScorerError: The service can't be reached, refuses, or answers something else.
        """
        check_pairs(prompts, images)
        scores = torch.full((len(prompts),), torch.nan)
        errors = self._bad_prompts(prompts)
        batches = self._batches(prompts, images, errors)
        answers = prefetch(self._ask, batches, num_workers=self.in_flight, ahead=self.in_flight)
        for rows, scored in answers:
            scores[rows] = scored.scores
            errors |= {rows[index]: reason for index, reason in scored.errors.items()}
        return Scored(scores, dict(sorted(errors.items())))

    def describe(self) -> dict[str, Any]:
        """What the service's scorer says of itself; the same as in process."""
        return dict(self.service.description)

    @property
    def reads_prompts(self) -> bool:
        """False for scorers of the image alone."""
        return self.service.reads_prompts

    @cached_property
    def service(self) -> Service:
        """The scorer's description and the service's limits, asked for once.

        Raises:
            RemoteScorerError: The service can't be reached, refuses, or answers something else.
        """
        answer = self._send("GET", None)
        try:
            limits = Limits(**answer["limits"])
            return Service(answer["scorer"], answer["reads_prompts"], limits)
        except (KeyError, TypeError) as error:
            raise RemoteScorerError(f"{self._endpoint} is no reward service of this version: {error!r}.") from error

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""
        if client := self.__dict__.pop("_client", None):
            client.close()

    def __getstate__(self) -> dict[str, Any]:
        """Connections stay behind, so that a scorer can be sent to another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_client"}

    def _bad_prompts(self, prompts: Sequence[str]) -> dict[int, str]:
        return {
            row: f"the prompt is {prompt!r:.100}, not a text."
            for row, prompt in enumerate(prompts)
            if not is_text(prompt) and self.reads_prompts
        }

    def _batches(
        self, prompts: Sequence[str], images: Sequence[ImageSource], errors: dict[int, str]
    ) -> Iterator[_Batch]:
        """Requests within the limits, each with its pictures once; what can't be sent goes to `errors` instead."""
        rows_of = rows_by_image(images, skip=errors)
        if not rows_of:
            return
        limits = self.service.limits
        most = min(self.batch_size, limits.max_pairs)

        def encode(rows: list[int]) -> bytes | ImageError:
            try:
                return encode_image(images[rows[0]], limits.max_pixels)
            except ImageError as error:
                return error

        encoded = prefetch(encode, rows_of, num_workers=self.num_workers, ahead=2 * self.num_workers)
        batch = _Batch()
        for rows, image in zip(rows_of, encoded, strict=True):
            if isinstance(image, ImageError):
                errors.update(dict.fromkeys(rows, str(image)))
                continue
            for row in rows:
                prompt = prompts[row] if is_text(prompts[row]) else ""
                size = len(image) + _OVERHEAD + _size(prompt)
                if _Batch().size + size > limits.max_body_bytes:
                    errors[row] = f"image and prompt have {size:,} bytes; the service takes {limits.max_body_bytes:,}."
                    continue
                full = len(batch.rows) == most or len(batch.images) == limits.max_images
                if batch.rows and (full or batch.size + size > limits.max_body_bytes):
                    yield batch
                    batch = _Batch()
                batch.add(row, prompt, image)
        if batch.rows:
            yield batch

    def _ask(self, batch: _Batch) -> tuple[list[int], Scored]:
        message = {"prompts": batch.prompts, "images": batch.images, "image_index": batch.image_index}
        answer = self._send("POST", pack(message, MSGPACK))
        if answer.get("scorer") != self.service.description:
            raise RemoteScorerError(
                f"{self._endpoint} now serves {answer.get('scorer')} instead of {self.service.description}; "
                "scores of the two can't be mixed."
            )
        try:
            return batch.rows, _read_answer(answer, len(batch.rows))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RemoteScorerError(f"{self._endpoint} gave an answer that makes no sense: {error}") from error

    @property
    def _endpoint(self) -> str:
        return f"{self.url}/score/{quote(self.name, safe=':')}"

    @cached_property
    def _client(self) -> Any:
        httpx = _import_httpx()
        headers = {"Accept": MSGPACK, "Content-Type": MSGPACK}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=30.0),
            trust_env=not _is_loopback(self.url),  # a proxy could not reach this machine's own addresses
        )

    def _send(self, method: str, body: bytes | None) -> dict[str, Any]:
        """The message that answers a request; retried while there is hope."""
        unreachable = _import_httpx().RequestError
        reason = ""
        for attempt in range(self.retries + 1):
            wait = None
            try:
                response = self._client.request(method, self._endpoint, content=body)
            except unreachable as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return self._unpack(response)
                reason = f"HTTP {response.status_code}: {_reason(response)}"
                if response.status_code not in RETRIED:
                    raise RemoteScorerError(f"{self._endpoint} answered {reason}")
                wait = retry_after(response.headers.get("retry-after"), MAX_DELAY)
            if attempt < self.retries:
                delay = max(wait or 0.0, backoff(attempt + 1, FIRST_DELAY, MAX_DELAY))
                logger.warning("%s: %s; attempt %d in %.1f s.", self._endpoint, reason, attempt + 2, delay)
                time.sleep(delay)
        raise RemoteScorerError(f"{self._endpoint} gave no answer in {self.retries + 1} attempts. Last: {reason}")

    def _unpack(self, response: Any) -> dict[str, Any]:
        media = media_type(response.headers.get("content-type"))
        try:
            if media is None:
                raise MessageError("it is neither MessagePack nor JSON.")
            return unpack(response.content, media)
        except MessageError as error:
            raise RemoteScorerError(f"{self._endpoint} gave an answer that can't be read: {error}") from error


def load(
    *, checkpoint: Any = None, config: Any = None, tokenizer: Any = None, device: Any = None, dtype: Any = None,
    url: str | None = None, scorer: str | None = None, token_env: str = "T2I_ALIGN_TOKEN", timeout: float = 120.0,
    retries: int = 8, batch_size: int = 64, in_flight: int = 4, num_workers: int = 4,
) -> RemoteScorer:  # fmt: skip
    """A scorer of a reward service: see `rewards.load_scorer`.

    Args:
        checkpoint, config, tokenizer, device, dtype: Must be left out: the service chooses them.
        url: Of the service, `http://host:port`.
        scorer: Its name there.
        token_env: Environment variable with the token; not set: none is sent.
        timeout, retries, batch_size, in_flight, num_workers: See `RemoteScorer`.

    Raises:
        ValueError: An option that is missing, superfluous or out of range.
        RemoteScorerError: The service can't be reached, refuses the token, or has no such scorer.
    """
    local = {"checkpoint": checkpoint, "config": config, "tokenizer": tokenizer, "device": device, "dtype": dtype}
    if given := [name for name, value in local.items() if value is not None]:
        raise ValueError(
            f"`{given[0]}` of a remote scorer is set where it runs (python -m rewards.serve); leave it out."
        )
    if url is None or scorer is None:
        raise ValueError('A remote scorer needs `url`, like "http://host:8300", and `scorer`, its name there.')
    remote = RemoteScorer(
        url, scorer, token=os.environ.get(token_env), timeout=timeout, retries=retries, batch_size=batch_size,
        in_flight=in_flight, num_workers=num_workers,
    )  # fmt: skip
    _ = remote.service  # a wrong address, token or name shows now, not after hours of rendering
    return remote


def _read_answer(answer: Mapping[str, Any], pairs: int) -> Scored:
    """Scores and errors of an answer; raises KeyError, TypeError or ValueError if it is none to `pairs` pairs."""
    scores, errors = answer["scores"], {int(row): str(reason) for row, reason in answer["errors"].items()}
    if len(scores) != pairs:
        raise ValueError(f"{len(scores)} scores for {pairs} pairs.")
    if any(row not in range(pairs) for row in errors):
        raise ValueError(f"errors of rows {sorted(errors)} of {pairs}.")
    for row, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not (number or (score is None and row in errors)):
            raise ValueError(f"the score of row {row} is {score!r}.")
    values = [math.nan if row in errors else score for row, score in enumerate(scores)]
    return Scored(torch.tensor(values, dtype=torch.float32), errors)


def _reason(response: Any) -> str:
    """What a refusal says: the `error` of our own, the beginning of anybody else's."""
    if media_type(response.headers.get("content-type")) == JSON:
        try:
            return str(unpack(response.content, JSON).get("error", ""))[:500]
        except MessageError:
            pass
    return " ".join(response.text[:200].split())


def _size(prompt: str) -> int:
    return len(prompt.encode()) + 2 * _OVERHEAD


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError('Remote scorers need `pip install "t2i-align[serve]"`.') from error
    return httpx
