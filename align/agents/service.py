"""An agent behind HTTP: who may ask what, how much at a time, and what the answer is.

`build_app` makes a FastAPI application of it; `python -m align.agents.serve` runs that.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from align.agents.diffagent import Answer as AgentAnswer
from align.agents.diffagent import DiffAgent
from align.agents.exports import EXPORTS, ExportError
from align.agents.filters import CallFilter, FilterError
from align.agents.tool import TOOL_NAME, tool_schema
from rewards.batch_queue import BatchQueue, Job
from rewards.gate import Answer, Gate, Refusal, refused
from rewards.gated_app import Gone, answer_of, chunks, gated_app, gone, response
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import DialogueError

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

JSON = "application/json"
Handle: TypeAlias = Callable[["AgentService", dict[str, Any], Gone], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class CallRequest:
    """What is asked for in one request.

    Attributes:
        instructions: DABench's instruction objects.
        filter: What may be called.
        top_k: Alternatives to give.
        formats: Which exports to give with each call.
        seed: Of the exports.
    """

    instructions: tuple[dict[str, str], ...]
    filter: CallFilter
    top_k: int = 0
    formats: tuple[str, ...] = ()
    seed: int = 0


class AgentQueue(BatchQueue[CallRequest, list[AgentAnswer]]):
    """Gives an agent to one thread; a request counts as many as it has prompts."""

    def __init__(self, agent: DiffAgent, *, max_batch: int, max_wait: float) -> None:
        self.agent = agent
        super().__init__("the agent", max_batch=max_batch, max_wait=max_wait)

    def size(self, request: CallRequest) -> int:
        """Prompts."""
        return len(request.instructions)

    def answer(self, jobs: list[Job[CallRequest, list[AgentAnswer]]]) -> None:
        """Answer requests together that ask under the same filter."""
        alike: dict[tuple[CallFilter, int], list[Job[CallRequest, list[AgentAnswer]]]] = {}
        for job in jobs:
            alike.setdefault((job.request.filter, job.request.top_k), []).append(job)
        for (filter, top_k), group in alike.items():
            instructions = [item for job in group for item in job.request.instructions]
            try:
                answers = self.agent.answer(instructions, filter, top_k=top_k)
            except BaseException as error:  # whatever it is: were this thread to die, every later request would hang
                self._fail(group, error)
                continue
            for job in group:
                own, answers = answers[: self.size(job.request)], answers[self.size(job.request) :]
                job.future.set_result(own)

    def _fail(self, jobs: list[Job[CallRequest, list[AgentAnswer]]], error: BaseException) -> None:
        if len(jobs) == 1 or isinstance(error, FilterError):
            for job in jobs:
                job.future.set_exception(error)
            return
        logger.warning("The agent failed on a batch (%r); its %d requests go one by one.", error, len(jobs))
        for job in jobs:
            self.answer([job])


class AgentService(Gate):
    """An agent behind a token, limits and a queue."""

    def __init__(
        self,
        agent: DiffAgent,
        *,
        catalog_path: str | None = None,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_prompts: int = 64,
        max_prompt_chars: int = 20_000,
        max_body_bytes: int = 2**20,
        max_queue: int = 64,
        token: str | None = None,
        body_timeout: float = 30.0,
    ) -> None:
        """Ready.

        Args:
            agent: Who answers.
            catalog_path: What `reload` reads; None: it is refused.
            max_batch: Prompts that are answered together.
            max_wait: Seconds that a request waits for others while the agent is idle.
            max_prompts: Of a request.
            max_prompt_chars: Characters of a prompt, and of a negative prompt.
            max_body_bytes, max_queue, token, body_timeout: See `Gate`.
        """
        super().__init__(max_body_bytes=max_body_bytes, max_queue=max_queue, token=token, body_timeout=body_timeout)
        self.agent, self.catalog_path = agent, catalog_path
        self.max_prompts, self.max_prompt_chars = max_prompts, max_prompt_chars
        self.queue = AgentQueue(agent, max_batch=max_batch, max_wait=max_wait)

    async def respond(
        self,
        path: str,
        handle: Handle,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes],
        gone: Gone,
    ) -> Answer:
        """Answer a request with a JSON body.

        Args:
            path: Of the request.
            handle: `call` or `chat`.
            headers: Of the request, case-insensitive.
            body: Chunks as they arrive.
            gone: Returns when the client has hung up.
        """
        try:
            self.check_token(headers)
            with self.admitted():
                content = await self.receive(headers, body)
                try:
                    value = json.loads(content)
                except (ValueError, RecursionError) as error:
                    raise Refusal(400, f"the body is not JSON ({error})"[:300]) from error
                if not isinstance(value, dict):
                    raise Refusal(400, f"the body must be a JSON object, but is {type(value).__name__}")
                found = await handle(self, value, gone)
            return Answer(200, JSON, json.dumps(found, ensure_ascii=False).encode(), {})
        except Refusal as refusal:
            return refused_at(path, refusal)
        except (FilterError, DialogueError, ExportError) as error:
            return refused_at(path, Refusal(422, str(error).rstrip(".")))
        except Exception as error:  # a bug of ours: let through, it would close the connection
            logger.exception("The request could not be answered.")
            return refused_at(path, Refusal(500, f"{type(error).__name__} in the service; its log says more"))

    async def call(self, value: dict[str, Any], gone: Gone) -> dict[str, Any]:
        """`POST /call`: `prompt` (text or a list), `negative_prompt`, `filter`, `top_k`, `formats`, `seed`."""
        request = self._read(value)
        answers = await answer_of(self.queue, request, gone)
        return {"answers": [self._written(*pair, request) for pair in zip(request.instructions, answers, strict=True)]}

    async def chat(self, value: dict[str, Any], gone: Gone) -> dict[str, Any]:
        """`POST /v1/chat/completions`: OpenAI's form. The last user message is the prompt, the answer a tool call."""
        if value.get("stream"):
            raise Refusal(400, "`stream` is not supported: a call comes at once")
        request = self._read({"prompt": _last_user_text(value.get("messages"))} | _extras(value))
        (answer,) = await answer_of(self.queue, request, gone)
        call = {"name": TOOL_NAME, "arguments": answer.call.to_json()}
        message = {
            "role": "assistant",
            "content": answer.note or None,
            "tool_calls": [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}],
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": str(value.get("model") or TOOL_NAME),
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}],
            "usage": {
                "prompt_tokens": answer.num_prompt_tokens,
                "completion_tokens": answer.num_tokens,
                "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
            },
            "t2i_align": self._written(request.instructions[0], answer, request),
        }

    def tools(self, headers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The tool that an answer calls, as OpenAI's `tools` have it."""
        self.check_token(headers)
        return [tool_schema()]

    def reload(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """Read the catalogue's file again; requests go on meanwhile.

        Raises:
            Refusal: Wrong token, no file, or one that can't be used: the old catalogue stays.
        """
        self.check_token(headers)
        if self.catalog_path is None:
            raise Refusal(409, "the service was not started from a catalogue's file")
        try:
            return {"models": self.load_catalog()}
        except CatalogError as error:
            raise Refusal(409, f"the old catalogue stays: {error}".rstrip(".")) from error

    def load_catalog(self) -> int:
        """Read the catalogue's file; the number of its models.

        Raises:
            CatalogError: It can't be used; the old one stays.
        """
        self.agent.reload(Catalog.load(str(self.catalog_path)))
        logger.info("The catalogue has %d models now.", len(self.agent.catalog))
        return len(self.agent.catalog)

    def health(self) -> dict[str, Any]:
        """Whether requests are taken, and how many models there are."""
        return {"status": "stopping" if self.stopping else "ready", "models": len(self.agent.catalog)}

    def close(self) -> None:
        """Finish what is in the queue."""
        self.stopping = True
        self.queue.close()

    def _read(self, value: dict[str, Any]) -> CallRequest:
        if unknown := sorted(value.keys() - _FIELDS):
            raise Refusal(400, f"unknown field {unknown[0]!r:.60}; a request may hold {', '.join(_FIELDS)}")
        prompts = value.get("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list) or not prompts:
            raise Refusal(400, "`prompt` must be text or a list of texts")
        if len(prompts) > self.max_prompts:
            raise Refusal(413, f"`prompt` holds {len(prompts)} texts; {self.max_prompts} are allowed")
        negative = value.get("negative_prompt", "")
        for name, text in [*(("prompt", prompt) for prompt in prompts), ("negative_prompt", negative)]:
            if not isinstance(text, str):
                raise Refusal(400, f"`{name}` must be text, but is {type(text).__name__}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refusal(400, f"`{name}` holds half a surrogate pair, which is no text")
            if len(text) > self.max_prompt_chars:
                raise Refusal(413, f"`{name}` has {len(text):,} characters; {self.max_prompt_chars:,} are allowed")
        formats = value.get("formats", [])
        if not isinstance(formats, list) or not all(isinstance(f, str) and f in EXPORTS for f in formats):
            raise Refusal(400, f"`formats` must be a list of any of {', '.join(EXPORTS)}")
        return CallRequest(
            tuple({"prompt": prompt, "negative prompt": negative} for prompt in prompts),
            CallFilter.from_dict(value.get("filter") or {}),
            _whole(value, "top_k", 0, 50),
            tuple(formats),
            _whole(value, "seed", 0, 2**32 - 1),
        )

    def _written(self, item: Mapping[str, str], answer: AgentAnswer, request: CallRequest) -> dict[str, Any]:
        # The catalogue it was answered with: by now the model can have retired.
        given = (answer.call, answer.catalog, item["prompt"], item["negative prompt"], request.seed)
        return {"prompt": item["prompt"]} | answer.to_dict() | {name: EXPORTS[name](*given) for name in request.formats}


def refused_at(path: str, refusal: Refusal) -> Answer:
    """The answer that says why; below `/v1` as OpenAI's clients expect it."""
    answer = refused(refusal)
    if not path.startswith("/v1/"):
        return answer
    error = {"message": f"{refusal}.", "type": "invalid_request_error" if refusal.status < 500 else "server_error"}
    return answer._replace(body=json.dumps({"error": error | {"param": None, "code": None}}).encode())


def build_app(service: AgentService) -> "FastAPI":
    """The application with its routes: see `python -m align.agents.serve --help`.

    Raises:
        ImportError: FastAPI is not installed.
    """
    app = gated_app("t2i-align agent", service.close, refused_at)
    from fastapi import Request
    from starlette.responses import Response

    async def respond(request: Request, handle: Handle) -> Response:
        return response(
            await service.respond(request.url.path, handle, request.headers, chunks(request), gone(request))
        )

    @app.post("/call")
    async def call(request: Request) -> Response:
        return await respond(request, AgentService.call)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await respond(request, AgentService.chat)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_token(request.headers)
        entry = {"id": TOOL_NAME, "object": "model", "created": 0, "owned_by": "t2i-align"}
        return Response(json.dumps({"object": "list", "data": [entry]}), media_type=JSON)

    @app.get("/tools")
    async def tools(request: Request) -> Response:
        return Response(json.dumps(service.tools(request.headers)), media_type=JSON)

    @app.post("/catalog/reload")
    async def reload(request: Request) -> Response:
        return Response(json.dumps(await asyncio.to_thread(service.reload, request.headers)), media_type=JSON)

    @app.get("/health")
    async def health() -> Response:
        return Response(json.dumps(service.health()), 503 if service.stopping else 200, media_type=JSON)

    return app


_FIELDS = ("prompt", "negative_prompt", "filter", "top_k", "formats", "seed")


def _extras(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat request may hold beside OpenAI's own fields, which say nothing here (temperature, tools, …)."""
    return {name: value[name] for name in _FIELDS[1:] if value.get(name) is not None}


def _last_user_text(messages: Any) -> str:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refusal(400, "`messages` must be a list of objects")
    contents: Sequence[Any] = [message.get("content") for message in messages if message.get("role") == "user"]
    if not contents:
        raise Refusal(400, "`messages` has no message of the role `user`, which would be the prompt")
    content = contents[-1]
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        raise Refusal(400, "the last message of the role `user` has no text")
    return content


def _whole(value: Mapping[str, Any], name: str, least: int, most: int) -> int:
    number = value.get(name)
    if number is None:
        return least
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise Refusal(400, f"`{name}` must be a whole number from {least} to {most}, but is {number!r:.40}")
    return number
