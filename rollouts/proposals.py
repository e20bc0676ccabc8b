"""From a policy's raw responses to the candidate calls of a prompt (DiffAgent Sec. 3.2.2), and what went wrong on it.

Of each response only the model information is taken; if the catalogue has the model, the call is written anew: the
catalogue's own model information, parameters from a sampled response where valid, else the model's defaults. Equal
calls are merged.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rollouts.api import ARCHITECTURES, PARAMETER_INFORMATION, APICall
from rollouts.catalog import Catalog
from rollouts.model_information import judge_model, read_fields

GREEDY, MULTINOMIAL, DIVERSE_BEAM, DEFAULT = "greedy", "multinomial", "diverse_beam", "default"


class RawResponse(NamedTuple):
    """What the policy wrote, and how it was decoded (`greedy`, `multinomial` or `diverse_beam`)."""

    text: str
    origin: str


def candidate(response: str, origin: str, catalog: Catalog) -> dict[str, Any]:
    """A response as a candidate: its call if it is one that can be made, else null and the first reason."""
    call, reason = catalog.judge(response)
    callable_call = call.to_dict() if call is not None and reason is None else None
    return {"response": response, "call": callable_call, "origin": origin, "error": reason}


def default_candidate(call: APICall) -> dict[str, Any]:
    """The architecture's default call as a candidate."""
    return {"response": call.to_json(), "call": call.to_dict(), "origin": DEFAULT, "error": None}


def judged(raw: RawResponse, catalog: Catalog, base_model: str) -> dict[str, Any]:
    """A raw response as it is recorded: `text`, `origin`, and `error`, the reason why it is no call, or null.

    A beam may be cut off behind its model information, so that is all it is judged by.
    """
    if raw.origin == DIVERSE_BEAM:
        reason = judge_model(raw.text, catalog, base_model).reason
    else:
        reason = catalog.judge(raw.text).reason
    return {"text": raw.text, "origin": raw.origin, "error": reason}


def rebuilt_candidates(
    raws: Sequence[RawResponse],
    catalog: Catalog,
    base_model: str,
    *,
    default: APICall | None = None,
    sampled_parameters: bool = True,
    common_size: bool = False,
) -> list[dict[str, Any]]:
    """The different calls of a prompt: `response` (canonical JSON), `call`, `origin`, `origins` and `error` (null).

    Args:
        raws: In the order in which the candidates are to stand.
        catalog: What can be called.
        base_model: Models of other architectures are left out.
        default: The default call, which comes last.
        sampled_parameters: Give beams the parameters of the first multinomial response that has any for this
            architecture. False: the model's defaults.
        common_size: Give all calls the size of the architecture's default call.
    """
    side = ARCHITECTURES[base_model].default_side
    size = {"width": side, "height": side} if common_size else {}
    shared: Mapping[str, Any] = {}
    if sampled_parameters:
        samples = (_parameters(raw.text, base_model) for raw in raws if raw.origin == MULTINOMIAL)
        shared = next(filter(None, samples), {})
    calls: list[tuple[APICall, str]] = []
    for raw in raws:
        name = judge_model(raw.text, catalog, base_model).name
        if name is not None:
            own = shared if raw.origin == DIVERSE_BEAM else _parameters(raw.text, base_model)
            calls.append((catalog.reconstruct(name, {**own, **size}), raw.origin))
    if default is not None:
        calls.append((default, DEFAULT))
    return _merged(calls)


def _parameters(text: str, base_model: str) -> dict[str, Any]:
    """The parameters of a response, as far as it has any; none of one that is meant for another architecture."""
    fields = read_fields(text).fields
    if fields.get("base Model", base_model) != base_model:
        return {}
    return {key: fields[key] for key in PARAMETER_INFORMATION if key in fields}


def _merged(calls: Iterable[tuple[APICall, str]]) -> list[dict[str, Any]]:
    by_text: dict[str, dict[str, Any]] = {}
    for call, origin in calls:
        text = call.to_json()
        if text in by_text:
            by_text[text]["origins"].append(origin)
        else:
            row = {"response": text, "call": call.to_dict(), "origin": origin, "origins": [origin], "error": None}
            by_text[text] = row
    return list(by_text.values())


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run found, from the rows it wrote.

    Returns:
        `prompts`; `policy`; `hallucination`: by origin the number of raw responses, the share that is no call that can
        be made, and how many for which reason; `candidates_per_prompt` and `distinct_models_per_prompt`: mean, least
        and most; `merged_duplicates`: candidates that equalled an earlier one; `prompts_without_candidates`.
    """
    raws: dict[str, Counter[str]] = {}
    for raw in itertools.chain.from_iterable(row["raw"] for row in rows):
        raws.setdefault(raw["origin"], Counter())[raw["error"] or "ok"] += 1
    callable_of = [[c for c in row["candidates"] if c["call"] is not None] for row in rows]
    return {
        "prompts": len(rows),
        "policy": sorted({str(row["policy"]) for row in rows}),
        "hallucination": {
            origin: {
                "responses": counts.total(),
                "rate": (counts.total() - counts["ok"]) / counts.total(),
                "reasons": {reason: n for reason, n in counts.most_common() if reason != "ok"},
            }
            for origin, counts in raws.items()
        },
        "candidates_per_prompt": _spread([len(candidates) for candidates in callable_of]),
        "distinct_models_per_prompt": _spread([len({c["call"]["model"] for c in found}) for found in callable_of]),
        "merged_duplicates": sum(len(c.get("origins", [""])) - 1 for found in callable_of for c in found),
        "prompts_without_candidates": sum(not found for found in callable_of),
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)} if values else {}
