"""Supervised fine-tuning: DiffAgent-SFT (Sec. 3.2.1, Eq. 1), ChatGen-Base (Eq. 1) and stage 1 of ChatGen-Evo (Eq. 2).

    accelerate launch align/sft.py --config configs/diffagent/sft.yaml --dataset data/dabench --output_dir runs/sft
    accelerate launch align/sft.py --config configs/chatgen/base.yaml --dataset data/chatgenbench --output_dir runs/base

Starts from a pretrained model (`model_name_or_path`, safetensors or GGUF) or from nothing (`from_scratch: true`, with a
tokenizer trained on the data). One that sees pictures (InternVL, Qwen-VL) is shown those of the chats. Resumes from the
last complete checkpoint in `output_dir` when started again.
"""

import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from align.chat_dialogue import PLANNING_TASK, WRITING_TASK, ChatFormat
from align.chat_pictures import LONGEST_SIDE
from align.chats import Unreadable
from align.distributed import leave_process_group, prepare_cpu_deepspeed, without_deepspeed
from align.joint_tokens import JointTask
from align.pairs import DataError
from align.picture_collator import PictureCollator
from align.picture_dialogue import PictureDialogue
from align.picture_trainer import PictureTrainer
from align.run_directory import MetricsFile, resume_from, save_policy, write_model_card
from align.sample_answers import SampleAnswers
from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from align.sft_tasks import CallTask, ChatTask, Learned, Reader, Task
from align.vision_tower import freeze_vision_tower, spare_vision_tower
from rewards.commandline import ConfigError, from_json, run_command, save_config
from rewards.tracking import check_wandb
from rollouts.api import ARCHITECTURES
from rollouts.catalog import Catalog, CatalogError
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat
from rollouts.policy import load_policy, load_processor, load_tokenizer, sees_pictures

logger = logging.getLogger(__name__)


