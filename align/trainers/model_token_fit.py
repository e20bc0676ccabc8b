"""Fitting W_M on hidden states that are there: AdamW on batches, L-BFGS on everything, and how good it has become."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from align.trainers.model_token_cache import HiddenBatch, HiddenCache
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_loss import PLAIN, LogitTransform, loss_and_gradient, rank_examples

LBFGS_ITERATIONS = 20
_LBFGS_HISTORY = 10
_PIECE = 1024  # examples handled at once where all are


class HiddenSource(Protocol):
    """Where examples come from while training."""

    def __call__(self, index: Tensor) -> HiddenBatch:
        """Some examples, on the device and in the type of the rows. Shape of `index`: (n,), on the CPU."""
        ...


class FitScores(NamedTuple):
    """How good W_M is on some examples."""

    loss: float
    """ChatGen Eq. 3, mean over examples (nats)."""
    top1: float
    """Share of examples whose model is ahead of all other models."""
    top5: float
    """Share of examples whose model is among the first five."""
    ahead_of_words: float
    """Share of examples whose model is ahead of all other models and of every word: what greedy decoding gets right."""
    probability_of_models: float
    """Mean probability that a model token comes next, and not a word."""


def epoch_batches(index: Tensor, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Batches of an epoch, the same for equal `seed` and `epoch` (from 0); the last one may be smaller.

    Args:
        index: Numbers of examples. Shape (n,).
        batch_size: Examples of a batch.
        seed, epoch: What the order depends on.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    yield from index[torch.randperm(len(index), generator=generator)].split(batch_size)


def memory_source(cache: HiddenCache, *, dtype: torch.dtype, device: torch.device, memory_mb: int) -> HiddenSource:
    """All of a cache in (device) memory if it is not larger than `memory_mb`; else read from files as it is used."""
    size = len(cache) * cache.manifest.hidden_size * dtype.itemsize
    if size > memory_mb * 2**20:
        return lambda index: cache.gather(index, dtype=dtype, device=device)
    everything = cache.gather(torch.arange(len(cache)), dtype=dtype, device=device)
    return lambda index: everything.select(index.to(device))


def adamw_epoch(
    rows: Tensor,
    optimizer: torch.optim.Optimizer,
    source: HiddenSource,
    batches: Iterator[Tensor],
    *,
    before_step: Callable[[], None] = lambda: None,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
    l2: float = 0.0,
    anchor: Tensor | None = None,
) -> float:
    """One pass of AdamW; `rows` are changed in place.

    Args:
        rows: W_M, the optimizer's only parameter. Shape (M, d).
        optimizer: Any that reads `rows.grad`.
        source: Of hidden states.
        batches: Numbers of examples.
        before_step: Called before each step: sets the learning rate.
        transform, block_rows: See `loss_and_gradient`.
        l2, anchor: Adds `l2 / 2 * |rows - anchor|^2` to the loss.

    Returns:
        Mean loss over the examples, each at its step, without the penalty.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=rows.device), 0
    for index in batches:
        batch = source(index)
        loss, rows.grad = loss_and_gradient(
            rows.detach(), batch.hidden, batch.labels, batch.word_lse, transform=transform, block_rows=block_rows
        )
        if l2 and anchor is not None:
            rows.grad.add_(rows.detach() - anchor, alpha=l2)
        before_step()
        optimizer.step()
        total += loss.double() * len(index)
        count += len(index)
    return float(total) / count


def lbfgs_run(
    rows: Tensor,
    source: HiddenSource,
    index: Tensor,
    *,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
    l2: float = 0.0,
    anchor: Tensor | None = None,
    iterations: int = LBFGS_ITERATIONS,
) -> float:
    """Up to `iterations` of L-BFGS with a strong Wolfe line search on all examples; `rows` are changed in place.

    It starts without memory, so that runs one after the other give the same whether or not one was interrupted between
    them. Needs 20 times the memory of `rows`. Arguments as in `adamw_epoch`, and:

    Args:
        index: Numbers of all examples. Shape (n,).

    Returns:
        Mean loss over the examples before the run, without the penalty.
    """
    rows = rows.requires_grad_(True)
    first: list[float] = []
    optimizer = torch.optim.LBFGS(
        [rows],
        max_iter=iterations,
        history_size=_LBFGS_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure() -> Tensor:
        current, gradient = rows.detach(), torch.zeros_like(rows.detach())
        loss = torch.zeros((), dtype=rows.dtype, device=rows.device)
        for piece in index.split(_PIECE):
            batch = source(piece)
            loss += loss_and_gradient(
                current,
                batch.hidden,
                batch.labels,
                batch.word_lse,
                transform=transform,
                block_rows=block_rows,
                count=len(index),
                gradient=gradient,
            )[0]
        first.append(float(loss))
        if l2 and anchor is not None:
            difference = current - anchor
            gradient.add_(difference, alpha=l2)
            loss = loss + l2 / 2 * (difference**2).sum()
        rows.grad = gradient
        return loss

    optimizer.step(closure)
    rows.grad = None
    return first[0]


@torch.no_grad()
def score_rows(
    rows: Tensor,
    source: HiddenSource,
    index: Tensor,
    *,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
) -> FitScores:
    """How good `rows` are on some examples; arguments as in `lbfgs_run`."""
    sums = torch.zeros(len(FitScores._fields), dtype=torch.float64, device=rows.device)
    for piece in index.split(_PIECE):
        batch = source(piece)
        found = rank_examples(
            rows.detach(), batch.hidden, batch.labels, batch.word_lse, transform=transform, block_rows=block_rows
        )
        first = found.rank == 0
        columns = (
            found.loss,
            first,
            found.rank < 5,
            first & (found.best_logit > batch.word_max),
            found.log_models.exp(),
        )
        sums += torch.stack([column.double().sum() for column in columns])
    return FitScores(*(sums / len(index)).tolist())


def check_names(names: Sequence[str]) -> None:
    """Names of models must be there, not empty, and each only once.

    Raises:
        ModelTokenError: Naming the first that isn't so.
    """
    if not names:
        raise ModelTokenError("There must be at least one model to have a token.")
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ModelTokenError(f"Model {number} must have a name, but has {name!r}.")
        if name in seen:
            raise ModelTokenError(f"Models {seen[name]} and {number} have the same name, {name!r}; names must differ.")
        seen[name] = number
