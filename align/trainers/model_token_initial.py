"""Rows of W_M to begin training with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_fit import HiddenSource, score_rows
from align.trainers.model_token_loss import PLAIN, LogitTransform

_PSEUDO_EXAMPLES = 2.0
"""How many examples at the overall mean each class mean is averaged with: few-shot means are mostly noise."""
_SCALES = [2.0**-power for power in range(11)]
_PIECE = 4096


def mean_rows(head_rows: Tensor, token_ids: Sequence[Sequence[int]], names: Sequence[str]) -> Tensor:
    """Mean of the output layer's rows of some tokens, for each model those of its name or description.

    A row so begins where the words are that the model would be called by, which tells models apart before training.

    Args:
        head_rows: W_v. Shape (|V|, d).
        token_ids: Of each model's text, at least one.
        names: For messages.

    Returns:
        Shape (M, d), in the type of `head_rows`, at least float32.

    Raises:
        ModelTokenError: A text without tokens, or a number of texts that is not that of names.
    """
    if len(token_ids) != len(names):
        raise ModelTokenError(f"Need token ids for each of {len(names)} models, but got {len(token_ids)}.")
    wide = torch.promote_types(head_rows.dtype, torch.float32)
    rows = torch.empty(len(names), head_rows.shape[1], dtype=wide)
    for number, (ids, name) in enumerate(zip(token_ids, names, strict=True)):
        if not len(ids) or not 0 <= min(ids) <= max(ids) < len(head_rows):
            raise ModelTokenError(
                f"The text of model {name!r} must have tokens from 0 to {len(head_rows) - 1} to begin with, but has "
                f"{list(ids)[:8]}; give it a text, or choose `init: normal`."
            )
        rows[number] = head_rows[torch.tensor(ids, device=head_rows.device)].to(wide).mean(0).cpu()
    return rows


def class_mean_rows(
    source: HiddenSource,
    index: Tensor,
    num_models: int,
    *,
    transform: LogitTransform = PLAIN,
    block_rows: int = 16384,
) -> Tensor:
    """Class means of the hidden states, scaled as a linear discriminant that competes with the words.

    With mu the mean of all hidden states, D_m the difference of model m's mean from it (shrunk by two examples at mu),
    v the mean variance of a hidden unit within a model and L the mean log-sum-exp of the words, the logit of m at h is

        s * (D_m . (h - mu) - |D_m|^2 / 2) / v + L,

    for s = 1 what classes with equal spherical covariance would have. Theirs isn't spherical, so s is the one of 1,
    1/2, 1/4, ... 1/1024 with the least loss. Rows have no bias: its place is taken by the direction of mu, in which
    hidden states vary little. Models without examples begin level with the words.

    Args:
        source: Of hidden states.
        index: Numbers of the examples that are trained on. Shape (n,).
        num_models: M.
        transform, block_rows: See `loss_and_gradient`.

    Returns:
        Shape (M, d).
    """
    first = source(index[:1]).hidden
    sums, counts = first.new_zeros(num_models, first.shape[1]), first.new_zeros(num_models)
    squares, level = first.new_zeros(()), first.new_zeros(())
    for piece in index.split(_PIECE):
        batch = source(piece)
        sums.index_add_(0, batch.labels, batch.hidden)
        counts.index_add_(0, batch.labels, torch.ones_like(batch.word_lse))
        squares, level = squares + (batch.hidden**2).sum(), level + batch.word_lse.sum() / len(index)
    mean = sums.sum(0) / len(index)
    within = squares - (sums**2 / counts.clamp(min=1)[:, None]).sum()
    # With an example per model nothing varies within a model; the overall variance is then as good a guess as any.
    spread = within if bool((counts > 1).any()) else squares - len(index) * (mean**2).sum()
    variance = (spread / (len(index) * len(mean))).clamp(min=torch.finfo(mean.dtype).eps * squares / len(index))
    difference = (sums - counts[:, None] * mean) / (counts + _PSEUDO_EXAMPLES)[:, None]
    bias = -(difference @ mean + (difference**2).sum(1) / 2) / variance
    upward = mean / (mean**2).sum()

    def scaled(scale: float) -> Tensor:
        return scale * (difference / variance + bias[:, None] * upward) + level * upward

    def loss(scale: float) -> float:
        options = {"transform": transform, "block_rows": block_rows}
        return score_rows(scaled(scale), source, index, **options).loss

    return scaled(min(_SCALES, key=loss))
