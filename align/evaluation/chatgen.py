"""ChatGen's Tables 4 to 7 on ChatGenBench: how good the plans of agents are step by step, and the pictures they make.

    python -m align.evaluation.chatgen --config configs/chatgen/tables.yaml --dataset data/chatgenbench \\
        --output_dir runs/chatgen-tables --agents '{"Evo": {"policy": "runs/evo", "tokens": "runs/tokens"}}'

with agents such as `{"Evo": {"policy": "runs/chatgen-evo", "tokens": "runs/chatgen-tokens"}, "Base": {"policy":
"runs/base"}, "Baseline": {"policy": "models/any-chat-model", "rewrite": true}}`. Without `weights` nothing is drawn;
`python -m align.evaluation.chatgen_draw` draws the plans later, on another machine if need be. `ablation: true` also
asks for the plans of Table 6, each step with the ground truth of the other two.

Writes table4, table5, table6, table7, selection and regret (.json, .md, .csv), table (step-wise, all metrics),
per_plan.parquet, unified.json and plans-*.jsonl. Plans, pictures, scores and features are kept as they are made; a run
that was killed goes on where it was. `python -m align.evaluation.chatgen_pool` pools several training seeds.
"""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from align.agents.chatgen import Arguments
from align.agents.plans import STEPS
from align.chats import demonstrations_per_model, load_chats
from align.evaluation.bert_score import BertScorer
from align.evaluation.chatgen_draw import ERRORS, DrawingConfig, finish
from align.evaluation.chatgen_plans import GIVEN, KeptPlans, PlannerOptions, planning_seconds
from align.evaluation.plan_costs import agent_costs
from align.evaluation.plan_metrics import estimates, stepwise, to_markdown
from align.evaluation.plan_regret import ANY_MODEL, DEFAULT
from align.evaluation.plan_results import GROUND_TRUTH, About, PlanResults, result_row, save_results
from align.evaluation.plan_selection import BASELINES, DEFAULT_MODEL, chosen_rows, make_choosers
from align.pairs import DataError
from align.trainers.model_token_config import ModelTokenError
from rewards.commandline import from_json, run_command, save_config
from rewards.files import write_atomically
from rollouts.catalog import Catalog
from rollouts.dialogue import DialogueError

logger = logging.getLogger(__name__)

MAX_BASELINE_TEXTS = 4000
_TAKEN = (GROUND_TRUTH, DEFAULT, ANY_MODEL, DEFAULT_MODEL)


