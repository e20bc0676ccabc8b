"""Scored candidates (the table of `rollouts.run`) as what RRHF learns from, and what they are like."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align.pairs import DataError, response_text
from rollouts.dialogue import Dialogue, DialogueError

logger = logging.getLogger(__name__)

_CANDIDATE_FIELDS = ("response", "call", "origin", "reward")


def read_scored(path: str | Path, *, policy: str | None = None) -> list[dict[str, Any]]:
    """The rows of a scored table.

    Args:
        path: Parquet, as `rollouts.scored_table` writes it.
        policy: Fingerprint of the policy that must have proposed the candidates (`rollouts.policy.policy_fingerprint`);
            None: anyone. Rows that don't say are taken as they are.

    Raises:
        DataError: No such file, no rows, another format, or candidates of another policy.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "scored.parquet"
    if not path.is_file():
        raise DataError(f"There is no table of scored candidates at {path}. Make one with python -m rollouts.run.")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} can't be read as Parquet: {error}.") from error
    if not rows:
        raise DataError(f"{path} has no rows.")
    _check_columns(path, rows[0])
    others = Counter(row["policy"] for row in rows if row.get("policy") not in (None, policy))
    if policy is not None and others:
        raise DataError(
            f"{path}: {others.total()} of {len(rows)} prompts have candidates of another policy "
            f"({', '.join(others)}; yours is {policy}). RRHF ranks what the policy itself proposes: make a table with "
            "it, or pass `--any_policy true`."
        )
    return rows


def training_rows(
    rows: Sequence[Mapping[str, Any]], dialogue: Dialogue, max_length: int | None
) -> list[dict[str, Any]]:
    """Rows for `RRHFTrainer`: token ids of prompt and responses, rewards, rewards of single pictures, model names.

    The user's text is cut where prompt and longest response would not fit; a response never is.

    Args:
        rows: Of `read_scored`.
        dialogue: Format and tokenizer of the policy.
        max_length: Tokens.

    Raises:
        DataError: A dialogue that can't be written.
    """
    prepared = []
    for row in rows:
        candidates = [c for c in row["candidates"] if c["call"] is not None]
        try:
            responses = [_response_ids(dialogue, row["instruction"], c["response"]) for c in candidates]
            prompt = _prompt_ids(dialogue, row["instruction"], responses, max_length)
        except DialogueError as error:
            raise DataError(f"prompt {row['prompt_id']!r}: {error}") from error
        prepared.append(
            {
                "prompt_ids": prompt,
                "responses": responses,
                "rewards": [c["reward"] for c in candidates],
                "image_rewards": _image_rewards(candidates),
                "standard_errors": [c.get("reward_standard_error") for c in candidates],
                "choices": [c["call"]["model"] for c in candidates],
            }
        )
    return prepared


def replay_rows(pairs: Any, count: int, dialogue: Dialogue, max_length: int | None, seed: int) -> list[dict[str, Any]]:
    """Instruction-call pairs as lists of one candidate: nothing to rank, so they only add to the cross-entropy.

    Args:
        pairs: DABench rows.
        count: How many to take, at random and each at most once.
        dialogue, max_length: As in `training_rows`.
        seed: Of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    rows = []
    for index in order.tolist():
        pair = pairs[index]
        responses = [_response_ids(dialogue, pair["instruction"], response_text(pair["api"]))]
        rows.append(
            {
                "prompt_ids": _prompt_ids(dialogue, pair["instruction"], responses, max_length),
                "responses": responses,
                "rewards": [0.0],
                "image_rewards": [[]],
                "choices": [pair["api"]["model"]],
            }
        )
    return rows


def describe(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a scored table is like, as numbers for a log.

    `reward/<origin>`: mean reward by origin; `reward/best`, `reward/mean`: over prompts, of the best candidate and of
    all; `reward/noise_floor`: mean standard error of a reward over its renders; `reward/pairs_within_noise`: share of
    pairs that are closer than the standard error of their difference; `candidates`, `models`: per prompt, with a
    reward; `candidates/without_reward`: share.
    """
    by_origin: defaultdict[str, list[float]] = defaultdict(list)
    errors, within, best, count, models = [], [], [], [], []
    total = lacking = 0
    for row in rows:
        scored = [c for c in row["candidates"] if c["reward"] is not None]
        total, lacking = total + len(row["candidates"]), lacking + len(row["candidates"]) - len(scored)
        for candidate in scored:
            by_origin[candidate["origin"]].append(candidate["reward"])
            if candidate.get("reward_standard_error") is not None:
                errors.append(candidate["reward_standard_error"])
        within += [_within_noise(first, second) for first, second in combinations(scored, 2)]
        if scored:
            best.append(max(c["reward"] for c in scored))
            count.append(len(scored))
            models.append(len({c["call"]["model"] for c in scored}))
    rewards = [reward for of_origin in by_origin.values() for reward in of_origin]
    known = [value for value in within if value is not None]
    numbers = {f"reward/{origin}": _mean(values) for origin, values in sorted(by_origin.items())} | {
        "reward/best": _mean(best),
        "reward/mean": _mean(rewards),
        "reward/noise_floor": _mean(errors),
        "reward/pairs_within_noise": _mean(known),
        "candidates": _mean(count),
        "models": _mean(models),
        "candidates/without_reward": lacking / total if total else math.nan,
    }
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def _check_columns(path: Path, row: Mapping[str, Any]) -> None:
    missing = [name for name in ("prompt_id", "instruction", "candidates") if name not in row]
    if not missing and row["candidates"]:
        missing = [f"candidates.{name}" for name in _CANDIDATE_FIELDS if name not in row["candidates"][0]]
    if missing:
        raise DataError(f"{path} is no table of scored candidates: it lacks {', '.join(missing)}.")


def _image_rewards(candidates: Sequence[Mapping[str, Any]]) -> list[list[float | None]] | None:
    """Rewards of single pictures, if the table has them: tables of earlier versions don't."""
    if any(c["reward"] is not None and not c.get("image_rewards") for c in candidates):
        return None
    return [c.get("image_rewards") or [] for c in candidates]


def _response_ids(dialogue: Dialogue, instruction: Any, response: str) -> list[int]:
    return [label for label in dialogue.encode(instruction, response).labels if label != -100]


def _prompt_ids(dialogue: Dialogue, instruction: Any, responses: list[list[int]], max_length: int | None) -> list[int]:
    prompt = dialogue.encode_prompt(instruction)
    longest = max(map(len, responses), default=0)
    if max_length is None or len(prompt) + longest <= max_length:
        return prompt
    try:
        return dialogue.encode_prompt(instruction, max_length - longest)
    except DialogueError:
        return prompt  # the longest response does not fit at all, and is left out by the trainer


def _within_noise(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    pairs = zip(first.get("image_rewards") or [], second.get("image_rewards") or [], strict=False)
    differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if len(differences) < 2:
        return None
    return float(abs(differences.mean()) < differences.std(ddof=1) / math.sqrt(len(differences)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
