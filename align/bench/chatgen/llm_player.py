"""Chats written by language models that play roles (ChatGen Sec. 3.1.2), several of them mixed by shares.

    player = LLMPlayer([Generator("gpt-4o-mini", "https://api.openai.com/v1")], "answers.sqlite", seed=0)
    for chat in player.play(tasks):
        print(chat.generator, chat.problem, chat.texts)

Every answer is kept as it arrives, also one that breaks a check, and never paid for again. Which model writes a chat
depends on the chat and the seed alone.
"""

import base64
import json
import os
import random
import re
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align.bench.chatgen.checks import problem_of
from align.bench.chatgen.role_prompts import PROMPT_VERSION, questions
from align.bench.chatgen.schema import Chat, ChatTask
from align.bench.llm_client import (
    Answer,
    AnswerStore,
    Asker,
    Endpoint,
    UnusableAnswerError,
    question_key,
    without_thoughts,
)
from align.bench.plain_text import one_line

# Chats read ahead per request under way: enough that one slow answer does not stop the others.
LOOK_AHEAD = 4
_WEB = ("http://", "https://")
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_LABEL = re.compile(r"^(?:user|query|message|chat|answer|output|response)(?: \d+)?\s*[:：]\s*", re.IGNORECASE)
_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[-*•]|(?:message|turn|user) \d+:)\s+(.+)$", re.IGNORECASE | re.MULTILINE)


class BudgetError(RuntimeError):
    """Writing on would cost more than allowed; what was answered is kept."""


@dataclass(frozen=True)
class Generator:
    """A language model that writes chats.

    Attributes:
        model: Name at the endpoint.
        base_url: Of an OpenAI-compatible endpoint.
        share: Of the chats, relative to the other generators' shares.
        api_key_env: Environment variable that holds the key.
        vision: Whether it is shown pictures; otherwise it is told what they show.
        system_role: Whether its template knows a system role.
        temperature: 0.9 in the paper.
        concurrency: Requests under way at once.
        timeout: Seconds per attempt.
        max_retries: Repetitions on 408, 409, 429, 5xx, timeouts and lost connections.
        max_tokens: Longest answer.
        input_price, output_price: US dollars per million tokens.
    """

    model: str
    base_url: str
    share: float = 1.0
    api_key_env: str = "OPENAI_API_KEY"
    vision: bool = False
    system_role: bool = True
    temperature: float = 0.9
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 4
    max_tokens: int = 400
    input_price: float = 0.0
    output_price: float = 0.0

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6

    def endpoint(self) -> Endpoint:
        """How to ask it."""
        return Endpoint(
            base_url=self.base_url,
            model=self.model,
            api_key=os.environ.get(self.api_key_env),
            concurrency=self.concurrency,
            temperature=self.temperature,
            timeout=self.timeout,
            max_retries=self.max_retries,
            max_tokens=self.max_tokens,
        )


