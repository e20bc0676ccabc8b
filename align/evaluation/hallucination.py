"""How often are a policy's answers real, callable API calls? DiffAgent Table 1, with selection and argument accuracy.

    python -m align.evaluation.hallucination --config configs/diffagent/evaluate.yaml \
        --model_name_or_path runs/sft --dataset data/dabench --output_dir runs/sft/evaluation

Answers DABench's evaluation split and any prompt files greedily, judges every answer against the catalogue, and puts
baselines that need no language model beside it. Answers are kept in `answers-*.jsonl`; a run that was killed goes on
where it was. Writes `table.json`, `table.md`, `table.csv` and `table.png`.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from align.evaluation.baselines import Baseline, EmbeddingNeighbour, MostPopular, TfidfNeighbour
from align.evaluation.metrics import argument_accuracy, bootstrap, hallucination, selection_accuracy
from align.evaluation.plots import draw_table
from align.evaluation.prompt_sets import PromptFileError, PromptSet, dabench_prompts, read_prompts
from align.evaluation.tables import write_table
from align.pairs import DataError, load_pairs
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.api import APICall, APICallError
from rollouts.catalog import Catalog, CatalogError

logger = logging.getLogger(__name__)


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
        if "embedding" in self.baselines and self.sentence_encoder is None:
            raise ValueError("The `embedding` baseline needs `sentence_encoder`.")


def main(config: HallucinationConfig) -> dict[str, Any]:
    """Evaluate and write the tables; returns what is in `table.json`."""
    output = Path(config.output_dir)
    data = load_pairs(config.dataset, config.architecture)
    catalog = Catalog.load(config.catalog or Path(config.dataset) / "catalog.jsonl")
    sets = _prompt_sets(config, data)
    save_config(output / "config.yaml", config)

    rows = []
    if config.model_name_or_path is not None:
        answer, latency = _policy(config, output)
        for prompts in sets:
            texts, seconds = answer(prompts)
            row = score(config.model_name_or_path, prompts, texts, catalog, seconds)
            rows.append(row | {"one_at_a_time_seconds": latency(prompts)})
    for baseline in _baselines(config, data, catalog):
        for prompts in sets:
            started = time.perf_counter()
            calls = baseline.answer([_text(instruction) for instruction in prompts.instructions])
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


def _prompt_sets(config: HallucinationConfig, data: Any) -> list[PromptSet]:
    if not len(data["eval"]):
        raise DataError(f"`dataset` {config.dataset}: the split eval has no rows.")
    sets = [dabench_prompts(data["eval"], config.num_dabench, config.seed)]
    for name, path in (("PartiPrompts", config.parti_prompts), ("COCO captions", config.coco_captions)):
        if path is not None:
            sets.append(read_prompts(name, path, config.num_prompts, config.seed))
    return sets


def _baselines(config: HallucinationConfig, data: Any, catalog: Catalog) -> Iterator[Baseline]:
    prompts = [row["instruction"]["prompt"] for row in data["sft"]]
    try:
        calls = [APICall.from_dict(row["api"]) for row in data["sft"]]
    except APICallError as error:
        raise DataError(f"`dataset` {config.dataset}, split sft: {error}") from error
    for name in config.baselines:
        try:
            if name == "popular":
                yield MostPopular(catalog, config.architecture)
            elif name == "tfidf":
                yield TfidfNeighbour(prompts, calls)
            else:
                yield EmbeddingNeighbour(prompts, calls, str(config.sentence_encoder))
        except ImportError as error:
            raise ConfigError(str(error)) from error


Answerer = Callable[[PromptSet], tuple[list[str], float]]


def _policy(config: HallucinationConfig, output: Path) -> tuple[Answerer, Callable[[PromptSet], float | None]]:
    """Functions that answer a prompt set with the policy, and that time it one prompt at a time."""
    import torch

    from rollouts.dialogue import Dialogue, DialogueFormat
    from rollouts.policy import load_policy, load_tokenizer
    from rollouts.responses import generate_responses

    name = str(config.model_name_or_path)
    try:
        tokenizer = load_tokenizer(name)
        policy = cast(Any, load_policy(name, dtype=config.dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`model_name_or_path`: {error}") from error
    policy = policy.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    dialogue = Dialogue(tokenizer, DialogueFormat.load(name))
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "max_prompt_tokens": config.max_prompt_tokens}
    origin = {"policy": _identity(name), **options}

    def answer(prompts: PromptSet) -> tuple[list[str], float]:
        path = output / f"answers-{prompts.name.lower().replace(' ', '-')}.jsonl"
        done = _read_answers(path, prompts, origin)
        with path.open("a", encoding="utf-8") as file:
            for response in generate_responses(
                policy,
                dialogue,
                prompts.instructions,
                batch_size=config.batch_size,
                skip=frozenset(done),
                **options,
            ):
                prompt = {"prompt": _text(prompts.instructions[response.index])}
                done[response.index] = response._asdict() | prompt | origin
                file.write(json.dumps(done[response.index], ensure_ascii=False) + "\n")
                file.flush()
        answers = [done[i] for i in range(len(prompts.instructions))]
        return [a["text"] for a in answers], bootstrap([a["seconds"] for a in answers]).value

    def latency(prompts: PromptSet) -> float | None:
        chosen = prompts.instructions[: config.latency_prompts]
        if not chosen:
            return None
        timed = generate_responses(policy, dialogue, chosen, batch_size=1, progress=False, **options)
        return bootstrap([response.seconds for response in timed]).value

    return answer, latency


def _read_answers(path: Path, prompts: PromptSet, origin: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier run to the same prompts; a line that a kill cut short is asked again.

    Args:
        path: Of the answers.
        prompts: What is asked now.
        origin: What the answers depend on beside the prompt: policy and token limits.

    Raises:
        ConfigError: If they answer other prompts, or come from another policy or other options.
    """
    done: dict[int, dict[str, Any]] = {}
    if path.is_file():
        # As bytes: a kill may have left half a character, and answers hold line separators other than \n.
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                index, prompt = row["index"], row["prompt"]
            except (ValueError, KeyError, TypeError):
                continue
            other = None
            if index >= len(prompts.instructions) or prompt != _text(prompts.instructions[index]):
                other = "to other prompts"
            elif any(row.get(key) != value for key, value in origin.items()):
                other = "of another policy or with other options"
            if other is not None:
                raise ConfigError(f"{path} holds answers {other}. Choose another `output_dir` or remove it.")
            done[index] = row
        # Rewritten without damaged lines, so that appending starts on a line of its own.
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values())
        write_atomically(path, text.encode())
    return done


def _identity(name_or_path: str) -> str:
    """The policy's name and, of a folder, when its weights were written: training it further makes it another one."""
    files = sorted([*Path(name_or_path).glob("*.safetensors"), *Path(name_or_path).glob("*.gguf")])
    return " ".join([name_or_path, *(f"{file.name}@{file.stat().st_mtime_ns}" for file in files)])


def _text(instruction: Any) -> str:
    return instruction if isinstance(instruction, str) else instruction["prompt"]


if __name__ == "__main__":
    run_command(main, HallucinationConfig, errors=(DataError, CatalogError, PromptFileError))
