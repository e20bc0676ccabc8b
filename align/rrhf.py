"""DiffAgent-RRHF (Sec. 3.2.2): teach a policy to prefer the calls whose pictures people prefer.

    accelerate launch align/rrhf.py --config configs/diffagent/rrhf.yaml --model_name_or_path runs/sft \
        --dataset runs/rollout/scored.parquet --output_dir runs/rrhf

Learns from a table of scored candidates (`rollouts.run`). With a `rollout:` block in the configuration it makes that
table first, from the prompts of DABench: the policy proposes calls, they are drawn and scored. `rounds: R` does all of
it R times, each time with the policy of the round before. Every stage is kept in `output_dir`; started again, the same
command goes on where it was.
"""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config

from align.distributed import leave_process_group, prepare_cpu_deepspeed
from align.pairs import DataError, load_pairs
from align.ranked_candidates import describe, read_scored, replay_rows, training_rows
from align.ranked_table import RankedTable
from align.rollout_stage import RolloutStage
from align.run_directory import MetricsFile, resume_from, save_policy, write_model_card
from align.sample_answers import SampleAnswers
from align.trainers import RRHFConfig, RRHFTrainer
from align.trainers.ranked_data import RankedDataError
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rewards.tracking import check_wandb
from rollouts.api import ARCHITECTURES
from rollouts.calls_table import CallsError
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat
from rollouts.policy import load_policy, load_tokenizer, policy_fingerprint
from rollouts.store_errors import StoreError
from rollouts.workers import PoolError

logger = logging.getLogger(__name__)

DONE_FILE = "trained.json"
_ROLLOUT_KEYS = ("candidates", "render")


@dataclass
class RRHFArguments:
    """Options of `align/rrhf.py` beside `RRHFConfig` (training) and TRL's `ModelConfig` (model, LoRA)."""

    dataset: str = field(
        metadata={"help": "Scored candidates (scored.parquet); with `rollout`, DABench, whose rrhf prompts are used."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Base model architecture: one agent per one."})
    catalog: str | None = field(
        default=None, metadata={"help": "Catalogue; none: catalog.jsonl of `dataset`, if that is DABench."}
    )
    weights: str | None = field(default=None, metadata={"help": "With `rollout`: folder of the models' weights."})
    rollout: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "In a YAML file: make the table first. `candidates`, `render`: options of these commands."},
    )
    rounds: int = field(default=1, metadata={"help": "With `rollout`: sample, draw, rank and train so many times."})
    round_options: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "In a YAML file: training options that change from round to round, one mapping per round."},
    )
    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the prompts that is evaluated on and not learned from, by hash of id."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Use so many prompts of the table; none: all."})
    any_policy: bool = field(
        default=False, metadata={"help": "Also learn from candidates that another policy proposed."}
    )
    sft_dataset: str | None = field(
        default=None, metadata={"help": "DABench folder for `sft_replay`; none: `dataset`, if that is DABench."}
    )
    sft_replay: float = field(
        default=0.0, metadata={"help": "SFT pairs mixed in, as a multiple of the prompts; they add cross-entropy."}
    )
    table_prompts: int = field(
        default=8, metadata={"help": "Prompts whose ranked candidates are shown at each evaluation; 0: none."}
    )
    sample_answers: int = field(
        default=0, metadata={"help": "Answers written and validated at each evaluation; needs a catalogue; 0: none."}
    )
    sample_answer_tokens: int = field(default=320, metadata={"help": "Token limit of a sample answer."})
    merge_lora: bool = field(default=True, metadata={"help": "Save LoRA training as a merged, ordinary model."})
    auto_resume: bool = field(default=True, metadata={"help": "Go on from what `output_dir` holds."})

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"`eval_share` must lie in [0, 1), but is {self.eval_share}.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, but is {self.rounds}.")
        if self.sft_replay < 0:
            raise ValueError(f"`sft_replay` must be 0 or more, but is {self.sft_replay}.")
        if self.rollout is None and self.rounds > 1:
            raise ValueError(f"`rounds: {self.rounds}` needs a `rollout:` block: each round samples anew.")
        if len(self.round_options) > self.rounds:
            raise ValueError(f"`round_options` has {len(self.round_options)} entries for {self.rounds} rounds.")
        if self.rollout is not None and (unknown := [key for key in self.rollout if key not in _ROLLOUT_KEYS]):
            raise ValueError(f"`rollout` may hold {' and '.join(_ROLLOUT_KEYS)}, but has {unknown}.")


