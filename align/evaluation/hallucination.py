"""How often are a policy's answers real, callable API calls? DiffAgent Table 1, with selection and argument accuracy.

    python -m align.evaluation.hallucination --config configs/diffagent/evaluate.yaml \
        --model_name_or_path runs/sft --dataset data/dabench --output_dir runs/sft/evaluation

Answers DABench's evaluation split and any prompt files greedily, judges every answer against the catalogue, and puts
beside it what agents make of the policy (`agents`: its calls under constrained decoding, together with retrieval, or
with the model chosen by retrieval alone) and baselines that need no language model. Answers are kept in
`answers-*.jsonl`; a run that was killed goes on where it was. Writes `table.json`, `table.md`, `table.csv` and
`table.png`.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from align.evaluation.answers import PolicyAnswers, prompt_text
from align.evaluation.baselines import make_baselines
from align.evaluation.metrics import argument_accuracy, bootstrap, hallucination, selection_accuracy
from align.evaluation.plots import draw_table
from align.evaluation.prompt_sets import PromptFileError, PromptSet, evaluation_prompts
from align.evaluation.tables import write_table
from align.pairs import DataError, load_pairs
from rewards.commandline import ConfigError, run_command, save_config
from rollouts.api import APICall
from rollouts.catalog import Catalog, CatalogError

if TYPE_CHECKING:
    from align.agents.diffagent import DiffAgent

logger = logging.getLogger(__name__)

AGENTS = {"constrained": "constrained", "hybrid": "constrained, with retrieval", "retrieval": "model by retrieval"}
RETRIEVAL_ALONE = 1e4
"""Nats: more than any policy's preference is worth."""


