"""Step-wise evaluation of ChatGen agents on ChatGenBench (ChatGen Table 4, left half, and Table 7 by input type).

    python -m align.evaluation.chatgen --config evaluate.yaml --dataset data/chatgenbench --output_dir runs/chatgen

with agents such as `{"Evo": {"policy": "runs/chatgen-evo", "tokens": "runs/chatgen-tokens"}, "Base": {"policy":
"runs/base"}, "Baseline": {"policy": "models/any-chat-model", "rewrite": true}}`. Plans are kept as they are
made; a run that was killed goes on where it was.
"""

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align.agents.chatgen import BaseAgent, ChatGenAgent, EvoAgent
from align.agents.plans import STEPS
from align.agents.rewriting import RewritingAgent
from align.chat_dialogue import ChatDialogue, ChatFormat
from align.chats import load_chats
from align.evaluation.answers import policy_identity
from align.evaluation.bert_score import BertScorer
from align.evaluation.plan_metrics import estimates, stepwise, to_markdown
from align.pairs import DataError
from align.trainers.model_token_config import ModelTokenError
from rewards.checkpoints import CheckpointError
from rewards.commandline import ConfigError, from_json, run_command, save_config
from rewards.files import write_atomically
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import DialogueError
from rollouts.policy import load_policy, load_tokenizer

logger = logging.getLogger(__name__)

MAX_BASELINE_TEXTS = 4000


@dataclass
class ChatGenEvaluationConfig:
    """Options of `python -m align.evaluation.chatgen`."""

    dataset: str = field(metadata={"help": "ChatGenBench folder."})
    output_dir: str = field(metadata={"help": "Folder of the plans and tables."})
    agents: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Name -> {policy, tokens} (Evo), {policy} (Base), or {policy, rewrite: true} (no fine-tuning); "
            "JSON on a command line."
        },
    )
    given: list[str] = field(
        default_factory=list,
        metadata={"help": "Steps that are given instead of asked for: prompt, model, arguments (Table 6)."},
    )
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Encoder of the prompts' BERTScore: a folder, or a name on the Hub."},
    )
    max_rows: int | None = field(default=None, metadata={"help": "Test on so many rows only; none: all."})
    batch_size: int = field(default=8, metadata={"help": "Chats that are planned together."})
    dtype: str = field(default="auto", metadata={"help": "Of the policies."})
    device: str | None = field(default=None, metadata={"help": "Of the policies; none: a GPU if there is one."})

    def __post_init__(self) -> None:
        self.agents = from_json("agents", self.agents or {}, dict)
        if not self.agents:
            raise ValueError("`agents` is empty; name one, such as {Evo: {policy: runs/evo, tokens: runs/tokens}}.")
        for name, given in self.agents.items():
            if not isinstance(given, dict) or "policy" not in given or set(given) - {"policy", "tokens", "rewrite"}:
                raise ValueError(
                    f"`agents`: {name} must have `policy` and can have `tokens` or `rewrite`, but has {given}."
                )
        if unknown := sorted(set(self.given) - set(STEPS)):
            raise ValueError(f"`given` may hold {', '.join(STEPS)}, but has {', '.join(unknown)}.")


def main(config: ChatGenEvaluationConfig) -> dict[str, Any]:
    """Plan, compare and write the tables; returns what table.json holds."""
    output = Path(config.output_dir)
    data = load_chats(config.dataset)
    rows = data["test"]
    if config.max_rows is not None and config.max_rows < len(rows):
        rows = rows.shuffle(seed=0, keep_in_memory=True).select(range(config.max_rows), keep_in_memory=True)
    rows = list(rows)
    catalog = Catalog.load(Path(config.dataset) / "catalog.jsonl")
    scorer = BertScorer.from_pretrained(config.encoder, device=config.device)
    # Drawn, since neighbours in the alphabet begin alike and are no unrelated pairs.
    prompts = sorted(set(data["train"]["prompt"]))
    scorer.baseline = scorer.fit_baseline(random.Random(0).sample(prompts, min(MAX_BASELINE_TEXTS, len(prompts))))
    save_config(output / "config.yaml", config)
    found = {}
    for name, given in from_json("agents", config.agents, dict).items():
        plans = plan_rows(name, given, rows, catalog, config)
        found[name] = estimates(stepwise(plans, rows, scorer, catalog), rows)
    report = {
        name: {group: {metric: e._asdict() for metric, e in metrics.items()} for group, metrics in groups.items()}
        for name, groups in found.items()
    }
    write_atomically(output / "table.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "table.md", to_markdown(found).encode())
    logger.info("%s", output / "table.md")
    return report


def plan_rows(
    name: str, given: Mapping[str, Any], rows: list[dict[str, Any]], catalog: Catalog, config: ChatGenEvaluationConfig
) -> list[dict[str, Any]]:
    """A plan for each row, from the file of an earlier run as far as that goes.

    Raises:
        ConfigError: The file is of another agent or of other options.
    """
    number = list(from_json("agents", config.agents, dict)).index(name)
    path = Path(config.output_dir) / f"plans-{number}.jsonl"
    # Trained further, a policy is another one.
    identities = {part: policy_identity(str(value)) for part, value in given.items()}
    origin = {"agent": identities, "given": config.given}
    plans = _read_plans(path, origin)
    missing = [row for row in rows if row["id"] not in plans]
    if missing:
        agent = load_agent(given, catalog, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for start in tqdm(range(0, len(missing), config.batch_size), desc=name, unit="batch", disable=None):
                some = missing[start : start + config.batch_size]
                truths = [{step: row[step] for step in config.given} for row in some]
                own = [row["source"]["demonstration"] for row in some]
                for row, plan in zip(some, agent.plans([r["messages"] for r in some], truths, own), strict=True):
                    plans[row["id"]] = plan.to_dict()
                    line = {"id": row["id"], "origin": origin, "plan": plan.to_dict()}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
    return [plans[row["id"]] for row in rows]


def load_agent(given: Mapping[str, Any], catalog: Catalog, config: ChatGenEvaluationConfig) -> ChatGenAgent:
    """Evo if there are model tokens, the one without fine-tuning if it is to rewrite, else Base."""
    if "tokens" in given:
        options: dict[str, Any] = {"dataset": config.dataset, "dtype": config.dtype, "device": config.device}
        agent: ChatGenAgent = EvoAgent.from_pretrained(given["policy"], given["tokens"], **options)
    else:
        policy = load_policy(given["policy"], dtype=config.dtype)
        policy.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dialogue = ChatDialogue(load_tokenizer(given["policy"]), ChatFormat.load(given["policy"]))
        if given.get("rewrite"):
            agent = RewritingAgent(policy.eval(), dialogue, catalog, load_chats(config.dataset)["train"])
        else:
            agent = BaseAgent(policy.eval(), dialogue, catalog)
    agent.batch_size = config.batch_size
    return agent


def _read_plans(path: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Plans by row; a line that a kill cut short is dropped."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        write_atomically(path, b"".join(line + b"\n" for line in lines[:-1]))
    plans = {}
    for line in filter(None, lines[:-1]):
        entry = json.loads(line)
        if entry["origin"] != origin:
            raise ConfigError(
                f"{path} holds plans of {entry['origin']}, not of {dict(origin)}: name another `output_dir` or "
                "delete it."
            )
        plans[entry["id"]] = entry["plan"]
    return plans


if __name__ == "__main__":
    errors = (DataError, CatalogError, DialogueError, CheckpointError, ModelTokenError)
    run_command(main, ChatGenEvaluationConfig, errors=errors)