def main(args: RRHFArguments, training: RRHFConfig, model_args: ModelConfig) -> dict[str, float]:
    """Roll out if asked to, train, evaluate and save, for every round; returns the last metrics."""
    stage = _check(args, training, model_args)
    output, policy = Path(str(training.output_dir)), str(model_args.model_name_or_path)
    if training.process_index == 0:
        save_config(output / "config.yaml", model_args, training, args)
    metrics: dict[str, float] = {}
    for number in range(args.rounds):
        last = number == args.rounds - 1
        folder = output / f"round-{number + 1}" if stage is not None else output
        own = _options_of_round(args, training, number, output if last else folder)
        source = Path(args.dataset)
        if stage is not None:
            source = stage.run(policy, folder)
        trained = Path(str(own.output_dir))
        if (trained / DONE_FILE).is_file() and args.auto_resume:
            logger.info("round %d: %s is trained already", number + 1, trained)
            metrics = json.loads((trained / DONE_FILE).read_text(encoding="utf-8"))
        else:
            metrics = train(args, own, model_args, policy, source)
        policy = str(trained)
    leave_process_group()
    return metrics


def train(
    args: RRHFArguments, training: RRHFConfig, model_args: ModelConfig, policy: str, table: Path
) -> dict[str, float]:
    """One round: learn from a table of scored candidates and save the new policy; returns its metrics."""
    fingerprint = None if args.any_policy else policy_fingerprint(policy)
    rows = read_scored(table, policy=fingerprint)[: args.max_prompts]
    dialogue = Dialogue(load_tokenizer(policy, revision=model_args.model_revision), DialogueFormat.load(policy))
    held_out = [_is_held_out(row["prompt_id"], args.eval_share) for row in rows]
    learned = [row for row, out in zip(rows, held_out, strict=True) if not out]
    evaluated = [row for row, out in zip(rows, held_out, strict=True) if out]
    train_rows = training_rows(learned, dialogue, training.max_length)
    train_rows += _replay(args, len(learned), dialogue, training)
    eval_rows = training_rows(evaluated, dialogue, training.max_length)
    if not eval_rows and training.eval_strategy != "no":
        raise ConfigError(
            f"`eval_share` {args.eval_share} of {len(rows)} prompts leaves none to evaluate on. Raise it, or set "
            "`eval_strategy: no`."
        )
    output = Path(str(training.output_dir))
    shown = RankedTable((evaluated or learned)[: args.table_prompts], dialogue, output, describe(rows))
    trainer = RRHFTrainer(
        model=load_policy(
            policy,
            dtype=model_args.dtype or "float32",
            revision=model_args.model_revision,
            attn_implementation=model_args.attn_implementation,
        ),
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        processing_class=dialogue.tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[MetricsFile(output), shown, *_sample_answers(args, output, dialogue, evaluated or learned)],
    )
    shown.trainer = trainer
    trainer.train(resume_from_checkpoint=resume_from(training, auto_resume=args.auto_resume))
    metrics = trainer.evaluate() if eval_rows else {}
    save_policy(trainer, dialogue, output, merge_lora=args.merge_lora)
    if trainer.is_world_process_zero():
        _finish(trainer, args, policy, table, metrics)
    trainer.accelerator.wait_for_everyone()
    _end_tracking(training)
    return metrics


def _check(args: RRHFArguments, training: RRHFConfig, model_args: ModelConfig) -> RolloutStage | None:
    """Refuse what would fail late; the rollout, if there is one."""
    if model_args.model_name_or_path is None:
        raise ConfigError("`model_name_or_path` is needed: the policy to start from, e.g. a folder of align/sft.py.")
    if args.architecture not in ARCHITECTURES:
        raise ConfigError(f"`architecture` must be one of {list(ARCHITECTURES)}, but got {args.architecture!r}.")
    if "wandb" in (training.report_to or ()):
        check_wandb()
    for number in range(args.rounds):
        _options_of_round(args, training, number, Path(str(training.output_dir)))
    prepare_cpu_deepspeed(training)
    if args.sft_replay and args.sft_dataset is None and args.rollout is None:
        raise ConfigError("`sft_replay` needs `sft_dataset`, a DABench folder.")
    if args.rollout is None:
        return None
    if args.weights is None:
        raise ConfigError("A `rollout:` needs `weights`, the folder of the models to draw with.")
    catalog = Path(args.catalog) if args.catalog else _catalog_of(Path(args.dataset))
    if not catalog.is_file():
        raise ConfigError(f"There is no catalogue at {catalog}; name one with --catalog.")
    folder, output = Path(args.dataset) / ARCHITECTURES[args.architecture].slug, Path(str(training.output_dir))
    return RolloutStage(
        dataset=str(folder if folder.is_dir() else args.dataset),
        architecture=args.architecture,
        catalog=str(catalog),
        weights=args.weights,
        candidates={"seed": training.seed} | (args.rollout.get("candidates") or {}),
        # One store for all rounds: what another round has drawn is not drawn again.
        render={"seed": training.seed, "store": str(output / "store")} | (args.rollout.get("render") or {}),
    )


