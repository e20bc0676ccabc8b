"""Answers of OpenAI-compatible endpoints, many at a time and each paid for once.

    store = AnswerStore("answers.sqlite")
    with Asker(endpoint, store) as asker:
        futures = [asker.ask(key, "card 7", messages) for key, messages in questions]

An answer is kept in SQLite the moment it arrives: a kill loses at most the requests under way.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.bench.plain_text import one_line, truncate

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MAX_KEPT_ANSWER_CHARS = 100_000
# Added to the table of earlier releases, which lacks them.
_LATER_COLUMNS = {"model": "TEXT", "prompt_tokens": "INTEGER", "completion_tokens": "INTEGER"}

Messages = Sequence[dict[str, Any]]


class LLMEndpointError(RuntimeError):
    """The endpoint, as configured, cannot answer any question."""


class UnusableAnswerError(ValueError):
    """An answer of the LLM that can't be used."""


@dataclass(frozen=True)
class Answer:
    """What an endpoint said, and what it counted for it.

    Attributes:
        text: Raw.
        prompt_tokens, completion_tokens: As the endpoint counts them, if it does.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint and how to ask it.

    Attributes:
        base_url: With `/v1`, if the endpoint has that.
        model: Name of the model there.
        api_key: Sent as bearer token; servers that ask for none ignore it.
        concurrency: Requests under way at once.
        temperature: Of sampling.
        timeout: Seconds per attempt.
        max_retries: Repetitions after the first attempt on 408, 409, 429, 5xx, timeouts and lost connections.
        max_tokens: Longest answer; None leaves it to the endpoint (some endpoints refuse the option).

    Raises:
        ImportError: Without the library `openai`.
        ValueError: An argument is out of range.
    """

    base_url: str
    model: str
    api_key: str | None = None
    concurrency: int = 8
    temperature: float = 0.0
    timeout: float = 60
    max_retries: int = 4
    max_tokens: int | None = 512

    def __post_init__(self) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError('Asking a language model needs openai: pip install "t2i-align[bench]".') from error
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must start with http:// or https://, but got {self.base_url!r}.")
        if self.concurrency < 1 or self.max_retries < 0 or self.timeout <= 0:
            raise ValueError(
                "`concurrency` must be at least 1, `max_retries` at least 0 and `timeout` above 0, "
                f"but got {self.concurrency}, {self.max_retries} and {self.timeout}."
            )

    def client(self) -> AsyncOpenAI:
        """A client for one event loop."""
        from openai import AsyncOpenAI

        key = self.api_key or "none"  # the library insists on one
        return AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.max_retries)

    async def complete(self, client: AsyncOpenAI, messages: Messages) -> Answer:
        """Ask once (the client repeats what failed for a passing reason).

        Raises:
            openai.OpenAIError: The endpoint failed for good.
            UnusableAnswerError: It answered with something that is no chat completion.
        """
        import openai

        response = await client.chat.completions.create(
            model=self.model,
            messages=list(messages),  # ty: ignore[invalid-argument-type]
            temperature=self.temperature,
            max_tokens=openai.omit if self.max_tokens is None else self.max_tokens,
        )
        return _answer(response)

    def readable(self, error: BaseException) -> str:
        """An error in one line, without the key."""
        text = one_line(f"{type(error).__name__}: {error}")
        return truncate(text.replace(self.api_key, "[key]") if self.api_key else text, 300)

    def refused(self, error: BaseException) -> LLMEndpointError | None:
        """The error to end with, where asking on is useless: a wrong key (401) or no such model or address (404)."""
        import openai

        if not isinstance(error, openai.AuthenticationError | openai.NotFoundError):
            return None
        return LLMEndpointError(
            f"{self.base_url} cannot be asked for model {self.model!r}: {self.readable(error)}. "
            "Check the address, the model's name and the API key."
        )


def without_thoughts(text: str) -> str:
    """An answer without what a reasoning model thought first; empty if it was cut off while it thought."""
    _, mark, rest = text.rpartition("</think>")  # some leave out the opening mark
    return "" if not mark and "<think>" in rest else rest


def question_key(*parts: Any) -> str:
    """The key of a question: equal for equal parts, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class AnswerStore:
    """Answers by key, in one SQLite file that several processes may share.

    Raises:
        ValueError: The file is of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self.connect()) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, card TEXT, answer TEXT, at REAL)"
                )
                present = {row[1] for row in connection.execute("PRAGMA table_info(answers)")}
                for name in _LATER_COLUMNS.keys() - present:
                    connection.execute(f"ALTER TABLE answers ADD COLUMN {name} {_LATER_COLUMNS[name]}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"`cache_path` {path} cannot be used as an SQLite file ({error}): name another file or delete it."
            ) from error

    def connect(self) -> sqlite3.Connection:
        """A connection that commits each statement at once; one thread at a time may use it."""
        return sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)

    @staticmethod
    def get(connection: sqlite3.Connection, key: str) -> Answer | None:
        """The answer kept under a key."""
        columns = "answer, prompt_tokens, completion_tokens"
        row = connection.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(*row)

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """Answers, prompt tokens and completion tokens by model."""
        with closing(self.connect()) as connection:
            rows = connection.execute(
                "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM answers GROUP BY model"
            )
            return {row[0] or "": (row[1], row[2] or 0, row[3] or 0) for row in rows}

    @staticmethod
    def put(connection: sqlite3.Connection, key: str, about: str, model: str, answer: Answer) -> None:
        """Keep an answer."""
        row = (key, about, answer.text[:MAX_KEPT_ANSWER_CHARS], time.time(), model)
        connection.execute(
            "INSERT OR REPLACE INTO answers (key, card, answer, at, model, prompt_tokens, completion_tokens) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*row, answer.prompt_tokens, answer.completion_tokens),
        )


class Asker:
    """Asks from a thread of its own, so that answers arrive and are kept while the caller does something else.

    Args:
        endpoint: Whom to ask.
        store: Where answers are kept.
        complete: How to ask, given the client and a question; by default `endpoint.complete`. An answer that it
            returns is kept, what it raises is not.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        store: AnswerStore,
        complete: Callable[[AsyncOpenAI, Any], Awaitable[Answer]] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._client = endpoint.client()
        self._complete = complete or endpoint.complete
        self._room = asyncio.Semaphore(endpoint.concurrency)
        self._store = store
        self._connection = store.connect()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"ask {endpoint.model}", daemon=True)

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._connection.close()

    def ask(self, key: str, about: str, question: Any) -> Future[Answer]:
        """Ask as soon as there is room; the answer of the future is already kept."""
        return asyncio.run_coroutine_threadsafe(self._ask(key, about, question), self._loop)

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _ask(self, key: str, about: str, question: Any) -> Answer:
        async with self._room:
            answer = await self._complete(self._client, question)
            self._store.put(self._connection, key, about, self._endpoint.model, answer)
            return answer


def _answer(response: Any) -> Answer:
    """The answer in a chat completion from a server that may not keep to the schema."""
    try:
        content = response.choices[0].message.content
    except (AttributeError, IndexError, TypeError) as error:
        raise UnusableAnswerError("the answer of the endpoint has no choices[0].message.content") from error
    if not isinstance(content, str):
        raise UnusableAnswerError(f"the content of the answer is {type(content).__name__}, not text")
    usage = getattr(response, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(content, *(count if isinstance(count, int) else None for count in counts))
