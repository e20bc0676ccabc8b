"""The model information of a response, also of one that is cut off (DiffAgent Sec. 3.2.2).

Only the part of a response that names the model is taken for a candidate, so this reads as much of a JSON object as is
there, and judges the model alone.
"""

import json
from typing import Any, NamedTuple, get_args

from rollouts.api import ARCHITECTURES, APICall, Reason
from rollouts.catalog import Catalog
from rollouts.dialogue import Dialogue

_WHITE_SPACE = " \t\n\r"
# A name that nobody has may be longer than every real one, and a policy may write the same text in more tokens.
_SLACK_TOKENS = 16


class PartialCall(NamedTuple):
    """What can be read of a response.

    Attributes:
        fields: The fields that are complete, by name, in order.
        reason: Why it is no object to read from (`not_json`, `not_an_object`, `duplicate_field`), or `None`.
    """

    fields: dict[str, Any]
    reason: Reason | None


class NamedModel(NamedTuple):
    """The model a response names.

    Attributes:
        name: As in the catalogue; `None` if there is a reason.
        reason: Why it can't be called, one of `rollouts.api.REASONS`; `missing_field` also if it is cut off.
    """

    name: str | None
    reason: Reason | None


def read_fields(text: str) -> PartialCall:
    """The fields of a JSON object that may end anywhere; what follows the last readable one is ignored."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return PartialCall({}, _not_an_object(text))
    fields: dict[str, Any] = {}
    while True:
        try:
            key, position = decoder.raw_decode(text, _skip(text, position + 1))
            colon = _skip(text, position)
            if not isinstance(key, str) or text[colon : colon + 1] != ":":
                return PartialCall(fields, None)
            value, position = decoder.raw_decode(text, _skip(text, colon + 1))
        except (ValueError, RecursionError):  # cut off, or no JSON from here on
            return PartialCall(fields, None)
        position = _skip(text, position)
        if position == len(text) and not isinstance(value, str | list | dict):
            return PartialCall(fields, None)  # "51" may be the beginning of 512
        if key in fields:
            return PartialCall(fields, "duplicate_field")
        fields[key] = value
        if text[position : position + 1] != ",":
            return PartialCall(fields, None)


def judge_model(text: str, catalog: Catalog, base_model: str) -> NamedModel:
    """The model that a response names, if it can be called.

    Args:
        text: The response, or its beginning.
        catalog: What can be called.
        base_model: The architecture that is asked for.
    """
    fields, reason = read_fields(text)
    if reason is not None:
        return NamedModel(None, reason)
    name = fields.get("model")
    if not isinstance(name, str):
        return NamedModel(None, "missing_field" if "model" not in fields else "wrong_type")
    entry = catalog.get(name)
    if entry is None:
        return NamedModel(None, "unknown_model")
    kinds = get_args(APICall.model_fields["type"].annotation)
    expected: tuple[tuple[str, str, Any, Reason, Reason], ...] = (
        ("type", entry.type, kinds, "unknown_model_type", "model_type_mismatch"),
        ("base Model", entry.base_model, ARCHITECTURES, "unknown_base_model", "base_model_mismatch"),
    )
    for field, true_value, known, unknown, mismatch in expected:
        given = fields.get(field, true_value)
        if not isinstance(given, str):
            return NamedModel(None, "wrong_type")
        if given != true_value:
            return NamedModel(None, mismatch if given in known else unknown)
    if entry.base_model != base_model:
        return NamedModel(None, "base_model_mismatch")
    return NamedModel(name, None)


def tokens_of_model_information(dialogue: Dialogue, catalog: Catalog, base_model: str) -> int:
    """Most tokens that the model information at the beginning of a response takes, with some to spare."""
    beginnings = [
        entry.default_call().to_json().split(', "width":', 1)[0] for entry in catalog.of_architecture(base_model)
    ]
    return max(map(len, dialogue.response_ids(beginnings)), default=0) + _SLACK_TOKENS


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITE_SPACE:
        position += 1
    return position


def _not_an_object(text: str) -> Reason:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "not_json"
    return "not_an_object"
