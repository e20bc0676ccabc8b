"""The loss of model tokens (ChatGen Eq. 3) and its gradient, a block of models at a time and exact.

Pure functions of tensors. n examples, d hidden units, M models. Only the rows of the models have a gradient, and it is
written out rather than left to autograd, so that no more than a block of logits is ever held.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """What follows a model's output layer: `cap * tanh(scale * value / cap)`, without a cap `scale * value`.

    Cohere, Granite and Falcon-H1 have a scale, Gemma 2 has a cap. Rows appended to the layer go through it as well.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Logits, of values of any shape."""
        values = values if self.scale == 1.0 else values * self.scale
        return values if self.cap is None else torch.tanh(values / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of a logit with respect to the value, given the logit."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


PLAIN = LogitTransform()


class RankedExamples(NamedTuple):
    """How well each example's own model does, all of shape (n,)."""

    loss: Tensor
    """Eq. 3, nats."""
    rank: Tensor
    """How many models are ahead of it; of equal ones those that come first."""
    best_logit: Tensor
    """Of all models."""
    log_models: Tensor
    """Log-probability that any model token comes next, rather than a word (nats)."""


def loss_and_gradient(
    rows: Tensor,
    hidden: Tensor,
    labels: Tensor,
    frozen_lse: Tensor,
    *,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
    count: int | None = None,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ChatGen Eq. 3: `-log softmax([W_v; W_M] h)[label]` over words and models, and its gradient with respect to W_M.

    Of the words only the log-sum-exp of their logits is needed, as they are frozen.

    Args:
        rows: W_M. Shape (M, d).
        hidden: What the output layer is given, in the type of `rows`. Shape (n, d).
        labels: Index of a row; -1: any of the frozen ones (a word, or a model that is not fitted now). Shape (n,).
        frozen_lse: Log-sum-exp of all frozen logits (nats), in the type of `rows`. Shape (n,).
        transform: What follows the output layer.
        block_rows: Rows whose logits are held at once; where there are more, logits are computed twice.
        count: What the sum over examples is divided by; None: n. Full batches in pieces give their whole size.
        gradient: Added to, in place; None: a new one. Shape (M, d).

    Returns:
        Loss (scalar, the mean over `count`) and gradient, shape (M, d).
    """
    divisor = len(labels) if count is None else count
    target, normaliser, kept = frozen_lse, frozen_lse, None
    for start, block in _blocks(rows, block_rows):
        logits = transform(hidden @ block.T)
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
        inside, column = _columns(labels, start, len(block))
        target = torch.where(inside, logits.gather(1, column)[:, 0], target)
        kept = logits
    gradient = torch.zeros_like(rows) if gradient is None else gradient
    for start, block in _blocks(rows, block_rows):
        logits = kept if kept is not None and len(block) == len(rows) else transform(hidden @ block.T)
        inside, column = _columns(labels, start, len(block))
        slope = transform.slope(logits)
        # d loss / d logit = softmax - [label]
        change = (logits - normaliser[:, None]).exp_().scatter_add_(1, column, -inside[:, None].to(logits.dtype))
        change = change.mul_(slope)
        gradient[start : start + len(block)].addmm_(change.T, hidden, alpha=1 / divisor)
    return (normaliser - target).sum() / divisor, gradient


def rank_examples(
    rows: Tensor,
    hidden: Tensor,
    labels: Tensor,
    frozen_lse: Tensor,
    *,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
) -> RankedExamples:
    """Loss and rank of each example; arguments as of `loss_and_gradient`, but every label is of a row."""
    target = transform((hidden * rows[labels]).sum(1))
    models = torch.full_like(frozen_lse, -torch.inf)
    best, rank = models, torch.zeros_like(labels)
    for start, block in _blocks(rows, block_rows):
        logits = transform(hidden @ block.T)
        inside, column = _columns(labels, start, len(block))
        # Rows that are equal must compare as equal, so its own logit is taken from the product where it is in there.
        own = torch.where(inside, logits.gather(1, column)[:, 0], target)[:, None]
        numbers = torch.arange(start, start + len(block), device=labels.device)
        rank = rank + ((logits > own) | ((logits == own) & (numbers < labels[:, None]))).sum(1)
        models = torch.logaddexp(models, logits.logsumexp(1))
        best = torch.maximum(best, logits.amax(1))
    normaliser = torch.logaddexp(frozen_lse, models)
    return RankedExamples(normaliser - target, rank, best, models - normaliser)


def _blocks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _columns(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether an example's row is in the block, shape (n,), and its column there (else 0), shape (n, 1)."""
    inside = (labels >= start) & (labels < start + count)
    return inside, (labels - start).where(inside, 0)[:, None]
