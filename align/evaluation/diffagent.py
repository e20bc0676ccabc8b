"""DiffAgent's Tables 1 and 2: does what an agent calls make better pictures, and how often can't it be called at all?

    python -m align.evaluation.diffagent --config configs/diffagent/tables.yaml --dataset data/dabench \
        --weights models/ --agents '{"SFT": "runs/sft", "RRHF": "runs/rrhf"}' --output_dir runs/tables

Every agent answers every prompt set; then the pictures of all methods are drawn and scored: the default call
(Baseline), the baseline model with our agent's parameters (Baseline*), our agent's model with the default parameters
(DiffAgent#), the agents, and baselines that need no language model. As in DiffAgent Sec. 4.1 all are drawn in one
shape, that of the default call, and the baseline's pictures stand in where an answer is a hallucination; likewise
where a call can't be drawn or is for another architecture, which is counted apart. All methods get the negative
prompt of the instruction; plain prompts have none. All pictures of a prompt have the same seeds, and equal calls are
drawn once.

Writes table1 and table2 (.json, .md, .csv), per_prompt.parquet, unified.json, answers-*.jsonl and rollout/. A run that
was killed goes on where it was. `python -m align.evaluation.pool` pools several, `.report` shows one.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.evaluation.answers import PolicyAnswers, prompt_text
from align.evaluation.baselines import EmbeddingNeighbour, MostPopular, TfidfNeighbour, make_baselines
from align.evaluation.comparison import NOBODY, About, Comparison, ComparisonError
from align.evaluation.diffagent_tables import write_tables
from align.evaluation.method_calls import (
    BASELINE,
    OUR_MODEL,
    OUR_PARAMETERS,
    Choice,
    hallucinated_shares,
    in_shape,
    judged_choice,
    with_baseline,
)
from align.evaluation.prompt_sets import PromptFileError, PromptSet, evaluation_prompts
from align.pairs import DataError, load_pairs
from rewards.commandline import check_nested, from_json, run_command, save_config
from rewards.files import write_atomically
from rewards.unified import UnifiedMetricError
from rollouts.api import APICall
from rollouts.calls_table import CallsError
from rollouts.catalog import Catalog, CatalogError
from rollouts.rollout import SCORED_FILE
from rollouts.run import RunConfig
from rollouts.run import main as roll_out
from rollouts.store_errors import StoreError
from rollouts.workers import PoolError

logger = logging.getLogger(__name__)

_TAKEN = (BASELINE, OUR_PARAMETERS, OUR_MODEL, MostPopular.name, TfidfNeighbour.name, EmbeddingNeighbour.name)
_SET_HERE = (
    "calls", "catalog", "weights", "output", "num_images", "seed", "unified", "keep_images", "max_failed_share",
)  # fmt: skip


@dataclass
class DiffAgentTablesConfig:
    """Options of `python -m align.evaluation.diffagent`."""

    dataset: str = field(metadata={"help": "DABench folder (output of align.bench.dabench)."})
    weights: str = field(metadata={"help": "Folder of the text-to-image models' weights."})
    output_dir: str = field(metadata={"help": "Folder for answers, pictures and tables."})
    agents: dict[str, str] | str | None = field(
        metadata={"help": "Name -> folder of a policy; differences are taken to the first. As JSON on a command line."}
    )
    ours: str | None = field(
        default=None, metadata={"help": "Agent whose parts Baseline* and DiffAgent# take; none: the last one."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Base model architecture."})
    catalog: str | None = field(default=None, metadata={"help": "Catalogue; none: `dataset`/catalog.jsonl."})
    baseline_model: str | None = field(
        default=None, metadata={"help": "Catalogue name of the original model; none: the most downloaded checkpoint."}
    )
    parti_prompts: str | None = field(default=None, metadata={"help": "PartiPrompts.tsv; none: left out."})
    coco_captions: str | None = field(default=None, metadata={"help": "A .tsv with COCO captions; none: left out."})
    num_prompts: int | None = field(default=1000, metadata={"help": "Random prompts of each file (DiffAgent: 1,000)."})
    num_dabench: int | None = field(default=None, metadata={"help": "Random rows of DABench's eval split; none: all."})
    num_sampled: int = field(
        default=0,
        metadata={"help": "Also sample so many answers per prompt at temperature 1, to count their hallucination."},
    )
    num_drawn: int | None = field(
        default=None, metadata={"help": "Draw the first so many prompts of each set only (Table 2); none: all."}
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Further rows: any of popular, tfidf, embedding."}
    )
    sentence_encoder: str | None = field(
        default=None, metadata={"help": "sentence-transformers model of the `embedding` baseline, name or folder."}
    )
    num_images: int = field(default=3, metadata={"help": "Pictures per call (DiffAgent: 3)."})
    seed: int = field(default=0, metadata={"help": "Of the choice of prompts and of the pictures."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass of an agent."})
    max_new_tokens: int = field(default=320, metadata={"help": "Token limit of an answer; longer ones are cut off."})
    max_prompt_tokens: int | None = field(default=512, metadata={"help": "Longer prompts are cut."})
    dtype: str = field(default="auto", metadata={"help": "Of agents: float32, bfloat16, float16, or auto: as saved."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; none: cuda if there is one."})
    rollout: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of rollouts.run (scorers, pool, native_side, batch_size, store, ...) as a mapping; those "
            f"that are set here are refused: {', '.join(_SET_HERE)}."
        },
    )

    def __post_init__(self) -> None:
        for name in (
            "num_prompts",
            "num_dabench",
            "num_images",
            "batch_size",
            "max_new_tokens",
            "max_prompt_tokens",
            "num_drawn",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        if self.num_sampled < 0:
            raise ValueError(f"`num_sampled` must be 0 or more, but got {self.num_sampled}.")
        if unknown := sorted(set(self.baselines) - {"popular", "tfidf", "embedding"}):
            raise ValueError(f"`baselines` may hold popular, tfidf and embedding, but got {unknown}.")
        if "embedding" in self.baselines and self.sentence_encoder is None:
            raise ValueError("The `embedding` baseline needs `sentence_encoder`.")
        self.agents, self.rollout = (
            from_json("agents", self.agents, dict),
            from_json("rollout", self.rollout or {}, dict),
        )
        _check_agents(self.agents)
        if self.ours is not None and self.ours not in self.agents:
            raise ValueError(f"`ours` must be one of `agents` ({', '.join(self.agents)}), but is {self.ours!r}.")
        self.run_config()  # checks itself

    def run_config(self) -> RunConfig:
        """The rollout that draws and scores everything.

        Raises:
            ValueError: An option in `rollout` that is unknown, wrong or not to be set there.
        """
        options = from_json("rollout", self.rollout, dict)
        check_nested("rollout", options, RunConfig, _SET_HERE)
        if not options.get("scorers"):
            raise ValueError("`rollout.scorers` must name at least one scorer; see configs/diffagent/tables.yaml.")
        output = Path(self.output_dir)
        everything: dict[str, Any] = {"device": self.device} | options
        return RunConfig(
            **everything,
            calls=str(output / "calls.jsonl"), catalog=self.catalog_path(), weights=self.weights,
            output=str(output / "rollout"), num_images=self.num_images, seed=self.seed,
        )  # fmt: skip

    def catalog_path(self) -> str:
        """File of the catalogue."""
        return self.catalog or str(Path(self.dataset) / "catalog.jsonl")


def main(config: DiffAgentTablesConfig) -> dict[str, Any]:
    """Answer, draw, score, compare; returns what table1.json and table2.json hold."""
    output = Path(config.output_dir)
    data = load_pairs(config.dataset, config.architecture)
    if not len(data["eval"]):
        raise DataError(f"`dataset` {config.dataset}: the split eval has no rows.")
    catalog = Catalog.load(config.catalog_path())
    default = catalog.default_call(config.architecture, config.baseline_model)
    sets = evaluation_prompts(
        data["eval"], parti_prompts=config.parti_prompts, coco_captions=config.coco_captions,
        num_prompts=config.num_prompts, num_dabench=config.num_dabench, seed=config.seed,
    )  # fmt: skip
    save_config(output / "config.yaml", config)

    agents = from_json("agents", config.agents, dict)
    chosen: dict[str, dict[str, list[Choice]]] = {prompts.name: {} for prompts in sets}
    for name, folder in agents.items():
        texts, sampled = _answers(config, name, folder, sets)
        for prompts in sets:
            choices = [judged_choice(text, catalog, default) for text in texts[prompts.name]]
            shares = hallucinated_shares(sampled[prompts.name], catalog) or [None] * len(choices)
            chosen[prompts.name][name] = [c._replace(sampled=s) for c, s in zip(choices, shares, strict=True)]
    answering = list(agents)
    baselines = make_baselines(
        config.baselines, data["sft"], catalog, config.architecture,
        sentence_encoder=config.sentence_encoder, where=f"`dataset` {config.dataset}",
    )  # fmt: skip
    for baseline in baselines:
        answering.append(baseline.name)
        for prompts in sets:
            calls = baseline.answer([prompt_text(instruction) for instruction in prompts.instructions])
            chosen[prompts.name][baseline.name] = [Choice(in_shape(catalog, call, default)) for call in calls]
    ours = config.ours or list(agents)[-1]
    for prompts in sets:
        chosen[prompts.name] = with_baseline(chosen[prompts.name], ours, catalog, default)

    write_atomically(output / "calls.jsonl", _calls_table(sets, chosen, default, config.num_drawn).encode())
    run_config = config.run_config()
    roll_out(run_config)
    about = About(
        config.architecture, len(catalog), [output.name or "run"], [prompts.name for prompts in sets],
        list(chosen[sets[0].name]), agents, answering, BASELINE, ours,
        default.to_dict(), list(run_config.scorers), config.num_images,
    )  # fmt: skip
    rows = _compared_rows(about, sets, chosen, Path(run_config.output) / SCORED_FILE)
    tables = write_tables(output, Comparison(about, rows))
    logger.info("%s\n%s", (output / "table1.md").read_text(), (output / "table2.md").read_text())
    return tables


def prompt_ids(prompts: PromptSet) -> list[str]:
    """Ids that depend on the set's name and on the instruction alone, so that they are the same in every run."""
    seen: Counter[str] = Counter()
    ids = []
    for instruction in prompts.instructions:
        digest = hashlib.sha256(json.dumps(_instruction(instruction)).encode()).hexdigest()[:16]
        seen[digest] += 1
        ids.append(f"{prompts.slug}/{digest}" + (f"-{seen[digest]}" if seen[digest] > 1 else ""))
    return ids


