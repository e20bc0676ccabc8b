"""Sample answers during training: what the policy writes, whether it can be called, beside what was asked for."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from rollouts.catalog import Catalog
from rollouts.dialogue import Dialogue
from rollouts.responses import generate_responses

logger = logging.getLogger(__name__)

COLUMNS = ("step", "prompt", "answer", "verdict", "asked for")


class SampleAnswers(TrainerCallback):
    """At each evaluation, answer a few prompts greedily; to `sample_answers.jsonl` and, if it is on, to a W&B table."""

    def __init__(self, dialogue: Dialogue, rows: Any, catalog: Catalog, max_new_tokens: int, folder: Path) -> None:
        self.dialogue = dialogue
        self.rows = list(rows)
        self.catalog = catalog
        self.max_new_tokens = max_new_tokens
        self.path = folder / "sample_answers.jsonl"
        self.last_step: int | None = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write and validate the answers."""
        if is_deepspeed_zero3_enabled():
            # Each process holds a piece of the weights: generating on one of them alone would hang.
            logger.info("no sample answers under ZeRO-3; use python -m align.evaluation.hallucination afterwards")
            return
        if not state.is_world_process_zero:
            return
        # The evaluation after training repeats the last one, unless another checkpoint was loaded as the best.
        if state.global_step == self.last_step and not args.load_best_model_at_end:
            return
        self.last_step = state.global_step
        table = self._answer(getattr(model, "module", model), state.global_step)
        share = sum(row["verdict"] != "ok" for row in table) / len(table)
        logger.info("step %d: %.0f%% of %d sample answers can't be called", state.global_step, 100 * share, len(table))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        self._to_wandb(args, state, table, share)

    def _answer(self, model: Any, step: int) -> list[dict[str, Any]]:
        training = model.training
        model.eval()
        instructions = [row["instruction"] for row in self.rows]
        responses = generate_responses(
            model, self.dialogue, instructions, max_new_tokens=self.max_new_tokens, batch_size=8, progress=False
        )
        texts = {response.index: response.text for response in responses}
        model.train(training)
        return [
            {
                "step": step,
                "prompt": row["instruction"]["prompt"],
                "answer": texts[i],
                "verdict": self.catalog.judge(texts[i]).reason or "ok",
                "asked for": row["api"]["model"],
            }
            for i, row in enumerate(self.rows)
        ]

    def _to_wandb(
        self, args: TrainingArguments, state: TrainerState, table: list[dict[str, Any]], share: float
    ) -> None:
        if "wandb" not in (args.report_to or ()):
            return
        import wandb

        if wandb.run is None:
            return
        rows: list[Any] = [[row[column] for column in COLUMNS] for row in table]
        # An explicit axis: W&B drops steps that do not grow, which happens after a resume.
        wandb.log(
            {
                "sample_answers": wandb.Table(columns=list(COLUMNS), data=rows),
                "eval/sample_hallucination": share,
                "train/global_step": state.global_step,
            }
        )