@dataclass
class SFTArguments:
    """Options of `align/sft.py` beside TRL's `SFTConfig` (training) and `ModelConfig` (model, LoRA)."""

    dataset: str = field(
        metadata={"help": "DABench or ChatGenBench folder (output of align.bench), or one DatasetDict in it."}
    )
    learn: Learned = field(
        default="call",
        metadata={
            "help": "What to write: the call of an instruction, or the plan or only the prompt of a chat; joint: the "
            "prompt and the model's token, both stages of ChatGen-Evo in one run."
        },
    )
    architecture: str = field(
        default="SD 1.5", metadata={"help": "Base model architecture: one agent is trained per one."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Train a tokenizer and a small Llama from nothing (see ScratchConfig)."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer; none: the model's own."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file inside `model_name_or_path`."})
    catalog: str | None = field(
        default=None, metadata={"help": "Catalogue to validate sample answers with; none: `dataset`/catalog.jsonl."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every dialogue; none: none."})
    negative_prompt: bool = field(default=False, metadata={"help": "Also tell the policy the negative prompt."})
    writing_task: str = field(
        default=WRITING_TASK,
        metadata={"help": "`learn: prompt`: what stands before a chat (ChatGen Eq. 2); can be empty."},
    )
    planning_task: str = field(default=PLANNING_TASK, metadata={"help": "The same for `learn: plan`."})
    plain_dialogue: bool = field(default=False, metadata={"help": "Ignore the tokenizer's chat template."})
    max_pictures: int = field(
        default=5, metadata={"help": "The newest so many pictures of a chat are shown to a policy that sees."}
    )
    picture_side: int = field(
        default=LONGEST_SIDE,
        metadata={"help": "Larger pictures are made smaller, to so many pixels on the longest side."},
    )
    picture_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "For the image processor, e.g. {max_patches: 4} of InternVL or {max_pixels: 401408} of Qwen-VL; "
            "JSON on a command line; none: its own settings."
        },
    )
    unreadable_pictures: Unreadable = field(
        default="error",
        metadata={"help": "A picture that can't be opened: error, before training begins, or write [picture] (text)."},
    )
    freeze_vision: bool = field(
        default=True,
        metadata={
            "help": "Leave the vision tower as it is, as is usual (the paper fine-tunes 'fully', and does not say "
            "whether that means the tower); what projects its output into the language model is trained."
        },
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on this many rows only; none: all."})
    max_eval_rows: int | None = field(default=500, metadata={"help": "Evaluate the loss on this many rows; none: all."})
    sample_answers: int = field(
        default=8, metadata={"help": "Answers written and validated at each evaluation; 0: none."}
    )
    sample_answer_tokens: int = field(default=256, metadata={"help": "Token limit of a sample answer."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better one; none: never."}
    )
    merge_lora: bool = field(default=True, metadata={"help": "Save LoRA training as a merged, ordinary model."})
    auto_resume: bool = field(
        default=True, metadata={"help": "Go on from the last complete checkpoint in `output_dir`, if there is one."}
    )

    def __post_init__(self) -> None:
        self.picture_options = from_json("picture_options", self.picture_options or {}, dict)


def main(args: SFTArguments, training: SFTConfig, model_args: ModelConfig, scratch: ScratchConfig) -> dict[str, float]:
    """Train, evaluate and save; returns the last metrics."""
    _check(args, training, model_args)
    task = _task(args)
    reader, policy = _load(args, training, model_args, scratch, task)
    task.prepare(policy)
    facts: dict[str, Any] = {
        "base": model_args.model_name_or_path or "from scratch",
        "parameters": f"{policy.num_parameters():,}",
    } | ({"architecture": args.architecture} if args.learn == "call" else {"learned": args.learn})
    dialogue = task.dialogue(reader)
    max_length = training.max_length or dialogue.tokenizer.model_max_length
    train_rows = task.encode(_first(task.rows, args.max_train_rows), dialogue, max_length, "sft")
    eval_rows = task.encode(_first(task.eval_rows, args.max_eval_rows), dialogue, max_length, "eval")
    _show_sample(train_rows[0], dialogue.tokenizer)
    if "wandb" in (training.report_to or ()):
        check_wandb()

    output = Path(str(training.output_dir))
    peft_config = get_peft_config(model_args)
    if isinstance(dialogue, PictureDialogue):
        training.remove_unused_columns = False  # the collator needs to know where pictures are
        if args.freeze_vision:
            facts["frozen parameters of the vision tower"] = f"{freeze_vision_tower(policy):,}"
            if peft_config is not None:
                spare_vision_tower(peft_config, policy)
    sees = isinstance(dialogue, PictureDialogue)
    trainer = (PictureTrainer if sees else SFTTrainer)(
        model=policy,
        args=training,
        data_collator=PictureCollator(dialogue, always_pixels=training.world_size > 1) if sees else None,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=reader,
        peft_config=peft_config,
        callbacks=_callbacks(args, output, dialogue, task),
    )
    if trainer.is_world_process_zero():
        save_config(output / "config.yaml", scratch, model_args, training, args)
        dialogue.save_form(output)
    trainer.train(resume_from_checkpoint=resume_from(training, auto_resume=args.auto_resume))
    metrics = trainer.evaluate() if training.eval_strategy != "no" else {}
    facts |= {
        "training rows": f"{len(train_rows):,}",
        "steps": trainer.state.global_step,
        "processes": f"{trainer.accelerator.num_processes} ({trainer.accelerator.distributed_type.value})",
        "best checkpoint": trainer.state.best_model_checkpoint or "-",
    }
    save_policy(trainer, dialogue, output, merge_lora=args.merge_lora)
    if trainer.is_world_process_zero():
        with without_deepspeed():
            task.finish(output)
        write_model_card(output, title=task.title, command=_command(), facts=facts, metrics=metrics)
        if training.push_to_hub:
            trainer.push_to_hub(commit_message=task.title)
    leave_process_group()
    return metrics


def _check(args: SFTArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse combinations that would fail late or do something else than asked."""
    if args.from_scratch == (model_args.model_name_or_path is not None):
        raise ConfigError("Give either `model_name_or_path` or `from_scratch: true`, and not both.")
    if args.architecture not in ARCHITECTURES:
        raise ConfigError(f"`architecture` must be one of {list(ARCHITECTURES)}, but got {args.architecture!r}.")
    if training.trust_remote_code:
        raise ConfigError("`trust_remote_code: true` would run code that came with a model; this toolkit never does.")
    if training.assistant_only_loss or training.completion_only_loss is False:
        raise ConfigError("The loss is always on the response only; leave the `*_only_loss` options alone.")
    if args.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise ConfigError("`early_stopping_patience` needs `load_best_model_at_end: true`.")
    if args.learn == "joint" and model_args.use_peft:
        raise ConfigError("`learn: joint` trains new rows of the output layer, which no adapter has; leave out LoRA.")
    prepare_cpu_deepspeed(training)


def _load(
    args: SFTArguments, training: SFTConfig, model_args: ModelConfig, scratch: ScratchConfig, task: Task
) -> tuple[Reader, PreTrainedModel]:
    if args.from_scratch:
        tokenizer: PreTrainedTokenizerBase = train_bpe_tokenizer(task.texts(), vocab_size=scratch.vocab_size)
        model = build_from_scratch(scratch, tokenizer, seed=training.seed)
        if model_args.attn_implementation is not None:
            model.set_attn_implementation(model_args.attn_implementation)
        return tokenizer, model
    name = model_args.model_name_or_path
    assert name is not None  # checked above
    source, revision = args.tokenizer_name_or_path or name, model_args.model_revision
    if args.learn != "call" and args.gguf_file is None and sees_pictures(name, revision=revision):
        if training.packing or training.padding_free:
            raise ConfigError("Chats with pictures can't be packed; set `packing: false` and `padding_free: false`.")
        reader: Reader = load_processor(source, revision=revision if source == name else None)
    else:
        reader = load_tokenizer(source, gguf_file=args.gguf_file)
    policy = load_policy(
        name,
        gguf_file=args.gguf_file,
        dtype=model_args.dtype or "float32",
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
    )
    return reader, policy


def _task(args: SFTArguments) -> Task:
    if args.learn == "call":
        form = DialogueFormat(args.system_prompt, args.negative_prompt, args.plain_dialogue)
        return CallTask(args.dataset, args.architecture, form)
    chat_form = ChatFormat(
        args.writing_task, args.planning_task, args.plain_dialogue, args.max_pictures, args.picture_side,
        from_json("picture_options", args.picture_options, dict),
    )  # fmt: skip
    if args.learn == "joint":
        return JointTask(args.dataset, chat_form, args.unreadable_pictures)
    return ChatTask(args.dataset, args.learn, chat_form, args.unreadable_pictures)


def _first(rows: Any, count: int | None) -> Any:
    """A seeded choice of rows: the first ones would all be of the same few models."""
    if count is None or count >= len(rows):
        return rows
    # In memory: else `datasets` writes its indices into the folder that the rows were loaded from.
    return rows.shuffle(seed=0, keep_in_memory=True).select(range(count), keep_in_memory=True)


def _show_sample(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Log one dialogue as the policy sees it, so that a wrong template or mask is seen before hours of training."""
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    given = str(tokenizer.decode(row["input_ids"][: len(row["input_ids"]) - len(learned)]))
    # A picture is hundreds of tokens that look alike.
    logger.info("given:   %r", re.sub(r"(<[^<>]+>)\1{3,}", lambda m: f"{m[1]} x {len(m[0]) // len(m[1])}", given))
    logger.info("learned: %r", tokenizer.decode(learned))


def _callbacks(args: SFTArguments, output: Path, dialogue: Dialogue, task: Task) -> list[Any]:
    callbacks: list[Any] = [MetricsFile(output)]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    if args.sample_answers and task.samples_calls:
        path = Path(args.catalog) if args.catalog else Path(args.dataset) / "catalog.jsonl"
        if args.catalog or path.is_file():
            chosen = _first(task.eval_rows, args.sample_answers)
            callbacks.append(SampleAnswers(dialogue, chosen, Catalog.load(path), args.sample_answer_tokens, output))
        else:
            logger.warning("No sample answers: there is no %s; name one with --catalog.", path)
    return callbacks


def _command() -> str:
    return " ".join(["accelerate launch align/sft.py", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(
        main, SFTArguments, SFTConfig, ModelConfig, ScratchConfig, errors=(DataError, CatalogError, DialogueError)
    )
