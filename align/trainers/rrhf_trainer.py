"""RRHF (DiffAgent Sec. 3.2.2) as a transformers `Trainer`.

trainer = RRHFTrainer(
    model="runs/sft",
    args=RRHFConfig(output_dir="runs/rrhf"),
    train_dataset=[{"prompt": "User: a corgi\\nAgent:", "responses": [" A", " B"], "rewards": [0.1, 0.9]}],
)
trainer.train()
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from align.losses import PreferenceLoss, dpo_loss, reference_kl, rrhf_loss, sequence_logps, simpo_loss
from align.trainers.layouts import Batch, PackedLayout, PaddedLayout
from align.trainers.ranked_data import RankedData, Row, prepare_ranked
from align.trainers.ranking_metrics import ranking_metrics, selection_entropy
from align.trainers.rrhf_config import RRHFConfig
from align.trainers.token_logps import Way, choose_way, token_logps
from rollouts.policy import load_policy, load_tokenizer

logger = logging.getLogger(__name__)

RankedRows = Iterable[Mapping[str, Any]]


class RRHFTrainer(Trainer):
    """Trains a causal language model on ranked candidates.

    The loss of a step is the mean over its prompts of the per-prompt losses, however they are spread over micro-batches
    and processes. Logs `loss/rank`, `loss/ce`, `loss/kl`, and under `rank/` the numbers of `ranking_metrics`;
    evaluation the same with `eval_` before them, and `eval_rank/selection_entropy` where rows have `choices`.

    Args:
        model: A policy, or the folder or Hub id of one (safetensors).
        args: Options.
        train_dataset, eval_dataset: Rows as `align.trainers.ranked_data.prepare_ranked` takes them; a `Dataset`
            or any list of mappings.
        processing_class: The tokenizer; None: that of `model`, if it is a folder.
        peft_config: Train an adapter of this kind (PEFT).
        compute_metrics: Replaces the ranking metrics of an evaluation. Gets p of each candidate as `predictions`, and
            a tuple as `label_ids`: rewards (NaN: no such candidate), then gaps and choices, if rows have them.
        callbacks: As in `Trainer`.

    Raises:
        RankedDataError: Rows that can't be read or learned from.
        ValueError: No tokenizer, or one without an end token.

    Attributes:
        way: How log-probabilities are computed; see `align.trainers.token_logps.choose_way`.
        train_data, eval_data: What was kept of the rows, and how much was not.
    """

    # `compute_loss` divides by the number of prompts of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: RRHFConfig,
        train_dataset: RankedRows | None = None,
        eval_dataset: RankedRows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model)
        if processing_class is None or processing_class.eos_token_id is None:
            raise ValueError("`processing_class` must be a tokenizer with an end token (`eos_token`).")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            _disable_dropout(model)
        self.train_data = _prepare(train_dataset, processing_class, args, "train_dataset")
        self.eval_data = _prepare(eval_dataset, processing_class, args, "eval_dataset")
        data = [part for part in (self.train_data, self.eval_data) if part is not None]
        self._choice_names = _number_choices(data)
        self._num_candidates = max((part.num_candidates for part in data), default=0)
        self._longest = max((part.longest for part in data), default=0)
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        pad = processing_class.pad_token_id
        self._pad_token_id = processing_class.eos_token_id if pad is None else pad
        self.way = Way(packed=args.packing, fused_head=True)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if self.train_data is None else Dataset.from_list(self.train_data.rows),
            eval_dataset=None if self.eval_data is None else Dataset.from_list(self.eval_data.rows),
            data_collator=self._collate,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._ranking_of,
            callbacks=callbacks,
        )
        if self.args.n_gpu > 1:
            raise ValueError(f"One process can't train on {self.args.n_gpu} GPUs; start it with accelerate launch.")
        self.label_names = ["rewards"]
        if self._in_pieces:
            # Until training has wrapped the model, nothing can be measured; this is exact for any.
            self.way = Way(packed=False, fused_head=False, reason="not measured yet")
            self.add_callback(_ChooseWay(self))
        else:
            self.way = choose_way(self._inner(self.model), packing=args.packing, longest=self._longest)

    @property
    def _in_pieces(self) -> bool:
        """Whether every process holds a part of each weight only (ZeRO-3)."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    # Data

    def _collate(self, rows: list[Row]) -> Batch:
        batch = self._lay_out(rows, self._num_candidates)
        if self._choice_names:
            choices = torch.full(batch["rewards"].shape, -1)
            for number, row in enumerate(rows):
                choices[number, : len(row["choices"])] = torch.tensor(row["choices"])
            batch["choices"] = choices
        return batch

    def _lay_out(self, rows: list[Row], num_candidates: int) -> Batch:
        layout = PackedLayout if self.way.packed else PaddedLayout
        return layout(self._pad_token_id, num_candidates)(rows)

    def lay_out(self, rows: list[Row]) -> Batch:
        """A batch of rows of `prepare_ranked` as the model gets it, on its device."""
        batch = self._lay_out(rows, max(len(row["rewards"]) for row in rows))
        return {name: value.to(self.args.device) for name, value in batch.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """Prompts of a step, over all micro-batches and processes: what its loss is a mean over."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(len(batch["rewards"]) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        return count

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the prompts' losses over the number of prompts of the whole step; see `Trainer.compute_loss`.

        With `return_outputs`, also {"logps": p of each candidate, shape (prompts, candidates)}.
        """
        logps = token_logps(model, inputs, self.way, inner=self._inner(model))
        parts = self._loss(logps, inputs)
        loss, prompts = parts["loss"], len(inputs["rewards"])
        outputs = {"logps": self._scores(logps.detach(), inputs)}
        if model.training:
            self._note(parts, outputs["logps"], inputs)
        if num_items_in_batch is not None:
            # Gradients of processes are averaged, so each counts as many times as there are processes.
            replicas = self.accelerator.num_processes // self.get_tp_size()
            loss = loss * (prompts * replicas / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, logps: Tensor, inputs: Batch) -> dict[str, Tensor]:
        """Means over the batch's prompts."""
        args: Any = self.args
        common = {
            "rank_weight": args.rank_weight,
            "ce_weight": args.ce_weight,
            "ce_per_token": args.ce_per_token,
            "min_gap": inputs.get("min_gap", 0.0),
            "pair_reduction": args.pair_reduction,
            "margin": args.margin,
        }
        given = (logps, inputs["mask"], inputs["rewards"].to(logps.device))
        found: PreferenceLoss
        if args.loss_type == "rrhf":
            found = rrhf_loss(*given, length_exponent=args.length_exponent, **common)
        elif args.loss_type == "dpo":
            found = dpo_loss(*given, inputs["ref_token_logps"], beta=args.beta, **common)
        else:  # Bradley-Terry is SimPO without a target margin
            found = simpo_loss(*given, beta=args.beta, length_exponent=args.length_exponent, **common)
        parts = {"loss": found.loss, "rank": found.rank.detach(), "ce": found.ce.detach()}
        if args.kl_weight:
            divergence = reference_kl(logps, inputs["mask"], inputs["ref_token_logps"])
            parts |= {"loss": parts["loss"] + args.kl_weight * divergence, "kl": divergence.detach()}
        return parts

    def _scores(self, logps: Tensor, inputs: Batch) -> Tensor:
        """What the loss orders candidates by."""
        args: Any = self.args
        if args.loss_type == "dpo":
            return sequence_logps(logps - inputs["ref_token_logps"], inputs["mask"], 0.0)
        return sequence_logps(logps, inputs["mask"], args.length_exponent)

    def _inner(self, model: Any) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    # Reference

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; first scores the candidates under the initial policy, if the loss needs that."""
        self._score_reference()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, of the `eval_dataset` given to the trainer; scores the reference like `train`."""
        self._score_reference()
        return super().evaluate(*args, **kwargs)

    def _score_reference(self) -> None:
        """Give rows without them log-probabilities under the policy as it is now, so that no second model is kept."""
        if not cast(RRHFConfig, self.args).needs_reference:
            return
        if self._in_pieces:
            raise ValueError("`kl_weight` and dpo need the initial policy whole: use ZeRO-2 or DDP.")
        model = cast(nn.Module, self.model)
        model.eval()
        if self.is_deepspeed_enabled:  # it would be moved only when training begins
            model.to(self.args.device)
        for name, data in (("train_dataset", self.train_data), ("eval_dataset", self.eval_data)):
            if data is None or "ref_token_logps" in data.rows[0]:
                continue
            size = self.args.per_device_eval_batch_size
            for start in range(0, len(data.rows), size):
                rows = data.rows[start : start + size]
                batch = self.lay_out(rows)
                # As in training, where accelerate has wrapped the model's forward.
                with torch.no_grad(), self.accelerator.autocast():
                    logps = token_logps(model, batch, self.way, inner=self._inner(model)).cpu()
                for row, of_row in zip(rows, logps, strict=True):
                    row["ref_token_logps"] = [
                        of_row[i, : len(response)].tolist() for i, response in enumerate(row["responses"])
                    ]
            setattr(self, name, Dataset.from_list(data.rows))

    # Evaluation and logs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, p of each candidate, and what it is compared with."""
        inputs = cast(Batch, self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        rewards = inputs["rewards"].masked_fill(~inputs["mask"].any(-1), torch.nan)
        labels = (rewards, *(inputs[name] for name in ("min_gap", "choices") if name in inputs))
        return loss.detach(), None if prediction_loss_only else outputs["logps"], labels

    def _ranking_of(self, prediction: EvalPrediction) -> dict[str, float]:
        logps = torch.as_tensor(prediction.predictions)
        labels = prediction.label_ids if isinstance(prediction.label_ids, tuple) else (prediction.label_ids,)
        rewards = torch.as_tensor(labels[0])
        present = ~rewards.isnan()
        gaps = [torch.as_tensor(part) for part in labels[1:] if part.ndim == 3]
        found = ranking_metrics(logps, rewards, present, gaps[0] if gaps else 0.0)
        numbers = {f"rank/{name}": _mean(values) for name, values in found.items()}
        if len(labels) > 1 + len(gaps):
            likeliest = logps.masked_fill(~present, float("-inf")).argmax(1).numpy()
            chosen = labels[-1][np.arange(len(likeliest)), likeliest].tolist()
            entropy, effective = selection_entropy(chosen)
            numbers |= {"rank/selection_entropy": entropy, "rank/effective_choices": effective}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def _note(self, parts: Mapping[str, Tensor], logps: Tensor, inputs: Batch) -> None:
        """Add a micro-batch's numbers to those of the next log."""
        rewards, prompts = inputs["rewards"].to(logps.device), len(inputs["rewards"])
        present = inputs["mask"].any(-1) & ~rewards.isnan()
        found = ranking_metrics(logps, rewards, present, inputs.get("min_gap", 0.0))
        values = {f"loss/{name}": value.expand(prompts) for name, value in parts.items() if name != "loss"}
        values |= {f"rank/{name}": value for name, value in found.items()}
        names = list(values)
        table = torch.stack([values[name].to(torch.float64) for name in names])
        known = ~table.isnan()
        sums = torch.stack([table.nan_to_num(nan=0.0).sum(1), known.sum(1)], 1).tolist()
        for name, (total, count) in zip(names, sums, strict=True):
            self._sums[name][0] += total
            self._sums[name][1] += count

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over all prompts since the last log; all processes must call this, as `Trainer` does."""
        if self._sums and "loss" in logs:
            names = sorted(self._sums)
            table = torch.tensor([self._sums[name] for name in names], dtype=torch.float32, device=self.args.device)
            if self.args.world_size > 1:
                table = self.accelerator.reduce(table, reduction="sum")
            logs |= {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}
            self._sums.clear()
        super().log(logs, *args, **kwargs)


class _ChooseWay(TrainerCallback):
    """Chooses the way once DeepSpeed has wrapped the model, and before the first batch is laid out."""

    def __init__(self, trainer: RRHFTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        wrapped = cast(nn.Module, trainer.model_wrapped)
        trainer.way = choose_way(wrapped, packing=args.packing, longest=trainer._longest, inner=trainer._inner(wrapped))


def _prepare(
    rows: RankedRows | None, tokenizer: PreTrainedTokenizerBase, args: RRHFConfig, what: str
) -> RankedData | None:
    if rows is None:
        return None
    return prepare_ranked(
        rows, tokenizer, max_length=args.max_length, tie_standard_errors=args.tie_standard_errors, what=what
    )


def _number_choices(data: list[RankedData]) -> list[str]:
    """Replace what candidates choose by numbers, and return the names; none if not every row has them."""
    rows = [row for part in data for row in part.rows]
    if not all("choices" in row for row in rows):
        for row in rows:
            row.pop("choices", None)
        return []
    names = sorted({str(choice) for row in rows for choice in row["choices"]})
    number = {name: index for index, name in enumerate(names)}
    for row in rows:
        row["choices"] = [number[str(choice)] for choice in row["choices"]]
    return names


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # not a module in Llama and its like
            cast(Any, module).attention_dropout = 0.0


def _mean(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else math.nan