@dataclass
class ChatGenEvaluationConfig:
    """Options of `python -m align.evaluation.chatgen` beside those of the pictures."""

    dataset: str = field(metadata={"help": "ChatGenBench folder."})
    output_dir: str = field(metadata={"help": "Folder of the plans and tables."})
    agents: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Name -> {policy, tokens} (Evo; with `arguments: usual` those of its examples), {policy} (Base), "
            "{policy, rewrite: true} (no fine-tuning), or {verbatim: true} (no policy, the user's words); with "
            "`no_repeat_ngram_size` for policies that repeat themselves without end. JSON on a command line."
        },
    )
    given: list[str] = field(
        default_factory=list,
        metadata={"help": "Steps that are given instead of asked for: prompt, model, arguments."},
    )
    ablation: bool = field(default=False, metadata={"help": "Also plan for Table 6."})
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Encoder of the prompts' BERTScore and of `embedding`: a folder, or a name on the Hub."},
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={"help": f"Choose models without a language model, any of: {', '.join(BASELINES)}."},
    )
    learn_from: str = field(
        default="chat", metadata={"help": "Texts of training rows that tfidf and embedding look in: chat or prompt."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Of the default call."})
    baseline_model: str | None = field(
        default=None, metadata={"help": "Catalogue name of its model; none: the most downloaded checkpoint."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Test on so many rows only; none: all."})
    batch_size: int = field(default=8, metadata={"help": "Chats that are planned together."})
    dtype: str = field(default="auto", metadata={"help": "Of the policies."})
    device: str | None = field(default=None, metadata={"help": "Of policies and scorers; none: a GPU if there is one."})

    def __post_init__(self) -> None:
        self.agents = from_json("agents", self.agents or {}, dict)
        if not self.agents:
            raise ValueError("`agents` is empty; name one, such as {Evo: {policy: runs/evo, tokens: runs/tokens}}.")
        for name, given in self.agents.items():
            known = {"policy", "tokens", "rewrite", "arguments", "no_repeat_ngram_size"}
            if name in _TAKEN:
                raise ValueError(f"`agents`: {name!r} can't be the name of an agent; choose another.")
            if given == {"verbatim": True}:
                continue
            if not isinstance(given, dict) or "policy" not in given or set(given) - known:
                raise ValueError(
                    f"`agents`: {name} must have `policy` and can have {', '.join(sorted(known - {'policy'}))}, or be "
                    f"{{verbatim: true}}, but has {given}."
                )
            size = given.get("no_repeat_ngram_size", 0)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"`agents`: `no_repeat_ngram_size` of {name} must be 0 or more, but is {size!r}.")
            if given.get("arguments", "written") not in get_args(Arguments):
                raise ValueError(
                    f"`agents`: `arguments` of {name} must be written or usual, but is {given['arguments']!r}."
                )
        if unknown := sorted(set(self.given) - set(STEPS)):
            raise ValueError(f"`given` may hold {', '.join(STEPS)}, but has {', '.join(unknown)}.")
        if self.given and self.ablation:
            raise ValueError("`ablation` gives the right steps by itself; leave `given` out.")
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise ValueError(f"`baselines` may hold {', '.join(BASELINES)}, but has {', '.join(unknown)}.")
        if self.learn_from not in ("chat", "prompt"):
            raise ValueError(f"`learn_from` must be chat or prompt, but is {self.learn_from!r}.")


def main(config: ChatGenEvaluationConfig, drawing: DrawingConfig | None = None) -> dict[str, Any]:
    """Plan, compare, draw if there are `weights`, and write the tables.

    Returns:
        What the JSON files hold: `stepwise` (table.json), `table4`, ...
    """
    drawing = drawing or DrawingConfig()
    output, catalog_path = Path(config.output_dir), Path(config.dataset) / "catalog.jsonl"
    data = load_chats(config.dataset)
    rows = _test_rows(data["test"], config.max_rows)
    catalog = Catalog.load(catalog_path)
    default = catalog.default_call(config.architecture, config.baseline_model)
    if drawing.weights is not None:
        drawing.run_config(output, str(catalog_path), config.device)  # refused before hours of planning, not after
    save_config(output / "config.yaml", config, drawing)
    scorer = _prompt_scorer(config, data["train"])
    shots = demonstrations_per_model(data["train"])

    found, agents, results = {}, {}, []
    stages: dict[str, Sequence[str]] = {"": config.given} | (GIVEN if config.ablation else {})
    options = PlannerOptions(config.dataset, config.batch_size, config.dtype, config.device)
    for number, (name, given) in enumerate(from_json("agents", config.agents, dict).items()):
        planner = KeptPlans(name, given, catalog, options)
        for stage, steps in stages.items():
            path = output / (f"plans-{number}-{stage}.jsonl" if stage else f"plans-{number}.jsonl")
            plans = planner.plan(rows, path, steps)
            values = stepwise(plans, rows, scorer, catalog)
            if not stage:
                found[name] = estimates(values, rows)
            results += [
                result_row(
                    row, shots[row["model"]], stage=stage, method=name, plan=plan, seconds=planning_seconds(plan),
                    steps={metric: of_rows[i] for metric, of_rows in values.items()},
                )
                for i, (row, plan) in enumerate(zip(rows, plans, strict=True))
            ]  # fmt: skip
        planner.unload()
        known = {"devices": sorted(planner.devices), "batch_size": config.batch_size}
        agents[name] = {**given, **agent_costs(given), **known}
    results += [result_row(row, shots[row["model"]], stage="", method=GROUND_TRUTH, plan=_truth(row)) for row in rows]
    choosers = []
    for chooser in make_choosers(
        config.baselines, data["train"] if config.baselines else [], catalog, default, encoder=config.encoder,
        learn_from=config.learn_from,
    ):  # fmt: skip
        choosers.append(chooser.name)
        results += chosen_rows(chooser, rows, shots, catalog)

    stepwise_report = _write_stepwise(output, found)
    run = output.resolve().name or "run"
    metrics = sorted({metric for row in results for metric in row["steps"]})
    about = About([run], agents, choosers, list(stages), metrics, default_call=default.to_dict())
    planned = PlanResults(about, [row | {"run": run} for row in results])
    save_results(output, planned)  # before anything is drawn: that may be done elsewhere
    tables = finish(planned, drawing, output, str(catalog_path), config.device)
    logger.info("%s", (output / "table4.md").read_text())
    return {"stepwise": stepwise_report, **tables}


def _test_rows(rows: Any, count: int | None) -> list[dict[str, Any]]:
    if count is not None and count < len(rows):
        rows = rows.shuffle(seed=0, keep_in_memory=True).select(range(count), keep_in_memory=True)
    if not len(rows):
        raise DataError("The split test has no rows.")
    return list(rows)


def _prompt_scorer(config: ChatGenEvaluationConfig, train: Any) -> BertScorer:
    """BERTScore with a baseline of unrelated prompts of the training split."""
    scorer = BertScorer.from_pretrained(config.encoder, device=config.device)
    # Drawn, since neighbours in the alphabet begin alike and are no unrelated pairs.
    prompts = sorted(set(train["prompt"]))
    scorer.baseline = scorer.fit_baseline(random.Random(0).sample(prompts, min(MAX_BASELINE_TEXTS, len(prompts))))
    return scorer


def _truth(row: Mapping[str, Any]) -> dict[str, Any]:
    """The human-validated record as a plan."""
    plan = {name: row[name] for name in ("prompt", "negative_prompt", "model")}
    return plan | {"arguments": dict(row["arguments"]), "trail": []}


def _write_stepwise(output: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    report = {
        name: {group: {metric: e._asdict() for metric, e in metrics.items()} for group, metrics in groups.items()}
        for name, groups in found.items()
    }
    write_atomically(output / "table.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "table.md", to_markdown(found).encode())
    return report


if __name__ == "__main__":
    run_command(
        main, ChatGenEvaluationConfig, DrawingConfig, errors=(DataError, DialogueError, ModelTokenError, *ERRORS)
    )
