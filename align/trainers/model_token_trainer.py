"""ModelTokenTrainer: ChatGen-Evo's second stage (Sec. 3.2.2), on hidden states that are computed once."""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from align.run_directory import read_metrics
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_cache import HiddenCache, ModelTokenExamples, build_cache
from align.trainers.model_token_config import ModelTokenConfig, ModelTokenError
from align.trainers.model_token_fit import (
    FitScores,
    HiddenSource,
    adamw_epoch,
    check_names,
    epoch_batches,
    lbfgs_run,
    memory_source,
    score_rows,
)
from align.trainers.model_token_initial import class_mean_rows, mean_rows
from align.trainers.model_token_rows import ModelTokens
from rewards.files import write_atomically
from rollouts.candidate_files import Processes

logger = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"
# Of a configuration, what changes no number of a run.
_WITHOUT_EFFECT = {
    "output_dir", "cache_dir", "replace_stale_cache", "tokens_per_batch", "part_rows", "memory_mb", "device", "resume",
}  # fmt: skip


class _Progress(NamedTuple):
    """What a checkpoint holds beside tensors."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf


class ModelTokenTrainer:
    """Train W_M with everything else frozen (ChatGen Eq. 3), and nothing but W_M in the loop.

    The backbone runs once over every distinct prefix; hidden states and the words' log-sum-exp go into a cache on disk.
    What is minimized on them is the cross-entropy over the whole concatenated vocabulary, as in a loop that runs the
    backbone at every step, to rounding.

    It runs in one process, on one device; there is no distributed version, as an epoch over the cache takes seconds.
    Started again after a kill at any moment, it goes on with the missing parts of the cache or after the last epoch,
    and ends with the same rows as without the kill.

    Files in `output_dir`: cache/, metrics.jsonl (a line per epoch), checkpoint.safetensors, and at the end
    model_tokens.safetensors and model_tokens.json.
    """

    def __init__(
        self,
        model: Any,
        config: ModelTokenConfig,
        names: Sequence[str],
        examples: ModelTokenExamples,
        eval_examples: ModelTokenExamples | None = None,
        *,
        name_ids: Sequence[Sequence[int]] | None = None,
        description_ids: Sequence[Sequence[int]] | None = None,
    ):
        """Check everything; nothing is computed yet but a few tokens.

        Args:
            model: A causal language model on its device, not wrapped for distributed training. It is not changed.
            config: Options.
            names: Of the models, each once; labels are indices into it.
            examples: To learn from.
            eval_examples: To validate on; None: a part of `examples`, `config.validation_fraction`.
            name_ids: Token ids of each name, for `init: names`.
            description_ids: Token ids of each description, for `init: descriptions`.

        Raises:
            ModelTokenError: Names, examples or the model can't be used, or there are several processes.
        """
        if (processes := Processes.here().count) > 1:
            raise ModelTokenError(f"Model tokens are trained in one process, but were started in {processes}; use one.")
        self.config, self.names = config, tuple(names)
        check_names(self.names)
        self.backbone = Backbone(model)
        limits = (len(self.names), self.backbone.vocabulary, self.backbone.window)
        examples.check(*limits)
        if eval_examples is not None:
            eval_examples.check(*limits)
        self.examples = examples if eval_examples is None else examples + eval_examples
        self.train_index, self.eval_index = _split(len(examples), len(self.examples), config)
        self._texts = {"names": name_ids, "descriptions": description_ids}.get(config.init)
        if config.init in ("names", "descriptions") and self._texts is None:
            argument = "name_ids" if config.init == "names" else "description_ids"
            raise ModelTokenError(f"`init: {config.init}` needs `{argument}`; give them or choose another `init`.")
        self.device = torch.device(config.device or self.backbone.head.weight.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.output_dir = Path(config.output_dir)

    def build_cache(self) -> HiddenCache:
        """Compute the hidden states that are not there yet.

        Raises:
            ModelTokenError: The cache in `cache_dir` is of other weights or data, or hidden states are not finite.
        """
        config = self.config
        return build_cache(
            config.cache_dir or self.output_dir / "cache",
            self.backbone,
            self.examples,
            dtype=config.cache_dtype,
            tokens_per_batch=config.tokens_per_batch,
            part_rows=config.part_rows,
            replace_stale=config.replace_stale_cache,
        )

    def train(self) -> ModelTokens:
        """Build the cache, train, and save the rows: those of the best epoch if there is a validation part.

        Raises:
            ModelTokenError: See `build_cache`; a checkpoint of another run; a loss that is not finite.
        """
        cache = self.build_cache()
        source = memory_source(cache, dtype=self.dtype, device=self.device, memory_mb=self.config.memory_mb)
        self._warn_of_absent()
        anchor = self.initial_rows(source)
        rows, best = anchor.clone(), anchor.clone()
        # Fused where there are kernels: with many models AdamW's own passes over W_M are what takes time.
        optimizer = torch.optim.AdamW(
            [rows], lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=self.device.type != "mps"
        )
        run = self._run_key(cache, anchor)
        progress = self._resume(run, rows, best, optimizer)
        while progress.epoch < self.config.num_epochs and not self._has_stopped(progress):
            started = time.perf_counter()
            loss = self._epoch(rows, optimizer, source, progress.epoch, anchor)
            if not (math.isfinite(loss) and bool(rows.isfinite().all())):
                raise ModelTokenError(
                    f"Epoch {progress.epoch + 1}: the loss or W_M is not finite; lower `learning_rate`."
                )
            scores = self.evaluate(rows, source)
            progress = _after_epoch(progress, scores)
            if progress.best_epoch == progress.epoch:
                best.copy_(rows.detach())
            self._log(progress.epoch, loss, scores, time.perf_counter() - started)
            self._save_checkpoint(run, progress, rows, best, optimizer)
        logger.info("trained for %d epochs; the best is epoch %d", progress.epoch, progress.best_epoch)
        tokens = ModelTokens(self.names, best.cpu(), cache.transform, cache.manifest.backbone)
        tokens.save(self.output_dir)
        return tokens

    def initial_rows(self, source: HiddenSource) -> Tensor:
        """W_M before training, as `init` says. Shape (M, d)."""
        config, shape = self.config, (len(self.names), self.backbone.hidden_size)
        if self._texts is not None:
            rows = mean_rows(self.backbone.head.weight.detach(), self._texts, self.names)
        elif config.init == "class_means":
            options = {"transform": self.backbone.transform, "block_rows": config.block_rows}
            rows = class_mean_rows(source, self.train_index, len(self.names), **options)
        elif config.init == "normal":
            rows = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed)) * config.init_std
        else:
            rows = torch.zeros(shape)
        if not rows.isfinite().all():
            raise ModelTokenError(f"`init: {config.init}` gave rows that are not finite; choose another one.")
        return rows.to(self.device, self.dtype)

    def evaluate(self, rows: Tensor, source: HiddenSource) -> FitScores | None:
        """Scores of rows on the validation part; None if there is none."""
        if not len(self.eval_index):
            return None
        options = {"transform": self.backbone.transform, "block_rows": self.config.block_rows}
        return score_rows(rows, source, self.eval_index, **options)

    def _epoch(
        self, rows: Tensor, optimizer: torch.optim.Optimizer, source: HiddenSource, epoch: int, anchor: Tensor
    ) -> float:
        config = self.config
        options: dict[str, Any] = {
            "transform": self.backbone.transform,
            "block_rows": config.block_rows,
            "l2": config.l2,
            "anchor": anchor,
        }
        if config.optimizer == "lbfgs":
            return lbfgs_run(rows, source, self.train_index, **options)
        batches = epoch_batches(self.train_index, config.batch_size, seed=config.seed, epoch=epoch)
        steps = -(-len(self.train_index) // config.batch_size)
        taken = epoch * steps

        def set_learning_rate() -> None:
            nonlocal taken
            left = 1 - taken / (steps * config.num_epochs) if config.lr_schedule == "linear" else 1.0
            optimizer.param_groups[0]["lr"] = config.learning_rate * left
            taken += 1

        return adamw_epoch(rows, optimizer, source, batches, before_step=set_learning_rate, **options)

    def _has_stopped(self, progress: _Progress) -> bool:
        patience = self.config.patience
        return patience is not None and len(self.eval_index) > 0 and progress.epoch - progress.best_epoch >= patience

    def _warn_of_absent(self) -> None:
        present = {self.examples.labels[number] for number in self.train_index.tolist()}
        if absent := [name for number, name in enumerate(self.names) if number not in present]:
            logger.warning(
                "%d of %d models have no example to learn from (%r is one): they keep to their first rows, but for "
                "being pushed away from others' examples",
                len(absent),
                len(self.names),
                absent[0],
            )

    # What is kept between starts

    def _run_key(self, cache: HiddenCache, anchor: Tensor) -> dict[str, str]:
        """What a checkpoint must be of to be gone on from."""
        options = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _WITHOUT_EFFECT}
        first = hashlib.sha256(anchor.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]
        run = {"cache": cache.manifest.key(), "names": hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]}
        run |= {"examples to train on": str(len(self.train_index)), "first rows": first}
        return run | {f"`{key}`": json.dumps(value) for key, value in options.items()}

    def _resume(self, run: dict[str, str], rows: Tensor, best: Tensor, optimizer: torch.optim.Optimizer) -> _Progress:
        path = self.output_dir / _CHECKPOINT
        if not self.config.resume or not path.is_file():
            self._cut_metrics(0)
            return _Progress()
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelTokenError(f"{path} can't be used ({error!r}); delete it or set `resume: false`.") from error
        if differ := [key for key in run if state["run"].get(key) != run[key]]:
            raise ModelTokenError(
                f"{path} is of another run: {differ[0]} was {state['run'].get(differ[0])}, is {run[differ[0]]}. Set "
                "`resume: false` to start anew, or choose another `output_dir`."
            )
        rows.copy_(tensors["rows"])
        best.copy_(tensors["best"])
        if "exp_avg" in tensors:
            of_rows = {name: tensors[name].to(rows) for name in ("exp_avg", "exp_avg_sq")}
            of_rows["step"] = tensors["step"]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: of_rows}})
        best_loss = state["best_loss"]
        progress = _Progress(state["epoch"], state["best_epoch"], math.inf if best_loss is None else best_loss)
        self._cut_metrics(progress.epoch)
        logger.info("going on from %s, after epoch %d", path, progress.epoch)
        return progress

    def _save_checkpoint(
        self, run: dict[str, str], progress: _Progress, rows: Tensor, best: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        tensors = {"rows": rows.detach(), "best": best} | dict(optimizer.state.get(rows, {}))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        best_loss = progress.best_loss if math.isfinite(progress.best_loss) else None  # JSON has no infinity
        state = {"run": run} | progress._asdict() | {"best_loss": best_loss}
        data = safetensors.torch.save(tensors, metadata={"state": json.dumps(state)})
        write_atomically(self.output_dir / _CHECKPOINT, data)

    def _cut_metrics(self, epoch: int) -> None:
        """Drop lines of later epochs, which will be written again, and one that a kill cut short."""
        path = self.output_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["epoch"] <= epoch] if epoch else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def _log(self, epoch: int, loss: float, scores: FitScores | None, seconds: float) -> None:
        per_epoch = 1 if self.config.optimizer == "lbfgs" else -(-len(self.train_index) // self.config.batch_size)
        line: dict[str, Any] = {"step": epoch * per_epoch, "epoch": epoch, "loss": loss}
        if scores is not None:
            line |= {f"eval_{name}": value for name, value in _named(scores).items()}
        with (self.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"seconds": seconds}) + "\n")
        logger.info("%s", json.dumps(line))


def _named(scores: FitScores) -> dict[str, float]:
    """By the names in metrics.jsonl."""
    return {
        "loss": scores.loss,
        "accuracy/top1": scores.top1,
        "accuracy/top5": scores.top5,
        "accuracy/ahead_of_words": scores.ahead_of_words,
        "probability/models": scores.probability_of_models,
    }


def _after_epoch(progress: _Progress, scores: FitScores | None) -> _Progress:
    """Without a validation part the last epoch is the best."""
    epoch = progress.epoch + 1
    if scores is None:
        return _Progress(epoch, epoch)
    if scores.loss < progress.best_loss:
        return _Progress(epoch, epoch, scores.loss)
    return progress._replace(epoch=epoch)


def _split(num_train: int, total: int, config: ModelTokenConfig) -> tuple[Tensor, Tensor]:
    """Numbers of the examples to train and to validate on."""
    if total > num_train:
        return torch.arange(num_train), torch.arange(num_train, total)
    held_out = int(num_train * config.validation_fraction)
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(config.seed))
    return order[held_out:].sort().values, order[:held_out].sort().values