def _answers(
    config: DiffAgentTablesConfig, name: str, folder: str, sets: list[PromptSet]
) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """An agent's greedy texts by prompt set, and its sampled ones; it is loaded only if something is left to ask."""
    policy = PolicyAnswers(
        folder, max_new_tokens=config.max_new_tokens, max_prompt_tokens=config.max_prompt_tokens,
        batch_size=config.batch_size, dtype=config.dtype, device=config.device, option=f"agents.{name}",
    )  # fmt: skip
    texts: dict[str, list[str]] = {}
    sampled: dict[str, list[list[str]]] = {}
    for prompts in sets:
        logger.info("%s, %s: %d prompts", name, prompts.name, len(prompts.instructions))
        path = Path(config.output_dir) / f"answers-{_slug(name)}-{prompts.slug}.jsonl"
        texts[prompts.name] = [answer["text"] for answer in policy.answer(prompts, path)]
        sampled[prompts.name] = []
        for number in range(config.num_sampled):
            of_sample = path.with_name(f"{path.stem}-sampled-{number}.jsonl")
            answers = policy.answer(prompts, of_sample, sample_seed=config.seed * 1000 + number)
            sampled[prompts.name].append([answer["text"] for answer in answers])
    return texts, sampled


def _calls_table(
    sets: list[PromptSet], chosen: Mapping[str, Mapping[str, list[Choice]]], default: APICall, num_drawn: int | None
) -> str:
    """A row per drawn prompt with a candidate per method; that of the baseline where a method has none of its own."""
    lines = []
    for prompts in sets:
        of_set = chosen[prompts.name]
        for i, (prompt_id, instruction) in enumerate(zip(prompt_ids(prompts), prompts.instructions, strict=True)):
            if num_drawn is not None and i >= num_drawn:
                break
            candidates = []
            for method, choices in of_set.items():
                call = choices[i].call if choices[i].not_drawn is None else None
                candidates.append(
                    {"response": choices[i].answer, "origin": method, "call": (call or default).to_dict()}
                )
            row = {"prompt_id": prompt_id, "instruction": _instruction(instruction), "candidates": candidates}
            lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _compared_rows(
    about: About, sets: list[PromptSet], chosen: Mapping[str, Mapping[str, list[Choice]]], scored: Path
) -> list[dict[str, Any]]:
    """Rows of per_prompt.parquet but for `unified`, by method and prompt."""
    import pyarrow.parquet as pq

    drawn = {row["prompt_id"]: row for row in pq.read_table(scored).to_pylist()}
    errors = [c["error"] for row in drawn.values() for c in row["candidates"] if c["origin"] == about.baseline]
    if all(errors):
        raise ComparisonError(
            f"The default call of {about.baseline_call['model']!r} can't be drawn and scored ({errors[0]}). Give "
            f"another `baseline_model`, or mend the weights and run the command again; see {scored}."
        )
    rows = []
    for prompts in sets:
        ids = prompt_ids(prompts)
        for method in about.methods:
            choices = zip(ids, prompts.instructions, chosen[prompts.name][method], strict=True)
            for prompt_id, instruction, choice in choices:
                asked = _instruction(instruction)
                fixed = {
                    "run": about.runs[0], "prompt_set": prompts.name, "prompt_id": prompt_id,
                    "prompt": asked["prompt"], "negative_prompt": asked["negative prompt"], "method": method,
                }  # fmt: skip
                row = drawn.get(prompt_id)
                by_method = {candidate["origin"]: candidate for candidate in row["candidates"]} if row else {}
                rows.append(fixed | _outcome(choice, by_method.get(method), by_method.get(about.baseline)))
    return rows