@dataclass
class Usage:
    """What a generator was asked, and what it cost.

    Attributes:
        answers: All that were ever paid for and are kept.
        prompt_tokens, completion_tokens: Of these, as the endpoint counts them.
        dollars: Likewise, by the generator's prices.
        asked: Answers that were paid for in this run.
        reused: Answers of this run that an earlier one had paid for.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    asked: int = 0
    reused: int = 0


class LLMPlayer:
    """Several language models behind one `RolePlayer`.

    Args:
        generators: At least one, with different names.
        cache_path: SQLite file of the answers; made if missing.
        seed: Decides which generator writes which chat.
        budget: US dollars that all answers together may cost, those of earlier runs included.
        image_root: Folder that relative image paths are in.

    Attributes:
        usage: By generator.

    Raises:
        ValueError: No generators, a name twice, a share that is not positive, or an argument out of range.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        cache_path: str | os.PathLike[str],
        *,
        seed: int = 0,
        budget: float | None = None,
        image_root: str | os.PathLike[str] = ".",
    ) -> None:
        names = [generator.model for generator in generators]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`generators` must be one or more with different names, but are {names}.")
        if unusable := [generator.model for generator in generators if not generator.share > 0]:
            raise ValueError(f"The shares of `generators` must be above 0, but those of {unusable} are not.")
        self._generators = {generator.model: generator for generator in generators}
        self._endpoints = {generator.model: generator.endpoint() for generator in generators}
        self._store = AnswerStore(Path(cache_path))
        self._seed = seed
        self._budget = budget
        self._image_root = Path(image_root)
        totals = self._store.totals()
        self.usage = {name: Usage(*totals.get(name, (0, 0, 0))) for name in names}
        for generator in generators:
            self.usage[generator.model].dollars = generator.price(*totals.get(generator.model, (0, 0, 0))[1:])

    def generator_of(self, task: ChatTask) -> Generator:
        """Who writes a chat: by shares, and for a chat with a picture one that sees pictures, if there is one."""
        able = list(self._generators.values())
        if task.reference is not None:
            able = [generator for generator in able if generator.vision] or able
        rng = random.Random(f"generator/{self._seed}/{task.id}/{task.attempt}")
        return rng.choices(able, [generator.share for generator in able])[0]

    def play(self, tasks: Iterable[ChatTask]) -> Iterator[Chat]:
        """A chat for each task, in order; those that break a check say which.

        Raises:
            LLMEndpointError: An endpoint refuses its key (401) or does not know its model (404).
            BudgetError: The next answer could exceed the budget.
        """
        room = LOOK_AHEAD * sum(generator.concurrency for generator in self._generators.values())
        waiting: deque[_Waiting] = deque()
        with ExitStack() as stack:
            answers = stack.enter_context(closing(self._store.connect()))
            askers = {
                name: stack.enter_context(Asker(endpoint, self._store)) for name, endpoint in self._endpoints.items()
            }
            progress = stack.enter_context(tqdm(desc="chats", unit=" chats", disable=None))
            for task in tasks:
                waiting.append(self._start(task, answers, askers))
                if len(waiting) >= room:
                    yield self._finish(waiting.popleft(), progress)
            while waiting:
                yield self._finish(waiting.popleft(), progress)

    def _start(self, task: ChatTask, answers: sqlite3.Connection, askers: dict[str, Asker]) -> "_Waiting":
        generator = self.generator_of(task)
        asked = questions(task, system_role=generator.system_role)
        image = task.reference.image if task.reference is not None and generator.vision else None
        if image is not None and not self._can_be_shown(image):
            image = None
        key = question_key(generator.model, PROMPT_VERSION, generator.temperature, task.id, task.attempt, asked, image)
        kept = self._store.get(answers, key)
        if kept is not None:
            return _Waiting(task, generator, kept)
        self._check_budget()
        if image is not None:
            asked[-1]["content"] = [
                {"type": "text", "text": asked[-1]["content"]},
                {"type": "image_url", "image_url": {"url": self._image_url(image)}},
            ]
        return _Waiting(task, generator, askers[generator.model].ask(key, task.id, asked))

    def _finish(self, waiting: "_Waiting", progress: Any) -> Chat:
        import openai

        task, generator = waiting.task, waiting.generator
        endpoint = self._endpoints[generator.model]
        progress.update()
        try:
            if isinstance(waiting.answer, Answer):
                answer = waiting.answer
                self.usage[generator.model].reused += 1
            else:
                answer = waiting.answer.result()
                self._count(answer, generator)
                progress.set_postfix_str(f"${self.spent():.2f}", refresh=False)
            texts = read_texts(answer.text, task)
        except (openai.OpenAIError, ValueError) as error:
            if refused := endpoint.refused(error):
                raise refused from None  # the cause may quote the key
            name = "unusable_answer" if isinstance(error, ValueError) else "endpoint_error"
            return Chat(task, (), generator.model, name, endpoint.readable(error))
        problem = problem_of(texts, task)
        if problem is None:
            return Chat(task, texts, generator.model)
        return Chat(task, texts, generator.model, problem.name, problem.detail)

    def spent(self) -> float:
        """US dollars for all answers that are kept."""
        return sum(usage.dollars for usage in self.usage.values())

    def _count(self, answer: Answer, generator: Generator) -> None:
        usage = self.usage[generator.model]
        prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
        usage.asked += 1
        usage.answers += 1
        usage.prompt_tokens += prompt
        usage.completion_tokens += completion
        usage.dollars += generator.price(prompt, completion)

    def _check_budget(self) -> None:
        if self._budget is not None and self.spent() >= self._budget:
            raise BudgetError(
                f"The answers so far cost ${self.spent():.2f}, and `budget` is ${self._budget:.2f}. They are kept in "
                f"{self._store.path}: raise `budget` and start again."
            )

    def _can_be_shown(self, image: str) -> bool:
        """Addresses and files; pictures that are drawn after the chats are not there yet."""
        path = self._image_root / image
        return image.startswith(_WEB) or (path.suffix.lower() in _MIME and path.is_file())

    def _image_url(self, image: str) -> str:
        if image.startswith(_WEB):
            return image
        path = self._image_root / image
        return f"data:{_MIME[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@dataclass(frozen=True)
class _Waiting:
    """A chat that is next, with its answer or the request for it."""

    task: ChatTask
    generator: Generator
    answer: Answer | Future[Answer]


def read_texts(answer: str, task: ChatTask) -> tuple[str, ...]:
    """The user's messages in an answer.

    Raises:
        UnusableAnswerError: A history that is no list of messages.
    """
    text = re.sub(r"```\w*", "", without_thoughts(answer)).strip()
    if len(task.targets) == 1:
        return (_message(text),)
    start, end = text.find("["), text.rfind("]")
    listed: Any = None
    if 0 <= start < end:
        try:
            listed = json.loads(text[start : end + 1])
        except ValueError:
            listed = None
    if not (isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed)):
        listed = _NUMBERED.findall(text)
    if not listed:
        raise UnusableAnswerError(f"no list of messages: {one_line(text)[:80]!r}")
    return tuple(_message(item) for item in listed)


def _message(text: str) -> str:
    return _LABEL.sub("", one_line(text)).strip(' "“”')
