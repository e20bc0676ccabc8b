"""Regret: how much better the best call for a chat's prompt would have been than that of the model that was chosen.

Known where several or all models have drawn the human-validated prompt of a chat (`python -m rollouts.run` on a table
whose `prompt_id` is the chat's id, or its demonstration's, for all of its chats). The regret of a choice is the best
candidate's reward less that of the candidate which makes the very call, or else the mean of those of the same model.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.agents.plans import plan_call
from align.evaluation.plan_results import NOT_DRAWN, PlanResults
from rewards.commandline import ConfigError
from rollouts.api import PARAMETER_INFORMATION
from rollouts.catalog import Catalog

logger = logging.getLogger(__name__)

DEFAULT, ANY_MODEL = "default call", "a random model"
"""References beside the methods: the default call, and the mean over the models that have drawn the prompt."""


class Choice(NamedTuple):
    """What a method would call for a chat.

    Attributes:
        model: Name in the catalogue.
        parameters: Fields of `PARAMETER_INFORMATION`; None: only a model was chosen.
    """

    model: str
    parameters: Mapping[str, Any] | None = None


class Regret(NamedTuple):
    """Of a choice.

    Attributes:
        value: At least 0, in units of the reward.
        equal_call: Whether the very call had been drawn, and not only the model.
    """

    value: float
    equal_call: bool


class ScoredPrompts:
    """Rewards of the calls that have drawn a prompt.

    Args:
        path: Scored candidates (`rollouts.scored_table`).

    Raises:
        ConfigError: No such file, or one of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path, columns=["prompt_id", "candidates"]).to_pylist()
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ConfigError(f"`candidates` {path} is no table of scored candidates: {error}.") from error
        self._of = {row["prompt_id"]: _rewards(row["candidates"]) for row in rows}

    def __contains__(self, prompt_id: object) -> bool:
        return bool(self._of.get(prompt_id))

    def regret(self, prompt_id: str, choice: Choice) -> Regret | None:
        """Regret of a choice; None if the prompt or its model has no reward."""
        rewards = self._of.get(prompt_id, [])
        of_model = [(call, reward) for call, reward in rewards if call["model"] == choice.model]
        if not of_model:
            return None
        best = max(reward for _, reward in rewards)
        if choice.parameters is not None:
            for call, reward in of_model:
                if all(call[name] == choice.parameters[name] for name in PARAMETER_INFORMATION):
                    return Regret(best - reward, True)
        return Regret(best - sum(reward for _, reward in of_model) / len(of_model), False)

    def regret_of_any(self, prompt_id: str) -> Regret | None:
        """Mean regret over the models that have drawn the prompt; None if none has."""
        models = {call["model"] for call, _ in self._of.get(prompt_id, [])}
        values = [found.value for name in models if (found := self.regret(prompt_id, Choice(name)))]
        return Regret(sum(values) / len(values), False) if values else None


def with_regrets(results: PlanResults, scored: ScoredPrompts, catalog: Catalog) -> PlanResults:
    """The same rows with `regret` and `equal_call` (null where they are not known), and rows of the references.

    Args:
        results: Not changed. At stages of Table 6 nothing is asked for.
        scored: What was drawn for which prompt.
        catalog: The models.
    """
    own = [row for row in results.rows if row["method"] not in (DEFAULT, ANY_MODEL)]
    chats = {(row["run"], row["row_id"]): row for row in own if not row["stage"]}
    default = results.about.default_call
    fixed = [{**row, **_NOTHING, "method": name} for name in (DEFAULT, ANY_MODEL) for row in chats.values()]
    rows, known = [], 0
    for row in [*own, *fixed]:
        prompt_id = row["row_id"] if row["row_id"] in scored else row["demonstration"]
        regret = None
        if row["method"] == ANY_MODEL:
            regret = scored.regret_of_any(prompt_id)
        elif row["method"] == DEFAULT:
            regret = scored.regret(prompt_id, Choice(default["model"], default)) if default else None
        elif not row["stage"] and row["plan"] is not None:
            regret = scored.regret(prompt_id, _choice(json.loads(row["plan"]), catalog))
        known += regret is not None
        value, equal = (None, None) if regret is None else regret
        rows.append({**row, "regret": value, "equal_call": equal})
    if not known:
        logger.warning("No chat's id, nor its demonstration's, is a `prompt_id` of `candidates`: no regret is known.")
    return PlanResults(results.about, rows)


_NOTHING: dict[str, Any] = {"plan": None, "steps": {}, "seconds": None, **NOT_DRAWN}


def _choice(plan: Mapping[str, Any], catalog: Catalog) -> Choice:
    """What a plan, or a model that was chosen without one, calls."""
    if "arguments" not in plan or plan["model"] not in catalog:
        return Choice(plan["model"])
    return Choice(plan["model"], plan_call(plan["model"], plan["arguments"], catalog).to_dict())


def _rewards(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    found = []
    for candidate in candidates:
        call = candidate["call"]
        call = json.loads(call) if isinstance(call, str) else call
        if call is not None and candidate.get("reward") is not None:
            found.append((call, float(candidate["reward"])))
    return found
