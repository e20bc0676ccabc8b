"""Prompts with their ranked candidates and pictures, as the policy ranks them at each evaluation."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.losses import sequence_logps
from align.ranked_candidates import training_rows
from align.trainers import RRHFTrainer
from align.trainers.ranked_data import prepare_ranked
from align.trainers.token_logps import token_logps
from rollouts.dialogue import Dialogue

logger = logging.getLogger(__name__)

COLUMNS = ("step", "prompt", "rank", "model", "parameters", "origin", "reward", "p", "picture")


class RankedTable(TrainerCallback):
    """At each evaluation, the candidates of a few prompts in the policy's order: `ranked_candidates.jsonl` and W&B.

    Args:
        rows: Of `align.ranked_candidates.read_scored`; those that have candidates with a reward.
        dialogue: Format and tokenizer of the policy.
        folder: For the file.
        numbers: Logged once when training begins: what the whole table is like (`describe`).
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], dialogue: Dialogue, folder: Path, numbers: Mapping[str, float]
    ) -> None:
        self.rows = [{**row, "candidates": [c for c in row["candidates"] if c["reward"] is not None]} for row in rows]
        self.dialogue, self.path, self.numbers = dialogue, folder / "ranked_candidates.jsonl", numbers
        self.trainer: RRHFTrainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what is learned from; not again after a resume."""
        if self.trainer is not None and state.global_step == 0:
            self.trainer.log({f"rollout/{name}": value for name, value in self.numbers.items()})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Rank. Every process computes; the first one writes."""
        if self.trainer is None or not self.rows:
            return
        ranked = [line | {"step": state.global_step} for row in self.rows for line in self._rank(row)]
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in ranked)
        self._to_wandb(args, state, ranked)

    @torch.no_grad()
    def _rank(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        trainer: Any = self.trainer
        data = prepare_ranked(training_rows([row], self.dialogue, None), self.dialogue.tokenizer, what="table")
        batch = trainer.lay_out(data.rows)
        model = trainer.model_wrapped
        training = model.training
        model.eval()
        with trainer.compute_loss_context_manager():
            logps = token_logps(model, batch, trainer.way, inner=trainer.accelerator.unwrap_model(model))
        model.train(training)
        scores = sequence_logps(logps, batch["mask"], trainer.args.length_exponent)[0].tolist()
        candidates = sorted(zip(scores, row["candidates"], strict=False), key=lambda pair: -pair[0])
        return [_line(row, rank, score, candidate) for rank, (score, candidate) in enumerate(candidates, 1)]

    def _to_wandb(self, args: TrainingArguments, state: TrainerState, ranked: list[dict[str, Any]]) -> None:
        if "wandb" not in (args.report_to or ()):
            return
        import wandb

        if wandb.run is None:
            return
        table: list[Any] = []
        for line in ranked:
            cells: list[Any] = [line[column] for column in COLUMNS[:-1]]
            picture = _thumbnail(line["picture"])
            table.append([*cells, None if picture is None else wandb.Image(picture)])
        # An explicit axis: W&B drops steps that do not grow, which happens after a resume.
        wandb.log(
            {
                "ranked_candidates": wandb.Table(columns=list(COLUMNS), data=table),
                "train/global_step": state.global_step,
            }
        )


def _line(row: Mapping[str, Any], rank: int, score: float, candidate: Mapping[str, Any]) -> dict[str, Any]:
    call = candidate["call"]
    parameters = f"{call['sampling method']}, {call['sampling steps']} steps, cfg {call['cfg scale']:g}"
    return {
        "prompt": row["instruction"]["prompt"],
        "rank": rank,
        "model": call["model"],
        "parameters": f"{parameters}, {call['width']}x{call['height']}",
        "origin": candidate["origin"],
        "reward": candidate["reward"],
        "p": score,
        "picture": next((uri for uri in candidate.get("images") or [] if uri is not None), None),
    }


def _thumbnail(uri: str | None, side: int = 256) -> Any:
    """A small picture, or None where there is none any more."""
    if uri is None:
        return None
    import fsspec
    from PIL import Image, UnidentifiedImageError

    try:
        with fsspec.open(uri, "rb") as file:
            picture = Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        logger.info("no picture of %s in the table: %s", uri, error)
        return None
    picture.thumbnail((side, side))
    return picture