def _outcome(choice: Choice, own: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Which pictures and scores count for a choice; none of a prompt that was not drawn at all."""
    answered = {
        "answer": choice.answer, "call": choice.call.to_json() if choice.call is not None else None,
        "hallucinated": choice.reason is not None, "reason": choice.reason,
        "sampled_hallucination": choice.sampled,
    }  # fmt: skip
    if own is None or baseline is None:
        nothing = dict.fromkeys(("not_drawn", "drawn_call", "scores", "means", "unified"))
        return answered | nothing | {"drawn_from": NOBODY, "images": []}
    not_drawn = choice.not_drawn
    if choice.call is not None and not_drawn is None and own["error"] is not None:
        not_drawn = own["error"].partition(":")[0]
    is_own = choice.call is not None and not_drawn is None
    used = own if is_own else baseline
    scores = used["scores"] if baseline["error"] is None else None
    return answered | {
        "not_drawn": not_drawn, "drawn_from": "own" if is_own else "baseline",
        "drawn_call": APICall.from_dict(used["call"]).to_json(), "images": used["images"], "scores": scores,
        "means": {name: sum(values) / len(values) for name, values in scores.items()} if scores else None,
        "unified": None,
    }  # fmt: skip


def _instruction(instruction: Any) -> dict[str, str]:
    negative = "" if isinstance(instruction, str) else instruction.get("negative prompt") or ""
    return {"prompt": prompt_text(instruction), "negative prompt": negative}


def _check_agents(agents: Mapping[str, Any]) -> None:
    if not agents:
        raise ValueError('`agents` must name at least one policy, such as {"SFT": "runs/sft"}.')
    for name, folder in agents.items():
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"`agents`: {name} must be the name or folder of a model, but is {folder!r}.")
        if name in _TAKEN or not _slug(name):
            raise ValueError(f"`agents`: {name!r} can't be the name of an agent; choose another.")
    if twice := [slug for slug, count in Counter(map(_slug, agents)).items() if count > 1]:
        raise ValueError(f"`agents`: several names come to {twice[0]!r} in file names; choose others.")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.lower()).strip("-.")


if __name__ == "__main__":
    run_command(
        main,
        DiffAgentTablesConfig,
        errors=(
            DataError, CatalogError, PromptFileError, CallsError, PoolError, StoreError, UnifiedMetricError,
            ComparisonError,
        ),
    )  # fmt: skip
