"""Log-probabilities of a batch's response tokens under a policy, in the cheapest way that is exact for it."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.trainers.layouts import Batch, PackedLayout, PaddedLayout, tree_mask
from align.trainers.linear_logps import linear_logps

logger = logging.getLogger(__name__)

_PROMPT = 5
# Share, branch, and end inside each other's range. Last tokens are no inputs, so the tokens before them must branch.
_RESPONSES = ((3, 4, 5, 0), (3, 4, 6, 7, 1), (3, 8, 2), (9, 10))


class Way(NamedTuple):
    """How log-probabilities are computed.

    Attributes:
        packed: Candidates share one row (`PackedLayout`), or have one each.
        fused_head: Only the logits that are needed are formed, a chunk at a time.
        reason: Why it is not the cheapest way; empty if it is.
    """

    packed: bool
    fused_head: bool
    reason: str = ""


def token_logps(model: nn.Module, batch: Batch, way: Way, *, inner: nn.Module | None = None) -> Tensor:
    """Log-probability (nats, float32) of every response token of a batch. Shape (prompts, candidates, tokens).

    Places that `batch["mask"]` excludes hold some other token's value.

    Args:
        model: A causal language model, wrapped for training in whatever way.
        batch: From the layout that `way` says.
        way: See `choose_way`.
        inner: The model without its wrapping; None: `model` itself.
    """
    inner = model if inner is None else inner
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    inputs["attention_mask"] = _tree_attention(inner, batch) if way.packed else batch["attention_mask"]
    if way.fused_head:
        with _fused_head(inner, batch):
            values = model(**inputs).logits
    else:
        logits = model(**inputs).logits.flatten(0, 1)[batch["heads"]]
        values = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        values = values[batch["edge_heads"], batch["edge_tokens"]]
    return values[batch["paths"]]


@torch.no_grad()
def choose_way(model: nn.Module, *, packing: bool = True, longest: int = 0, inner: nn.Module | None = None) -> Way:
    """The cheapest way that gives this model's own log-probabilities; says in the log why, if it isn't the cheapest.

    What a configuration tells (attention that takes no tree mask, windows shorter than the data) is read from it.
    Everything else is measured: a few tokens in a small trie are scored in each way, and beside the model's plain
    output for every sequence alone. That finds recurrent layers, position biases that ignore position ids, and heads
    whose output is changed afterwards.

    Args:
        model: On its device. Under ZeRO-3 it must be wrapped, and every process must call this.
        packing: False: never pack.
        longest: Tokens of the longest sequence there will be.
        inner: The model without its wrapping; None: `model` itself.
    """
    inner = model if inner is None else inner
    training = model.training
    model.eval()
    try:
        reason = _no_packing(inner, longest) if packing else "`packing` is off"
        expected = _plain(model, inner)
        tolerance = _tolerance(model, inner, expected)
        ways = [Way(packed, fused) for packed in ((True, False) if not reason else (False,)) for fused in (True, False)]
        for way in ways:
            problem = _problem(model, inner, way, expected, tolerance)
            if not problem:
                break
            reason = f"{reason}; {_name(way)} {problem}".lstrip("; ")
        else:
            way = ways[-1]
    finally:
        model.train(training)
    chosen = way._replace(reason=reason)
    if reason:
        logger.warning("log-probabilities are computed %s, because %s", _name(chosen), reason)
    return chosen


def _name(way: Way) -> str:
    head = "with the head in chunks" if way.fused_head else "with all logits"
    return f"{'packed' if way.packed else 'padded'} {head}"


def _no_packing(model: nn.Module, longest: int) -> str:
    """What a configuration says against tree masks."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = getattr(text, "_attn_implementation", None) or "eager"
    if attention not in ("eager", "sdpa"):
        return f"the attention implementation {attention} takes no tree mask (set attn_implementation: sdpa)"
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if window and getattr(text, "use_sliding_window", True) and longest > window:
        return f"sequences of {longest} tokens are longer than the attention window of {window}"
    return ""


def _problem(model: nn.Module, inner: nn.Module, way: Way, expected: Tensor, tolerance: float) -> str:
    try:
        difference = _difference(model, inner, way, expected)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"fails ({' '.join(str(error).split())[:100]})"
    return "" if difference <= tolerance else f"is off by {difference:.2g}"  # NaN is a problem, too


def _difference(model: nn.Module, inner: nn.Module, way: Way, expected: Tensor) -> float:
    batch = _probe(inner, packed=way.packed)
    found = token_logps(model, batch, way, inner=inner)
    return float((found - expected).masked_fill(~batch["mask"], 0.0).abs().max())


def _probe(model: nn.Module, *, packed: bool) -> Batch:
    config: Any = model.config
    vocabulary = (config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size
    # Tokens far apart, so that a wrong context shows.
    numbers = [(7919 * (i + 1)) % vocabulary for i in range(16)]
    row = {
        "prompt_ids": numbers[-_PROMPT:],
        "responses": [[numbers[i] for i in response] for response in _RESPONSES],
        "rewards": [0.0] * len(_RESPONSES),
    }
    layout = (PackedLayout if packed else PaddedLayout)(0, len(_RESPONSES))
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in layout([row]).items()}


def _plain(model: nn.Module, inner: nn.Module) -> Tensor:
    """Log-probabilities of the probe, every sequence alone and nothing but the tokens given to the model."""
    batch = _probe(inner, packed=False)
    rows = []
    for number, response in enumerate(_RESPONSES):
        length = _PROMPT + len(response) - 1
        logits = model(input_ids=batch["input_ids"][number : number + 1, :length], use_cache=False).logits[0]
        logps = logits[_PROMPT - 1 :].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        tokens = batch["edge_tokens"][batch["paths"][0, number, : len(response)]]
        rows.append(logps.gather(1, tokens[:, None])[:, 0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)[None]


def _tolerance(model: nn.Module, inner: nn.Module, expected: Tensor) -> float:
    """How much of a difference is rounding: a wrong context differs by more, if only a little in untrained models."""
    scale = max(1.0, float(expected.abs().max()))
    coarse = 0.03 * scale
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        return coarse
    # TF32 rounds float32 far more coarsely, which shows between ordinary batches of different shapes.
    rounding = _difference(model, inner, Way(packed=False, fused_head=False), expected)
    return min(max(2e-5 * scale, 8 * rounding), coarse)


def _tree_attention(model: Any, batch: Batch) -> Tensor:
    mask = tree_mask(batch["subtree_end"])
    if (getattr(model.config, "_attn_implementation", None) or "eager") == "sdpa":
        return mask
    # Eager attention adds its mask to the scores.
    dtype = model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@contextmanager
def _fused_head(model: Any, batch: Batch) -> Generator[None]:
    """Make the output layer return the log-probabilities of the batch's edges instead of logits.

    Inside the layer's own call, so that whatever gathers its weights for it (ZeRO-3, FSDP) has done so.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(f"the output layer is a {type(head).__name__}, not a plain linear layer")

    def forward(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, 1)[batch["heads"]]
        return linear_logps(chosen, head.weight, head.bias, batch["edge_heads"], batch["edge_tokens"])

    plain = head.__dict__.get("forward")  # wrappers may have put one there
    head.forward = forward
    try:
        yield
    finally:
        if plain is None:
            del head.forward
        else:
            head.forward = plain
