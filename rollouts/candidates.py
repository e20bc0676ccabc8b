"""Candidate calls of a policy for many prompts (DiffAgent Sec. 3.2.2).

    python -m rollouts.candidates --config configs/diffagent/candidates.yaml --model_name_or_path runs/sft \
        --catalog data/dabench/catalog.jsonl --dataset data/dabench/sd15 --output runs/candidates.jsonl

Responses come from greedy decoding, multinomial sampling and diverse beam search. Each is a candidate as it stands; or,
with `reconstruct`, only its model information is taken and the call written anew (`rollouts.proposals`). Beams are then
cut off behind that part: groups of one beam are greedy, so the rest would change nothing.

Writes one JSON object a line and prompt: `prompt_id`, `instruction`, `policy` (its fingerprint), `candidates`, each
with the exact `response`, the `call` it is (or null and why) and its `origin`, and `raw`: every response as it was
written, with the reason if it is no call. Beside it a `.summary.json` (how much was hallucinated, how many candidates
and models a prompt has) and a `.config.yaml`. A run that was killed goes on where it was, also on another number of
processes:

    accelerate launch --num_processes 8 -m rollouts.candidates --config ...

Every process takes its share of the prompts; the result does not depend on their number.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.api import ARCHITECTURES
from rollouts.beam_responses import beam_responses
from rollouts.candidate_files import CandidateFile, Processes
from rollouts.catalog import Catalog, CatalogError
from rollouts.decoding import Diversity, HammingDiversity
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat
from rollouts.model_information import tokens_of_model_information
from rollouts.policy import load_policy, load_tokenizer, policy_fingerprint
from rollouts.proposals import (
    DIVERSE_BEAM,
    GREEDY,
    MULTINOMIAL,
    RawResponse,
    candidate,
    default_candidate,
    judged,
    rebuilt_candidates,
    summary,
)
from rollouts.responses import generate_responses
from rollouts.slot_diversity import SlotDiversity

logger = logging.getLogger(__name__)

field = dataclasses.field
# A resumed run may have these otherwise; where the policy lies does not matter, but its fingerprint does.
_FREE_OPTIONS = {"model_name_or_path", "catalog", "output", "dataset", "prompts", "device"}
# Batches of a unit of work, after which rows are written. Fixed, since results depend on which prompts share a batch.
_BATCHES_PER_UNIT = 4


@dataclasses.dataclass
class CandidatesConfig:
    """Options of `python -m rollouts.candidates`."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder of align/sft.py, or any causal LM."})
    catalog: str = field(metadata={"help": "Catalogue that calls are validated against."})
    output: str = field(metadata={"help": "The .jsonl file to write, or to go on with."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "A DABench DatasetDict folder, e.g. data/dabench/sd15, or the folder of all architectures."},
    )
    split: str = field(default="rrhf", metadata={"help": "Split of `dataset`."})
    prompts: str | None = field(default=None, metadata={"help": "Instead of `dataset`: a .txt with one prompt a line."})
    architecture: str = field(default="SD 1.5", metadata={"help": "Of beams' names, `default_call` and `reconstruct`."})
    greedy: bool = field(default=True, metadata={"help": "One response by greedy decoding."})
    num_samples: int = field(default=0, metadata={"help": "Responses by multinomial sampling."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    num_beams: int = field(default=0, metadata={"help": "Responses by diverse beam search, a group each; 0: none."})
    diversity_penalty: float = field(
        default=1.0, metadata={"help": "Nats off a token for each earlier beam that has chosen it."}
    )
    diversity: Literal["slot", "hamming"] = field(
        default="slot",
        metadata={"help": "Beams differ where names of the catalogue part (slot), or at every token (hamming)."},
    )
    constrain_names: bool = field(
        default=False, metadata={"help": "With slot diversity: beams can only name models of `architecture`."}
    )
    default_call: bool = field(default=False, metadata={"help": "Add the default call of `architecture`."})
    default_model: str | None = field(
        default=None, metadata={"help": "Model of the default call; none: the most downloaded checkpoint."}
    )
    reconstruct: bool = field(
        default=False,
        metadata={
            "help": "Take only the model information of responses and write their calls anew; beams are cut off behind "
            "it, and equal calls are merged. False: every response is its own candidate."
        },
    )
    beam_parameters: Literal["multinomial", "defaults"] = field(
        default="multinomial",
        metadata={
            "help": "With `reconstruct`, parameters of beams: of the prompt's first readable multinomial response, or "
            "the model's defaults."
        },
    )
    common_size: bool = field(
        default=False,
        metadata={
            "help": "With `reconstruct`, give all calls the size of the architecture's default call, so that rewards "
            "compare models and other parameters at equal shapes, as DiffAgent's tables do."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass; beams and samples depend on it."})
    max_new_tokens: int = field(default=320, metadata={"help": "Token limit of a response."})
    max_prompt_tokens: int | None = field(default=512, metadata={"help": "Longer prompts are cut; none: never."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    device: str | None = field(
        default=None, metadata={"help": "cuda, cpu, ...; none: this process's own GPU if there is one."}
    )

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.prompts is None):
            raise ValueError("Give either `dataset` or `prompts`, and not both.")
        for name in ("num_samples", "num_beams"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, but is {getattr(self, name)}.")
        if not (self.greedy or self.num_samples or self.num_beams or self.default_call):
            raise ValueError(
                "There must be candidates: set `greedy`, `num_samples` > 0, `num_beams` > 0 or `default_call`."
            )
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, but is {getattr(self, name)}.")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` must be one of {list(ARCHITECTURES)}, but is {self.architecture!r}.")
        if self.num_beams > 1 and not 0 < self.diversity_penalty < float("inf"):
            raise ValueError(f"`diversity_penalty` must be above 0, but is {self.diversity_penalty}.")
        if self.constrain_names and (self.diversity != "slot" or not self.num_beams):
            raise ValueError("`constrain_names` needs `num_beams` > 0 and `diversity: slot`.")
        if self.default_model is not None and not self.default_call:
            raise ValueError(f"`default_model` ({self.default_model!r}) needs `default_call: true`.")
        if self.diversity not in ("slot", "hamming") or self.beam_parameters not in ("multinomial", "defaults"):
            raise ValueError(
                "`diversity` must be slot or hamming and `beam_parameters` multinomial or defaults, but they are "
                f"{self.diversity!r} and {self.beam_parameters!r}."
            )


def main(config: CandidatesConfig) -> None:
    """Write the candidates of all prompts that have none yet. Under a launcher every process must call this."""
    catalog = Catalog.load(config.catalog)
    prompts = _prompts(config)
    file = CandidateFile(config.output, [prompt_id for prompt_id, _ in prompts])
    here = Processes.here()
    fingerprint = policy_fingerprint(config.model_name_or_path)
    if here.rank == 0:
        _check_resumed(config, file.gather(), fingerprint)
        save_config(_beside(config, ".config.yaml"), config)
    here.wait()
    done = {row["prompt_id"] for row in file.rows()}
    size = config.batch_size * _BATCHES_PER_UNIT
    units = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    left = [(n, unit) for n, unit in enumerate(units) if not done.issuperset(prompt_id for prompt_id, _ in unit)]
    if own := left[here.rank :: here.count]:
        proposer = _Proposer(config, catalog, fingerprint, here.device())
        with tqdm(total=sum(len(unit) for _, unit in own), desc="proposing", unit=" prompts", mininterval=1.0) as bar:
            for number, unit in own:
                rows = proposer.propose(number, unit)
                file.write_part(here.rank, (row for row in rows if row["prompt_id"] not in done))
                bar.update(len(unit))
    here.wait()
    if here.rank == 0:
        rows = file.gather()
        found = summary(rows)
        write_atomically(_beside(config, ".summary.json"), json.dumps(found, indent=1, ensure_ascii=False).encode())
        logger.info("%s: %s", file.path, json.dumps(found, ensure_ascii=False))
    here.leave()


class _Proposer:
    """The policy and what it needs to answer."""

    def __init__(self, config: CandidatesConfig, catalog: Catalog, fingerprint: str, device: str) -> None:
        self._config, self._catalog, self._fingerprint = config, catalog, fingerprint
        source = config.model_name_or_path
        self._dialogue = Dialogue(load_tokenizer(source), DialogueFormat.load(source))
        self._default = catalog.default_call(config.architecture, config.default_model) if config.default_call else None
        models = catalog.of_architecture(config.architecture)
        if config.num_beams and not models:
            raise ConfigError(f"`catalog` {config.catalog} has no {config.architecture} models for beams to name.")
        self._diversity: Diversity = HammingDiversity()
        if config.num_beams and config.diversity == "slot":
            self._diversity = SlotDiversity.of_models(self._dialogue, models, constrain=config.constrain_names)
        self._beam_tokens = config.max_new_tokens
        if config.num_beams and config.reconstruct:
            needed = tokens_of_model_information(self._dialogue, catalog, config.architecture)
            self._beam_tokens = min(needed, config.max_new_tokens)
        self._policy = load_policy(source, dtype=config.dtype).to(config.device or device).eval()

    def propose(self, unit: int, prompts: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a unit of work."""
        config, catalog = self._config, self._catalog
        try:
            raws = self._raw_responses(unit, [instruction for _, instruction in prompts])
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"Out of memory with `batch_size` {config.batch_size} and {config.num_beams} beams; set a smaller "
                "`batch_size`, and another `output`, since samples depend on it."
            ) from error
        rows = []
        for (prompt_id, instruction), of_prompt in zip(prompts, raws, strict=True):
            if config.reconstruct:
                sampled = config.beam_parameters == "multinomial"
                candidates = rebuilt_candidates(
                    of_prompt,
                    catalog,
                    config.architecture,
                    default=self._default,
                    sampled_parameters=sampled,
                    common_size=config.common_size,
                )
            else:
                candidates = [candidate(raw.text, raw.origin, catalog) for raw in of_prompt]
                candidates += [default_candidate(self._default)] if self._default else []
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "instruction": _instruction(instruction),
                    "policy": self._fingerprint,
                    "candidates": candidates,
                    "raw": [judged(raw, catalog, config.architecture) for raw in of_prompt],
                }
            )
        return rows

    def _raw_responses(self, unit: int, instructions: list[Any]) -> list[list[RawResponse]]:
        config = self._config
        found: list[list[RawResponse]] = [[] for _ in instructions]
        common: dict[str, Any] = {"batch_size": config.batch_size, "max_prompt_tokens": config.max_prompt_tokens}
        for number in range(-1 if config.greedy else 0, config.num_samples):
            responses = generate_responses(
                self._policy,
                self._dialogue,
                instructions,
                max_new_tokens=config.max_new_tokens,
                do_sample=number >= 0,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=_seed(config.seed, unit, number),
                progress=False,
                **common,
            )
            for response in responses:
                found[response.index].append(RawResponse(response.text, MULTINOMIAL if number >= 0 else GREEDY))
        if config.num_beams:
            beams = beam_responses(
                self._policy,
                self._dialogue,
                instructions,
                num_beams=config.num_beams,
                diversity_penalty=config.diversity_penalty,
                diversity=self._diversity,
                max_new_tokens=self._beam_tokens,
                **common,
            )
            for of_prompt, texts in zip(found, beams, strict=True):
                of_prompt += [RawResponse(text, DIVERSE_BEAM) for text in texts]
        return found


def _seed(seed: int, unit: int, sample: int) -> int:
    """Of one sample of one unit of work, whoever does it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}/{sample}".encode()).digest()[:4], "big")


def _check_resumed(config: CandidatesConfig, rows: list[dict[str, Any]], fingerprint: str) -> None:
    """Rows of another policy, or made with other options, are not to be mixed with new ones."""
    if not rows:
        return
    if others := sorted({str(row.get("policy")) for row in rows} - {fingerprint}):
        raise ConfigError(
            f"`output` {config.output} holds candidates of another policy ({', '.join(others)}; "
            f"{config.model_name_or_path} is {fingerprint}). Choose another file or remove it."
        )
    path = _beside(config, ".config.yaml")
    if not path.is_file():
        logger.warning("%s is gone: can't check that %s was made with the same options", path, config.output)
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in dataclasses.asdict(config).items():
        if name not in _FREE_OPTIONS and before.get(name, value) != value:
            raise ConfigError(
                f"`output` {config.output} was made with `{name}` {before[name]!r}, not {value!r}. Choose another "
                "file, remove it, or go on with the same options."
            )


def _beside(config: CandidatesConfig, suffix: str) -> Path:
    return Path(config.output).with_suffix(suffix)


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
    of_architecture = folder / ARCHITECTURES[config.architecture].slug
    if (of_architecture / "dataset_dict.json").is_file():
        folder = of_architecture
    if not (folder / "dataset_dict.json").is_file():
        raise ConfigError(f"`dataset` {folder} is no DatasetDict; name one architecture's folder, e.g. {folder}/sd15.")
    data = datasets.load_from_disk(str(folder))
    if config.split not in data:
        raise ConfigError(f"`split` {config.split!r} is not in {folder}, which has {list(data)}.")
    return [(row["id"], row["instruction"]) for row in data[config.split]]


def _instruction(instruction: Any) -> dict[str, str]:
    return {"prompt": instruction, "negative prompt": ""} if isinstance(instruction, str) else instruction


if __name__ == "__main__":
    run_command(main, CandidatesConfig, errors=(CatalogError, DialogueError))
