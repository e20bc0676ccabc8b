"""Ranked candidates as training rows: tokenized, checked, and everything that can't be learned from counted."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class RankedDataError(ValueError):
    """A row of ranked candidates that can't be read; the message names the data set, the row and the field."""


class RankedData(NamedTuple):
    """What is trained on.

    Attributes:
        rows: Each with `prompt_ids`, `responses` (token ids), `rewards`, and if given `min_gap` and `choices`.
        skipped: How many candidates or prompts were left out, by reason.
        num_candidates: Length of the longest list.
        longest: Tokens of the longest prompt with response.
    """

    rows: list[Row]
    skipped: Counter[str]
    num_candidates: int
    longest: int


def prepare_ranked(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    tie_standard_errors: float = 0.0,
    what: str = "train_dataset",
) -> RankedData:
    """Tokenize and check ranked candidates.

    A candidate is left out, and counted, if it has no reward (`no_reward`), no tokens (`empty_response`), or does not
    fit (`response_too_long`); a prompt if no candidate is left (`prompt_without_candidate`). A prompt whose rewards
    are all equal stays: it adds to the cross-entropy (`prompt_without_ranking` counts such).

    Args:
        rows: Each with `prompt` (text, or messages) or `prompt_ids`; `responses` (texts, to which the end token is
            added, or token ids that end with it); `rewards` (numbers or None); and optionally, per candidate,
            `image_rewards` (one number or None per picture, in the same order for all: their seeds) or
            `standard_errors`, for ties, and `choices` (what the candidate chooses, such as a model's name).
        tokenizer: For texts.
        max_length: Tokens that a prompt with a response may have; None: any number.
        tie_standard_errors: Rewards closer than so many standard errors of their difference are tied; 0: no.
        what: Name of the data set, for messages.

    Raises:
        RankedDataError: A row that lacks a field or has lists of different lengths, or nothing left at all.
    """
    prepared: list[Row] = []
    skipped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        where = f"{what}, row {number}"
        one = _prepare(where, row, tokenizer, max_length, tie_standard_errors, skipped)
        if one is not None:
            prepared.append(one)
    if not prepared:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common()) or "it has no rows"
        raise RankedDataError(f"{what} has no candidate to learn from ({reasons}).")
    if skipped:
        logger.info("%s: %s", what, ", ".join(f"{reason} {count}" for reason, count in skipped.most_common()))
    lengths = [len(row["prompt_ids"]) + max(map(len, row["responses"])) for row in prepared]
    return RankedData(prepared, skipped, max(len(row["rewards"]) for row in prepared), max(lengths))


def _prepare(
    where: str,
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    tie_standard_errors: float,
    skipped: Counter[str],
) -> Row | None:
    prompt = _prompt_ids(where, row, tokenizer)
    responses = [_response_ids(where, text, tokenizer) for text in _list(where, row, "responses")]
    rewards = [_reward(where, value) for value in _list(where, row, "rewards", len(responses))]
    kept = []
    for index, (response, reward) in enumerate(zip(responses, rewards, strict=True)):
        if reward is None:
            skipped["no_reward"] += 1
        elif not response or response == [tokenizer.eos_token_id]:
            skipped["empty_response"] += 1
        elif max_length is not None and len(prompt) + len(response) > max_length:
            skipped["response_too_long"] += 1
        else:
            kept.append(index)
    if not kept:
        skipped["prompt_without_candidate"] += 1
        return None
    if len({rewards[i] for i in kept}) < 2:
        skipped["prompt_without_ranking"] += 1
    prepared: Row = {
        "prompt_ids": prompt,
        "responses": [responses[i] for i in kept],
        "rewards": [rewards[i] for i in kept],
    }
    if tie_standard_errors:
        prepared["min_gap"] = _gaps(where, row, kept, len(responses), tie_standard_errors)
    if row.get("choices") is not None:
        choices = _list(where, row, "choices", len(responses))
        prepared["choices"] = [choices[i] for i in kept]
    return prepared


def _prompt_ids(where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if row.get("prompt_ids") is not None:
        ids = list(row["prompt_ids"])
    elif isinstance(row.get("prompt"), str):
        ids = list(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
    elif isinstance(row.get("prompt"), Sequence):
        text = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    else:
        raise RankedDataError(f"{where}: needs `prompt` (text or messages) or `prompt_ids`, but has {sorted(row)}.")
    if not ids:
        raise RankedDataError(f"{where}: the prompt has no tokens, so nothing can predict a response.")
    return ids


def _response_ids(where: str, response: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(response, str):
        if not response.strip():
            return []
        return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if isinstance(response, Sequence) and all(isinstance(token, Integral) for token in response):
        return [int(token) for token in response]
    raise RankedDataError(f"{where}: `responses` must be texts or token ids, but holds {str(response)[:60]!r}.")


def _reward(where: str, value: Any) -> float | None:
    if value is None or (isinstance(value, Real) and not _known(float(value))):
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or math.isinf(value):
        raise RankedDataError(f"{where}: `rewards` must be finite numbers, or null where there is none, not {value!r}.")
    return float(value)


def _list(where: str, row: Mapping[str, Any], name: str, length: int | None = None) -> list[Any]:
    values = row.get(name)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RankedDataError(f"{where}: needs `{name}`, a list with an entry per candidate, but has {values!r}.")
    if length is not None and len(values) != length:
        raise RankedDataError(f"{where}: `{name}` has {len(values)} entries, but there are {length} responses.")
    return list(values)


def _gaps(where: str, row: Mapping[str, Any], kept: list[int], count: int, standard_errors: float) -> list[list[float]]:
    """Smallest difference that is no tie, for each pair of candidates."""
    if row.get("image_rewards") is not None:
        pictures = _list(where, row, "image_rewards", count)
        lengths = {len(pictures[i]) if isinstance(pictures[i], Sequence) else -1 for i in kept}
        if len(lengths) > 1 or -1 in lengths:
            raise RankedDataError(
                f"{where}: `image_rewards` must have a list for every candidate with a reward, all of one length (the "
                f"seeds), but has {str([pictures[i] for i in kept])[:80]}."
            )
        # The candidates of a prompt share their seeds, so errors are those of the picture-wise differences.
        errors = [[_paired_error(pictures[i], pictures[j]) for j in kept] for i in kept]
    elif row.get("standard_errors") is not None:
        given = [value if _known(value) else 0.0 for value in _list(where, row, "standard_errors", count)]
        errors = [[math.hypot(given[i], given[j]) for j in kept] for i in kept]
    else:
        raise RankedDataError(
            f"{where}: `tie_standard_errors` needs `image_rewards` or `standard_errors`, but the row has neither. "
            "Set it to 0, or give the rewards of single pictures."
        )
    return [[standard_errors * error for error in line] for line in errors]


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _paired_error(first: Sequence[float | None], second: Sequence[float | None]) -> float:
    differences = torch.tensor(
        [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None], dtype=torch.float64
    )
    differences = differences[~differences.isnan()]
    if len(differences) < 2:
        return 0.0
    return float(differences.std() / math.sqrt(len(differences)))