@dataclass
class HallucinationConfig:
    """Options of `python -m align.evaluation.hallucination`."""

    dataset: str = field(metadata={"help": "DABench folder (output of align.bench.dabench)."})
    output_dir: str = field(metadata={"help": "Folder for answers and tables."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The policy: a folder of align/sft.py or any causal LM; none: baselines only."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Base model architecture."})
    catalog: str | None = field(default=None, metadata={"help": "Catalogue; none: `dataset`/catalog.jsonl."})
    parti_prompts: str | None = field(default=None, metadata={"help": "PartiPrompts.tsv; none: left out."})
    coco_captions: str | None = field(default=None, metadata={"help": "A .tsv with COCO captions; none: left out."})
    num_prompts: int | None = field(default=1000, metadata={"help": "Random prompts of each file (DiffAgent: 1,000)."})
    num_dabench: int | None = field(default=None, metadata={"help": "Random rows of DABench's eval split; none: all."})
    seed: int = field(default=0, metadata={"help": "Of the choice of prompts."})
    baselines: list[str] = field(
        default_factory=lambda: ["popular", "tfidf"], metadata={"help": "Any of popular, tfidf, embedding."}
    )
    agents: list[str] = field(
        default_factory=list,
        metadata={"help": "Further rows of the policy: any of constrained, hybrid (needs calibration), retrieval."},
    )
    calibration: str | None = field(
        default=None, metadata={"help": "Folder of calibration.json (align.agents.calibrate); none: the policy's."}
    )
    sentence_encoder: str | None = field(
        default=None, metadata={"help": "sentence-transformers model of the `embedding` baseline, name or folder."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
    max_new_tokens: int = field(default=320, metadata={"help": "Token limit of an answer; longer ones are cut off."})
    max_prompt_tokens: int | None = field(default=512, metadata={"help": "Longer prompts are cut."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; none: cuda if there is one."})
    latency_prompts: int = field(
        default=10,
        metadata={"help": "Prompts answered one at a time, for seconds per answer as in the paper; 0: none."},
    )

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_dabench", "batch_size", "max_new_tokens", "max_prompt_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        if self.latency_prompts < 0:
            raise ValueError(f"`latency_prompts` must be 0 or more, but got {self.latency_prompts}.")
        unknown = sorted(set(self.baselines) - {"popular", "tfidf", "embedding"})
        if unknown:
            raise ValueError(f"`baselines` may hold popular, tfidf and embedding, but got {unknown}.")
        if unknown := sorted(set(self.agents) - set(AGENTS)):
            raise ValueError(f"`agents` may hold {', '.join(AGENTS)}, but got {unknown}.")
        if self.agents and self.model_name_or_path is None:
            raise ValueError("`agents` needs `model_name_or_path`, their policy.")
        if "embedding" in self.baselines and self.sentence_encoder is None:
            raise ValueError("The `embedding` baseline needs `sentence_encoder`.")


def main(config: HallucinationConfig) -> dict[str, Any]:
    """Evaluate and write the tables; returns what is in `table.json`."""
    output = Path(config.output_dir)
    data = load_pairs(config.dataset, config.architecture)
    catalog = Catalog.load(config.catalog or Path(config.dataset) / "catalog.jsonl")
    if not len(data["eval"]):
        raise DataError(f"`dataset` {config.dataset}: the split eval has no rows.")
    sets = evaluation_prompts(
        data["eval"], parti_prompts=config.parti_prompts, coco_captions=config.coco_captions,
        num_prompts=config.num_prompts, num_dabench=config.num_dabench, seed=config.seed,
    )  # fmt: skip
    save_config(output / "config.yaml", config)

    rows = []
    if config.model_name_or_path is not None:
        policy = PolicyAnswers(
            config.model_name_or_path, max_new_tokens=config.max_new_tokens,
            max_prompt_tokens=config.max_prompt_tokens, batch_size=config.batch_size,
            dtype=config.dtype, device=config.device,
        )  # fmt: skip
        for prompts in sets:
            answers = policy.answer(prompts, output / f"answers-{prompts.slug}.jsonl")
            seconds = bootstrap([answer["seconds"] for answer in answers]).value
            row = score(config.model_name_or_path, prompts, [a["text"] for a in answers], catalog, seconds)
            rows.append(row | {"one_at_a_time_seconds": policy.latency(prompts, config.latency_prompts)})
        for name, agent in make_agents(config, data["sft"], catalog):
            for prompts in sets:
                started = time.perf_counter()
                texts = [call.to_json() for call in agent_calls(agent, prompts, config.batch_size)]
                rows.append(score(name, prompts, texts, catalog, (time.perf_counter() - started) / len(texts)))
    for baseline in make_baselines(
        config.baselines, data["sft"], catalog, config.architecture,
        sentence_encoder=config.sentence_encoder, where=f"`dataset` {config.dataset}",
    ):  # fmt: skip
        for prompts in sets:
            started = time.perf_counter()
            calls = baseline.answer([prompt_text(instruction) for instruction in prompts.instructions])
            seconds = (time.perf_counter() - started) / len(calls)
            rows.append(score(baseline.name, prompts, [call.to_json() for call in calls], catalog, seconds))
    report = {"architecture": config.architecture, "catalog": len(catalog), "rows": rows}
    write_table(output, report)
    try:
        draw_table(report, output / "table.png")
    except ImportError as error:
        logger.warning("no table.png: %s", error)
    logger.info((output / "table.md").read_text())
    return report


def make_agents(config: HallucinationConfig, rows: Any, catalog: Catalog) -> Iterator[tuple[str, "DiffAgent"]]:
    """The agents that are asked for, with the names of their rows.

    Raises:
        ConfigError: `hybrid` without a calibration that gives retrieval a weight.
    """
    if not config.agents:
        return
    from align.agents.calibration import Calibration
    from align.agents.diffagent import DiffAgent

    folder = str(config.model_name_or_path)
    calibration = Calibration.load(config.calibration or folder)
    examples = [(row["instruction"]["prompt"], row["api"]["model"]) for row in rows]
    if "hybrid" in config.agents and not calibration.retrieval_weight:
        raise ConfigError(
            f"`agents` hybrid needs the weight of retrieval, but {config.calibration or folder} has none: run "
            "python -m align.agents.calibrate."
        )
    weights = {"constrained": 0.0, "hybrid": calibration.retrieval_weight, "retrieval": RETRIEVAL_ALONE}
    agent = DiffAgent.from_pretrained(
        folder, catalog, device=config.device, dtype=config.dtype, architecture=config.architecture,
        examples=examples, max_prompt_tokens=config.max_prompt_tokens,
    )  # fmt: skip
    for name in config.agents:
        agent.calibration = Calibration(retrieval_weight=weights[name])
        yield f"{folder}, {AGENTS[name]}", agent


def agent_calls(agent: "DiffAgent", prompts: PromptSet, batch_size: int) -> list[APICall]:
    """An agent's calls for a prompt set."""
    calls: list[APICall] = []
    with tqdm(total=len(prompts.instructions), desc="calling", unit=" prompts", mininterval=1.0) as bar:
        for start in range(0, len(prompts.instructions), batch_size):
            batch = prompts.instructions[start : start + batch_size]
            calls += agent.call(batch)
            bar.update(len(batch))
    return calls


def score(
    name: str, prompts: PromptSet, texts: list[str], catalog: Catalog, seconds: float | None = None
) -> dict[str, Any]:
    """One row of the table: a method on a prompt set.

    Args:
        name: Of the method.
        prompts: What was asked.
        texts: The answers, one per prompt.
        catalog: What can be called.
        seconds: Mean wall time per answer, batched.
    """
    judged = [catalog.judge(text) for text in texts]
    share, reasons = hallucination(judged)
    row: dict[str, Any] = {
        "method": name,
        "prompts": prompts.name,
        "hallucination": share._asdict(),
        "reasons": reasons,
        "distinct_models": len({j.call.model for j in judged if j.call is not None and j.reason is None}),
        "seconds": seconds,
    }
    if prompts.references is not None:
        selection = selection_accuracy(judged, prompts.references, catalog)
        row |= {f"{level}_accuracy": estimate._asdict() for level, estimate in selection.items()}
        row["argument_accuracy"] = argument_accuracy(judged, prompts.references)._asdict()
    return row


if __name__ == "__main__":
    run_command(main, HallucinationConfig, errors=(DataError, CatalogError, PromptFileError))
