"""Tables of calls, as `rollouts.candidates` and others write them, and the pictures they ask for.

A table has a row per prompt: `prompt_id`, `instruction` ({"prompt", "negative prompt"} or just the prompt) and
`candidates`, each with a `call` (or null and an `error` that says why) and, if known, its `response` and `origin`; and,
if a policy proposed them, `policy`, its fingerprint. A row may instead have a single `call`. JSON Lines or Parquet.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.api import APICall, APICallError
from rollouts.catalog import Catalog
from rollouts.numbered_rows import read_rows
from rollouts.requests import RenderError, RenderFailure, RenderJob, RenderRequest, RenderSettings, resolve


class CallsError(ValueError):
    """A table of calls that can't be read; the message names the file, the row and the field."""


@dataclass
class Candidate:
    """A call that was proposed for a prompt, or what was proposed instead of one."""

    response: str
    call: dict[str, Any] | None
    origin: str = "given"
    error: str | None = None


@dataclass
class PromptCalls:
    """A prompt and its candidates."""

    prompt_id: str
    prompt: str
    negative_prompt: str
    candidates: list[Candidate]
    policy: str | None = None


@dataclass
class Asked:
    """A candidate's pictures.

    Attributes:
        row, column: Of the prompt and of the candidate in the table.
        seeds: The same for all candidates of a prompt, so that they differ in nothing but the call.
        jobs: What to draw, one per seed; empty if there is a failure.
        requests: As `jobs`.
        failure: Why nothing can be drawn for this candidate.
    """

    row: int
    column: int
    seeds: list[int]
    jobs: list[RenderJob] = field(default_factory=list)
    requests: list[RenderRequest] = field(default_factory=list)
    failure: RenderFailure | None = None


def read_calls(path: str | Path) -> list[PromptCalls]:
    """Read a table.

    Raises:
        CallsError: No such file, another format, a row without prompt or call, an id that stands twice.
    """
    path = Path(path)
    if not path.is_file():
        raise CallsError(f"There is no table of calls at {path}.")
    prompts: dict[str, PromptCalls] = {}
    for number, row in read_rows(path, CallsError):
        prompt = _prompt_calls(f"{path}, row {number}", row)
        if prompt.prompt_id in prompts:
            raise CallsError(f"{path}, row {number}: `prompt_id` {prompt.prompt_id!r} stands more than once.")
        prompts[prompt.prompt_id] = prompt
    if not prompts:
        raise CallsError(f"{path} holds no calls.")
    return list(prompts.values())


def ask(
    prompts: Sequence[PromptCalls], catalog: Catalog, settings: RenderSettings, *, num_images: int, seed: int = 0
) -> list[Asked]:
    """The pictures of every candidate, in the order of the table. A call that can't be drawn has its reason instead."""
    asked = []
    for row, prompt in enumerate(prompts):
        seeds = seeds_of(prompt.prompt_id, num_images, seed)
        for column, candidate in enumerate(prompt.candidates):
            entry = Asked(row, column, seeds)
            asked.append(entry)
            if candidate.call is None:
                entry.failure = RenderFailure(candidate.error or "invalid_call", "The response is no call.")
                continue
            try:
                call = APICall.from_dict(candidate.call)
                entry.requests = [RenderRequest(call, prompt.prompt, prompt.negative_prompt, s) for s in seeds]
                entry.jobs = [resolve(request, catalog, settings) for request in entry.requests]
            except APICallError as error:
                entry.failure = RenderFailure("invalid_call", str(error))
            except RenderError as error:
                entry.failure, entry.jobs = error.failure, []
    return asked


def seeds_of(prompt_id: str, num_images: int, seed: int = 0) -> list[int]:
    """Seeds of a prompt's pictures: 32-bit numbers that depend on its id, and not on the rest of the table.

    More pictures keep the first ones' seeds.
    """
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{index}/{prompt_id}".encode()).digest()[:4], "big")
        for index in range(num_images)
    ]


def unique_jobs(asked: Iterable[Asked]) -> tuple[list[RenderJob], list[RenderRequest]]:
    """Every job once, however many candidates ask for it, with its request."""
    by_key = {
        job.key: (job, request)
        for entry in asked
        for job, request in zip(entry.jobs, entry.requests, strict=False)  # no jobs: a failure
    }
    return [job for job, _ in by_key.values()], [request for _, request in by_key.values()]


def _prompt_calls(where: str, row: Any) -> PromptCalls:
    if not isinstance(row, dict):
        raise CallsError(f"{where}: must be an object, but is {type(row).__name__}.")
    instruction = row.get("instruction", row.get("prompt"))
    if isinstance(instruction, str):
        instruction = {"prompt": instruction, "negative prompt": row.get("negative prompt") or ""}
    if not isinstance(instruction, dict) or not isinstance(instruction.get("prompt"), str):
        raise CallsError(f"{where}: needs `instruction` with a `prompt`, or `prompt`, but has {list(row)[:8]}.")
    prompt, negative = instruction["prompt"], instruction.get("negative prompt") or ""
    candidates = row.get("candidates")
    if candidates is None and "call" in row:
        candidates = [{name: row.get(name) for name in ("response", "call", "origin", "error")}]
    if not isinstance(candidates, list) or not isinstance(negative, str):
        raise CallsError(f"{where}: needs `candidates` (a list) or `call`, and `negative prompt` must be text.")
    prompt_id = row.get("prompt_id", row.get("id"))
    if prompt_id is None:
        prompt_id = hashlib.sha256(json.dumps([prompt, negative]).encode()).hexdigest()[:16]
    read = [_candidate(where, entry) for entry in candidates]
    return PromptCalls(str(prompt_id), prompt, negative, read, row.get("policy"))


def _candidate(where: str, entry: Any) -> Candidate:
    if not isinstance(entry, dict):
        raise CallsError(f"{where}: a candidate must be an object with `call`, but is {type(entry).__name__}.")
    call, error = entry.get("call"), entry.get("error")
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            call, error = None, error or "not_json"
    if call is not None and not isinstance(call, dict):
        call, error = None, error or "not_an_object"
    response = entry.get("response")
    if not isinstance(response, str):
        response = json.dumps(call, ensure_ascii=False) if call is not None else ""
    return Candidate(response, call, str(entry.get("origin") or "given"), error)
