"""What a training run leaves behind: metrics.jsonl, checkpoints that can be resumed from, a model card."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewards.files import write_atomically
from rollouts.dialogue import Dialogue

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"(--\w*token[= ])\S+")


class MetricsFile(TrainerCallback):
    """Append every log of the trainer to `metrics.jsonl`, one object a line, with `step` and `epoch`.

    When training resumes from a checkpoint, lines of later steps are dropped first: they will be written again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "metrics.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step that training starts from."""
        if not state.is_world_process_zero:
            return
        kept = (
            [line for line in read_metrics(self.path) if line["step"] <= state.global_step] if state.global_step else []
        )
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs:
            return
        # JSON has no NaN; a diverged loss is written as text rather than as an unreadable file.
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        line = {"step": state.global_step, "epoch": state.epoch} | values
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    path = Path(path)
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            logger.warning("%s: left out a damaged line", path)
    return lines


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was saved to its end; one that a kill cut short is passed over.

    The trainer writes `trainer_state.json` last, so a checkpoint that has a readable one has everything else.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdecimal():
            continue
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not saved to its end and is passed over", path)
            continue
        found.append((int(step), str(path)))
    return max(found)[1] if found else None


def resume_from(training: TrainingArguments, *, auto_resume: bool) -> str | None:
    """The checkpoint to go on from: the one that was asked for, else the last complete one, else None.

    Args:
        training: Its `resume_from_checkpoint` and `output_dir`.
        auto_resume: Look for the last one.
    """
    if training.resume_from_checkpoint:
        return str(training.resume_from_checkpoint)
    found = last_complete_checkpoint(str(training.output_dir)) if auto_resume else None
    if found:
        logger.info("going on from %s", found)
    return found


def save_policy(trainer: Trainer, dialogue: Dialogue, output: Path, *, merge_lora: bool) -> None:
    """Save an ordinary model folder with tokenizer and dialogue format.

    Every process must call this: under ZeRO-3 each holds a piece of the weights.

    Args:
        trainer: After training.
        dialogue: Format and tokenizer of its policy.
        output: The folder.
        merge_lora: Save an adapter merged into its model. Not under ZeRO-3, whose pieces can't be merged: there the
            adapter is saved as it is.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if merge_lora and hasattr(model, "merge_and_unload") and not trainer.is_deepspeed_enabled:
        trainer.model = model.merge_and_unload()
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        dialogue.tokenizer.save_pretrained(output)
        dialogue.save_form(output)


def write_model_card(
    folder: str | Path, *, title: str, command: str, facts: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Write a model card (README.md): what the model is, how it was made, how well it does, how to use it.

    Args:
        folder: Of the model.
        title: Heading of the card.
        command: What was typed; the values of its `--*_token` flags are not shown.
        facts: Rows of the first table.
        metrics: Rows of the second; floats are shown with four digits.
    """
    command = _SECRET.sub(r"\1***", command)
    rows = "\n".join(f"| {key} | {_cell(str(value))} |" for key, value in facts.items())
    numbers = "\n".join(f"| {key} | {_cell(value)} |" for key, value in metrics.items())
    text = f"""---
library_name: transformers
tags: [t2i-align, text-to-image, tool-use, diffagent]
---
# {title}

Answers a text-to-image prompt with a T2I API call: one JSON object with model, type, base model, size, sampler, steps,
cfg scale and model description (DiffAgent, CVPR 2024). Trained with t2i-align:

```bash
{command}
```

The resolved configuration is in `config.yaml`, the dialogue format in `dialogue.json`, every logged number in
`metrics.jsonl`.

| | |
|---|---|
{rows}

## Last metrics

| metric | value |
|---|---:|
{numbers}

## Limits
The model knows only the catalogue it was trained on, and can name models that do not exist: validate each call
(`rollouts.catalog.Catalog.validate`). The catalogue's models have licences of their own.
"""
    write_atomically(Path(folder) / "README.md", text.encode())


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", r"\|")