def _catalog_of(dataset: Path) -> Path:
    """The catalogue of DABench, given its folder or that of one architecture."""
    own, above = dataset / "catalog.jsonl", dataset.parent / "catalog.jsonl"
    return above if above.is_file() and not own.is_file() else own


def _options_of_round(args: RRHFArguments, training: RRHFConfig, number: int, output: Path) -> RRHFConfig:
    """The trainer's options in a round: the common ones, and what the curriculum changes."""
    changed: Mapping[str, Any] = args.round_options[number] if number < len(args.round_options) else {}
    where = f"`round_options`, round {number + 1}"
    own = {"output_dir": str(output)}
    if args.rounds > 1 and training.run_name:
        own["run_name"] = f"{training.run_name}-round-{number + 1}"
    if not changed and all(getattr(training, name) == value for name, value in own.items()):
        return training
    # Not the loss either: the defaults of its other options are settled by now.
    known = {option.name for option in dataclasses.fields(RRHFConfig) if option.init} - own.keys() - {"loss_type"}
    if unknown := [key for key in changed if key not in known]:
        raise ConfigError(f"{where}: {unknown} can't be changed; they must be options of the trainer.")
    try:
        return dataclasses.replace(training, **changed, **own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _is_held_out(prompt_id: str, share: float) -> bool:
    return int(hashlib.sha256(prompt_id.encode()).hexdigest()[:8], 16) / 2**32 < share


def _replay(args: RRHFArguments, prompts: int, dialogue: Dialogue, training: RRHFConfig) -> list[dict[str, Any]]:
    count = round(args.sft_replay * prompts)
    if not count:
        return []
    pairs = load_pairs(args.sft_dataset or args.dataset, args.architecture)["sft"]
    return replay_rows(pairs, count, dialogue, training.max_length, training.seed)


def _sample_answers(
    args: RRHFArguments, output: Path, dialogue: Dialogue, rows: Sequence[Mapping[str, Any]]
) -> list[SampleAnswers]:
    if not args.sample_answers:
        return []
    catalog = Path(args.catalog) if args.catalog else _catalog_of(Path(args.dataset))
    chosen = []
    for row in rows:
        scored = [c for c in row["candidates"] if c["reward"] is not None]
        if scored:
            best = max(scored, key=lambda c: c["reward"])
            chosen.append({"instruction": row["instruction"], "api": best["call"]})
    chosen = chosen[: args.sample_answers]
    return [SampleAnswers(dialogue, chosen, Catalog.load(catalog), args.sample_answer_tokens, output)]


def _finish(trainer: RRHFTrainer, args: RRHFArguments, policy: str, table: Path, metrics: Mapping[str, float]) -> None:
    """Model card, and the file that says the round is done."""
    output = Path(str(trainer.args.output_dir))
    data = trainer.train_data
    assert data is not None  # training needs rows
    skipped = ", ".join(f"{reason} {count}" for reason, count in data.skipped.most_common()) or "nothing"
    way = "packed" if trainer.way.packed else "padded"
    facts = {
        "base": policy,
        "candidates": str(table),
        "architecture": args.architecture,
        "prompts": f"{len(data.rows):,}",
        "left out": skipped,
        "log-probabilities": f"{way} ({trainer.way.reason})" if trainer.way.reason else way,
        "steps": trainer.state.global_step,
        "processes": f"{trainer.accelerator.num_processes} ({trainer.accelerator.distributed_type.value})",
    }
    title = f"DiffAgent-RRHF for {args.architecture}"
    command = " ".join(["accelerate launch align/rrhf.py", *sys.argv[1:]])
    write_model_card(output, title=title, command=command, facts=facts, metrics=dict(metrics))
    write_atomically(output / DONE_FILE, json.dumps(dict(metrics), indent=1).encode())
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="DiffAgent-RRHF")


def _end_tracking(training: RRHFConfig) -> None:
    """Every round is a run of its own: their steps begin anew."""
    if "wandb" in (training.report_to or ()):
        import wandb

        if wandb.run is not None:
            wandb.finish()


if __name__ == "__main__":
    run_command(
        main,
        RRHFArguments,
        RRHFConfig,
        ModelConfig,
        errors=(DataError, RankedDataError, CallsError, CatalogError, DialogueError, PoolError, StoreError),
    )
