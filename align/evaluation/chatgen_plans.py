"""Plans of ChatGen agents for the rows of a test split, kept as they are made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from align.agents.chatgen import ChatGenAgent, EvoAgent, load_chat_policy
from align.agents.chatgen_base import BaseAgent
from align.agents.plans import STEPS, Plan
from align.agents.rewriting import RewritingAgent, VerbatimAgent
from align.chats import load_chats
from align.evaluation.answers import policy_identity
from rewards.commandline import ConfigError
from rewards.files import write_atomically
from rollouts.catalog import Catalog

GIVEN: dict[str, tuple[str, ...]] = {step: tuple(other for other in STEPS if other != step) for step in STEPS}
"""Stages of ChatGen's Table 6: the step that is looked at -> the steps whose ground truth is given."""


class PlannerOptions(NamedTuple):
    """How agents are loaded and asked.

    Attributes:
        dataset: ChatGenBench folder; agents take their examples from its training split.
        batch_size: Chats that are planned together.
        dtype: Of the policies.
        device: Of the policies; None: a GPU if there is one.
    """

    dataset: str
    batch_size: int
    dtype: str
    device: str | None


class KeptPlans:
    """An agent's plans; it is loaded only if something is left to plan.

    Args:
        name: Of the agent, for messages and progress bars.
        given: Its options: `policy`, and `tokens` (with `arguments`, if not written) or `rewrite`; perhaps
            `no_repeat_ngram_size`. Or `verbatim` alone.
        catalog: The models.
        options: How it is loaded.
        devices: Where its plans were made; filled by `plan`.
    """

    def __init__(self, name: str, given: Mapping[str, Any], catalog: Catalog, options: PlannerOptions) -> None:
        self.name, self.given, self.catalog, self.options = name, given, catalog, options
        # Trained further, a policy is another one.
        self.identities = {part: policy_identity(str(value)) for part, value in given.items()}
        self.devices: set[str] = set()
        self._agent: ChatGenAgent | None = None
        self._plain: dict[str, dict[str, Any]] = {}  # plans without ground truth

    def plan(self, rows: Sequence[Mapping[str, Any]], path: Path, steps: Sequence[str] = ()) -> list[dict[str, Any]]:
        """A plan for each row, from the file of an earlier run as far as that goes.

        Args:
            rows: Of ChatGenBench.
            path: File of the plans.
            steps: Whose ground truth is given instead of asked for.

        Raises:
            ConfigError: The file is of another agent or of other options.
        """
        origin = {"agent": self.identities, "given": list(steps)}
        kept = _read_plans(path, origin)
        missing = [row for row in rows if row["id"] not in kept]
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._agent = self._agent or load_agent(self.given, self.catalog, self.options)
            device, size = device_name(self.options.device), self.options.batch_size
            with path.open("a", encoding="utf-8") as file:
                for start in tqdm(range(0, len(missing), size), desc=self._title(steps), unit="batch", disable=None):
                    some = missing[start : start + size]
                    found = self._ask(self._agent, some, [{step: row[step] for step in steps} for row in some])
                    for row, plan in zip(some, found, strict=True):
                        line = {"id": row["id"], "origin": origin, "device": device, "plan": plan.to_dict()}
                        kept[row["id"]] = line
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
        self.devices |= {kept[row["id"]].get("device") or "unknown" for row in rows}
        if not steps:
            self._plain = {row["id"]: kept[row["id"]]["plan"] for row in rows}
        return [kept[row["id"]]["plan"] for row in rows]

    def _ask(
        self, agent: ChatGenAgent, rows: Sequence[Mapping[str, Any]], truths: Sequence[Mapping[str, Any]]
    ) -> list[Plan]:
        """Plans; agents that write everything at once have written what they would with ground truth."""
        if all(row["id"] in self._plain for row in rows):
            found = [agent.replanned(self._plain[r["id"]], truth) for r, truth in zip(rows, truths, strict=True)]
            if replanned := [plan for plan in found if plan is not None]:
                return replanned
        own = [row["source"]["demonstration"] for row in rows]
        return agent.plans([row["messages"] for row in rows], truths, own)

    def unload(self) -> None:
        """Free the policy."""
        self._agent = None

    def _title(self, steps: Sequence[str]) -> str:
        return f"{self.name}, given {' and '.join(steps)}" if steps else self.name


def load_agent(given: Mapping[str, Any], catalog: Catalog, options: PlannerOptions) -> ChatGenAgent:
    """Evo if there are model tokens, the one without fine-tuning if it is to rewrite, nobody if verbatim, else Base."""
    if given.get("verbatim"):
        return VerbatimAgent(catalog)
    if "tokens" in given:
        agent: ChatGenAgent = EvoAgent.from_pretrained(
            given["policy"], given["tokens"], dataset=options.dataset, dtype=options.dtype, device=options.device,
            arguments=given.get("arguments", "written"),
        )  # fmt: skip
    else:
        written = load_chat_policy(given["policy"], options.dataset, options.dtype, options.device)
        if given.get("rewrite"):
            agent = RewritingAgent(*written, catalog, load_chats(options.dataset)["train"])
        else:
            agent = BaseAgent(*written, catalog)
    agent.batch_size = options.batch_size
    agent.no_repeat_ngram_size = given.get("no_repeat_ngram_size", 0)
    return agent


def device_name(device: str | None) -> str:
    """A device as people know it: `cpu`, or the name of the GPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def planning_seconds(plan: Mapping[str, Any]) -> float:
    """Wall time of a plan's steps, each its share of the batch's."""
    return float(sum(step["seconds"] for step in plan["trail"]))


def _read_plans(path: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Lines by row; one that a kill cut short is dropped."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        write_atomically(path, b"".join(line + b"\n" for line in lines[:-1]))
    kept = {}
    for line in filter(None, lines[:-1]):
        entry = json.loads(line)
        if entry["origin"] != origin:
            raise ConfigError(
                f"{path} holds plans of {entry['origin']}, not of {dict(origin)}: name another `output_dir` or "
                "delete it."
            )
        kept[entry["id"]] = entry
    return kept
