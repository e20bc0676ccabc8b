"""Candidate calls of a policy for many prompts (DiffAgent Sec. 3.2.2): greedy answers and multinomial samples.

    python -m rollouts.candidates --model_name_or_path runs/sft --catalog data/dabench/catalog.jsonl \
        --dataset data/dabench/sd15 --split rrhf --num_samples 4 --output runs/candidates.jsonl

Writes one JSON object a line and prompt: `prompt_id`, `instruction`, and `candidates`, each with its exact `response`,
the `call` it is (or null and why), and its `origin`. A run that was killed goes on where it was.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewards.commandline import ConfigError, run_command
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat
from rollouts.policy import load_policy, load_tokenizer
from rollouts.responses import generate_responses

logger = logging.getLogger(__name__)


@dataclass
class CandidatesConfig:
    """Options of `python -m rollouts.candidates`."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder of align/sft.py, or any causal LM."})
    catalog: str = field(metadata={"help": "Catalogue that calls are validated against."})
    output: str = field(metadata={"help": "The .jsonl file to write, or to go on with."})
    dataset: str | None = field(
        default=None, metadata={"help": "A DABench DatasetDict folder, e.g. data/dabench/sd15."}
    )
    split: str = field(default="rrhf", metadata={"help": "Split of `dataset`."})
    prompts: str | None = field(default=None, metadata={"help": "Instead of `dataset`: a .txt with one prompt a line."})
    greedy: bool = field(default=True, metadata={"help": "One candidate by greedy decoding."})
    num_samples: int = field(default=0, metadata={"help": "Candidates by multinomial sampling."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
    max_new_tokens: int = field(default=320, metadata={"help": "Token limit of a response."})
    max_prompt_tokens: int | None = field(default=512, metadata={"help": "Longer prompts are cut; none: never."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; none: cuda if there is one."})

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.prompts is None):
            raise ValueError("Give either `dataset` or `prompts`, and not both.")
        if self.num_samples < 0 or (self.num_samples == 0 and not self.greedy):
            raise ValueError(f"There must be candidates: `greedy`, or `num_samples` > 0, but got {self.num_samples}.")


def main(config: CandidatesConfig) -> None:
    """Write the candidates of all prompts that have none yet."""
    catalog = Catalog.load(config.catalog)
    prompts = _prompts(config)
    output = Path(config.output)
    done = _read_done(output, {prompt_id for prompt_id, _ in prompts})
    left = [prompt for prompt in prompts if prompt[0] not in done]
    if not left:
        logger.info("%s already holds the candidates of all %d prompts", output, len(prompts))
        return
    policy, dialogue = _load(config)
    reasons: Counter[str] = Counter()
    with output.open("a", encoding="utf-8") as file:
        # A unit of work is a few batches of prompts with all their candidates.
        unit = config.batch_size * 4
        for start in range(0, len(left), unit):
            for row in _candidates(policy, dialogue, left[start : start + unit], catalog, config):
                reasons.update(c["error"] or "ok" for c in row["candidates"])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            logger.info("%d of %d prompts", len(done) + min(start + unit, len(left)), len(prompts))
    logger.info("%s: %s", output, dict(reasons.most_common()))


def _candidates(
    policy: Any, dialogue: Dialogue, prompts: list[tuple[str, Any]], catalog: Catalog, config: CandidatesConfig
) -> Iterator[dict[str, Any]]:
    found: list[list[dict[str, Any]]] = [[] for _ in prompts]
    instructions = [instruction for _, instruction in prompts]
    for number in range(-1 if config.greedy else 0, config.num_samples):
        responses = generate_responses(
            policy,
            dialogue,
            instructions,
            max_new_tokens=config.max_new_tokens,
            max_prompt_tokens=config.max_prompt_tokens,
            batch_size=config.batch_size,
            do_sample=number >= 0,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + max(number, 0),
            progress=False,
        )
        origin = "multinomial" if number >= 0 else "greedy"
        for response in responses:
            found[response.index].append(candidate(response.text, origin, catalog))
    for (prompt_id, instruction), candidates in zip(prompts, found, strict=True):
        yield {"prompt_id": prompt_id, "instruction": _instruction(instruction), "candidates": candidates}


def candidate(response: str, origin: str, catalog: Catalog) -> dict[str, Any]:
    """A response as a candidate: its call if it is one that can be made, else null and the first reason."""
    call, reason = catalog.judge(response)
    callable_call = call.to_dict() if call is not None and reason is None else None
    return {"response": response, "call": callable_call, "origin": origin, "error": reason}


def _prompts(config: CandidatesConfig) -> list[tuple[str, Any]]:
    """Ids and instructions."""
    if config.prompts is not None:
        path = Path(config.prompts)
        if not path.is_file():
            raise ConfigError(f"There is no prompt file at {path}.")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(f"{path.stem}-{number}", line) for number, line in enumerate(lines)]
    import datasets

    folder = Path(str(config.dataset))
    if not (folder / "dataset_dict.json").is_file():
        raise ConfigError(f"`dataset` {folder} is no DatasetDict; name one architecture's folder, e.g. {folder}/sd15.")
    data = datasets.load_from_disk(str(folder))
    if config.split not in data:
        raise ConfigError(f"`split` {config.split!r} is not in {folder}, which has {list(data)}.")
    return [(row["id"], row["instruction"]) for row in data[config.split]]


def _instruction(instruction: Any) -> dict[str, str]:
    return {"prompt": instruction, "negative prompt": ""} if isinstance(instruction, str) else instruction


def _read_done(output: Path, wanted: set[str]) -> set[str]:
    """Ids of prompts that `output` answers already; a line that a kill cut short is dropped from the file."""
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        return set()
    kept, done = [], set()
    for line in output.read_text(encoding="utf-8").splitlines():
        try:
            done.add(json.loads(line)["prompt_id"])
        except (ValueError, KeyError):
            continue
        kept.append(line + "\n")
    if not done <= wanted:
        raise ConfigError(f"`output` {output} holds candidates of other prompts. Choose another file or remove it.")
    output.write_text("".join(kept), encoding="utf-8")
    return done


def _load(config: CandidatesConfig) -> tuple[Any, Dialogue]:
    tokenizer = load_tokenizer(config.model_name_or_path)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config.model_name_or_path, dtype=config.dtype).to(device).eval()
    return policy, Dialogue(tokenizer, DialogueFormat.load(config.model_name_or_path))


if __name__ == "__main__":
    run_command(main, CandidatesConfig, errors=(CatalogError, DialogueError))
