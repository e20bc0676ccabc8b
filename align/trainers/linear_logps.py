"""Log-probabilities of chosen tokens straight from hidden states, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**26
"""Logits in memory at once: 256 MB in float32."""


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    edge_heads: Tensor,
    edge_tokens: Tensor,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Log-softmax of `hidden @ weight.T + bias`, read at some (row, token) pairs; differentiable.

    Rows are handled in chunks, forward and backward; where there are several, the backward pass computes their logits
    once more. The softmax is float32 whatever the inputs are, and so is the sum of the weight's gradient over chunks.

    Args:
        hidden: Shape (H, d).
        weight: Shape (V, d).
        bias: Shape (V,) or None.
        edge_heads: Row of each pair, ascending. Shape (E,).
        edge_tokens: Token of each pair. Shape (E,).
        chunk_elements: Upper bound of rows x vocabulary in memory at once (at least one row).

    Returns:
        float32 (E,); float64 if `hidden` is.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    # Off: it has ended by the time of the backward pass, which must form the same logits again.
    with torch.autocast(device, enabled=False):
        device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # The backward pass runs outside of autocast and has to compute the same logits.
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _LinearLogps.apply(hidden, weight, bias, edge_heads, edge_tokens, chunk_elements)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        edge_heads: Tensor,
        edge_tokens: Tensor,
        chunk_elements: int,
    ) -> Tensor:
        rows = max(1, chunk_elements // weight.shape[0])
        ctx.chunks = _chunks(edge_heads, len(hidden), rows)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        normalisers = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        logps = torch.empty(len(edge_heads), dtype=wide, device=hidden.device)
        layer = _narrow(hidden, weight, bias)
        logits = None
        for (start, stop), (first, last) in ctx.chunks:
            logits = _logits(hidden[start:stop], *layer)
            normalisers[start:stop] = logits.logsumexp(-1)
            own = edge_heads[first:last]
            logps[first:last] = logits[own - start, edge_tokens[first:last]] - normalisers[own]
        # One chunk is within the budget anyway: kept, it need not be computed again.
        ctx.kept = logits if len(ctx.chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, edge_heads, edge_tokens, normalisers)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, bias, edge_heads, edge_tokens, normalisers = ctx.saved_tensors
        # It is overwritten, so a second backward pass has to form it again.
        kept, ctx.kept = ctx.kept, None
        layer = _narrow(hidden, weight, bias)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=grad.dtype) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=grad.dtype) if needs_bias else None
        for (start, stop), (first, last) in ctx.chunks:
            logits = kept if kept is not None else _logits(hidden[start:stop], *layer)
            own, given = edge_heads[first:last] - start, grad[first:last]
            # d logp / d logit = [token] - softmax
            total = torch.zeros(stop - start, dtype=grad.dtype, device=grad.device).index_add_(0, own, given)
            of_logits = logits.sub_(normalisers[start:stop, None]).exp_().mul_(-total[:, None])
            of_logits.index_put_((own, edge_tokens[first:last]), given, accumulate=True)
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            narrow = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(narrow, layer[0], out=of_hidden[start:stop])
            if of_weight is not None:
                _add_product(of_weight, narrow.T, hidden[start:stop])
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _narrow(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The layer in the precision of its input."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunks(edge_heads: Tensor, num_rows: int, rows: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(Rows from, to), (edges from, to) of each chunk."""
    starts = list(range(0, num_rows, rows))
    bounds = torch.searchsorted(edge_heads, torch.tensor([*starts, num_rows], device=edge_heads.device)).tolist()
    return [((start, min(start + rows, num_rows)), (bounds[i], bounds[i + 1])) for i, start in enumerate(starts)]
