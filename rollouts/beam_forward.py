"""Forward passes of beam search: the beams of a prompt share its KV cache.

In `SharedCache` a prompt is one row. A step feeds its beams as so many query positions of that row and appends their
keys to the row's cache; an attention mask built from each beam's ancestry lets it see its own history only. Nothing is
repeated or reordered. That is exact where a token's influence depends only on what may be seen and on the position
ids. For other models (ALiBi, a sliding window that is too short, recurrent state) there is `ExpandedCache`, a row for
each beam, reordered at every step.
"""

import inspect
import logging
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

logger = logging.getLogger(__name__)


class BeamForward(Protocol):
    """What a search needs of a model."""

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read left-padded prompts; the logits after each. Shape (prompts, vocabulary)."""
        ...

    def step(self, rows: Tensor, parents: Tensor, tokens: Tensor, is_open: Tensor) -> Tensor:
        """Read one more token of every beam.

        Args:
            rows: Which of the prompts of the last call go on. Shape (rows,).
            parents: Which beam of the last call each continues. Shape (rows, beams).
            tokens: With what. Shape (rows, beams).
            is_open: Beams whose logits are needed. Shape (rows, beams).

        Returns:
            Logits; arbitrary for the others. Shape (rows, beams, vocabulary).
        """
        ...


class SharedCache:
    """One row and one cache for all beams of a prompt."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._options = _cache_options(model)
        self._additive = _attention_of(unwrapped(model)) != "sdpa"

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `BeamForward`."""
        # No configuration: layers with a sliding window keep everything too, and the mask decides.
        self._cache = DynamicCache()
        self._visible = attention_mask.bool()[:, None]  # (prompts, beams or 1, cached): each beam's own history
        self._positions = attention_mask.sum(1, keepdim=True)  # (prompts, 1): of the next token
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask if attention_mask.all() else self._mask(_causal(attention_mask)),
            position_ids=_positions(attention_mask),
            past_key_values=self._cache,
            **self._options,
        )
        _check_cache(self._cache, input_ids.shape[1])
        return output.logits[:, -1]

    def step(self, rows: Tensor, parents: Tensor, tokens: Tensor, is_open: Tensor) -> Tensor:
        """See `BeamForward`."""
        if len(rows) < len(self._visible):
            self._cache.batch_select_indices(rows)
            self._visible, self._positions = self._visible[rows], self._positions[rows]
        if self._visible.shape[1] == 1:
            history = self._visible.expand(-1, parents.shape[1], -1)
        else:
            history = self._visible.gather(1, parents[:, :, None].expand(-1, -1, self._visible.shape[2]))
        # Query positions are the beams still open, those of the row with most of them; the order among them is kept.
        order = (~is_open).byte().argsort(dim=1, stable=True)[:, : int(is_open.sum(1).max())]
        own_slot = order[:, None] == torch.arange(parents.shape[1], device=order.device)[:, None]
        self._visible = torch.cat([history, own_slot], dim=2)
        queries = self._visible.gather(1, order[:, :, None].expand(-1, -1, self._visible.shape[2]))
        logits = self._model(
            input_ids=tokens.gather(1, order),
            attention_mask=self._mask(queries),
            position_ids=self._positions.expand_as(order),
            past_key_values=self._cache,
            **(self._options | {"logits_to_keep": 0} if "logits_to_keep" in self._options else self._options),
        ).logits
        self._positions = self._positions + 1
        if is_open.all():
            return logits
        result = logits.new_zeros(*parents.shape, logits.shape[-1])
        return result.scatter_(1, order[:, :, None].expand_as(logits), logits)

    def _mask(self, visible: Tensor) -> Tensor:
        visible = visible[:, None]  # one for all heads
        if not self._additive:
            return visible
        dtype = unwrapped(self._model).dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class ExpandedCache:
    """A row for each beam, as in transformers' own beam search; the prompt is still read once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._options = _cache_options(model)
        parameters = inspect.signature(unwrapped(model).forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `BeamForward`."""
        self._mask = attention_mask  # (cached rows, read tokens)
        output = self._forward(input_ids, _positions(attention_mask), None)
        self._cache: Any = getattr(output, self._cache_name, None)
        if not hasattr(self._cache, "reorder_cache"):
            raise ValueError(
                f"`model` ({type(self._model).__name__}) returns no cache that can be reordered. Call model.eval() if "
                "it is in training mode (gradient checkpointing keeps no cache); otherwise its kind is not supported."
            )
        self._slots = torch.arange(len(input_ids), device=input_ids.device)[:, None]  # (prompts, beams or 1)
        return output.logits[:, -1]

    def step(self, rows: Tensor, parents: Tensor, tokens: Tensor, is_open: Tensor) -> Tensor:
        """See `BeamForward`."""
        slots = self._slots[rows]
        slots = slots.expand_as(parents) if slots.shape[1] == 1 else slots.gather(1, parents)
        source = slots[is_open]  # (open beams,)
        self._cache.reorder_cache(source)
        self._mask = torch.cat([self._mask[source], self._mask.new_ones(len(source), 1)], dim=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        logits = self._forward(tokens[is_open][:, None], positions, self._cache).logits[:, -1]
        self._slots = torch.zeros_like(parents)
        self._slots[is_open] = torch.arange(len(source), device=source.device)
        result = logits.new_zeros(*parents.shape, logits.shape[-1])
        result[is_open] = logits
        return result

    def _forward(self, input_ids: Tensor, position_ids: Tensor, cache: Any) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": self._mask, self._cache_name: cache}
        if self._takes_positions:
            inputs["position_ids"] = position_ids
        if cache is not None and self._cache_name == "cache_params":
            del inputs["attention_mask"]  # a recurrent state has left the padding behind
        return self._model(**inputs, **self._options)


def beam_forward(model: Any, length: int) -> BeamForward:
    """The way to run this model; says once why the cache can't be shared, if so.

    Args:
        model: A causal language model, possibly wrapped (PEFT, DeepSpeed, FSDP).
        length: Most positions a sequence can have, prompt included.
    """
    # First of all, so that it does not depend on `length`: processes that share a model must call it equally often.
    reason = why_not_shared(model, length)
    if reason is None:
        return SharedCache(model)
    _say_once(unwrapped(model), f"every beam gets a cache of its own, because {reason}")
    return ExpandedCache(model)


def why_not_shared(model: Any, length: int) -> str | None:
    """Why masks and position ids alone can't say what a token of this model sees, or `None` if they can.

    Args:
        model: A causal language model, possibly wrapped.
        length: Most positions a sequence can have.
    """
    tried = _why_not_shared(model)
    return _short_window(unwrapped(model), length) or tried


def logits_option(model: Any) -> str | None:
    """The name of the option that says for how many of the last positions logits are wanted, if the model has one."""
    return "logits_to_keep" if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters else None


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's and distributed wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module"):
            model = model.module
        else:
            return model


_REASONS: "weakref.WeakKeyDictionary[Any, dict[str, str | None]]" = weakref.WeakKeyDictionary()
_SAID: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def _why_not_shared(model: Any) -> str | None:
    """Why beams can't share a cache whatever the lengths, or `None`; found out once per model."""
    inner = unwrapped(model)
    attention = _attention_of(inner)
    known = _REASONS.setdefault(inner, {})
    if attention not in known:
        known[attention] = _unsuitable(inner, attention) or _differs(model)
    return known[attention]


def _unsuitable(model: Any, attention: str) -> str | None:
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of its own per query"
    parameters = inspect.signature(model.forward).parameters
    for name in ("position_ids", "past_key_values"):
        if name not in parameters:
            return f"its forward takes no `{name}`"
    return other_state(model)


def other_state(model: Any) -> str | None:
    """What a model keeps besides keys and values, as the end of a sentence, or `None`."""
    for layer in DynamicCache(config=unwrapped(model).config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it keeps other state than keys and values ({type(layer).__name__})"
    return None


def _short_window(model: Any, length: int) -> str | None:
    for layer in DynamicCache(config=model.config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window < length:
            return f"its attention window of {layer.sliding_window} tokens is shorter than prompt and response"
    return None


@torch.no_grad()
def _differs(model: Any) -> str | None:
    """Try it: two beams of a padded prompt in one row beside their two sequences, read in one go without a cache."""
    device = next(model.parameters()).device
    vocabulary = unwrapped(model).config.get_text_config(decoder=True).vocab_size
    prompt = (torch.arange(5, device=device) * 7 + 3) % vocabulary
    first, second = (torch.tensor([ids], device=device) % vocabulary for ids in ((5, 11), (13, 2)))
    padded = torch.cat([prompt[:1], prompt])[None]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]], device=device)
    swap, both = torch.tensor([[1, 0]], device=device), torch.ones(1, 2, dtype=torch.bool, device=device)
    row = torch.zeros(1, dtype=torch.long, device=device)
    try:
        forward = SharedCache(model)
        forward.start(padded, mask)
        forward.step(row, torch.zeros_like(swap), first, both)
        found = forward.step(row, swap, second, both)[0].double()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        return f"its forward refuses the mask ({type(error).__name__}: {error})"
    # Each continues the other's first token.
    whole = torch.cat([prompt.expand(2, -1), first[0][swap[0]][:, None], second[0][:, None]], dim=1)
    wanted = model(input_ids=whole, use_cache=False).logits[:, -1].double()
    error = ((found - wanted).norm() / (wanted - wanted.mean()).norm()).item()
    exact = unwrapped(model).dtype in (torch.float32, torch.float64)
    if error <= (1e-3 if exact else 0.1):  # also false for NaN
        return None
    return f"its logits come out differently in one row ({error:.1%})"


def _say_once(model: Any, reason: str) -> None:
    said = _SAID.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        logger.info("%s: %s", type(model).__name__, reason)


def _attention_of(model: Any) -> str:
    return getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None) or "eager"


def _cache_options(model: Any) -> dict[str, Any]:
    option = logits_option(model)
    return {"use_cache": True} | ({option: 1} if option else {})


def _causal(attention_mask: Tensor) -> Tensor:
    """What each position sees; padding sees itself, as seeing nothing can give NaN. Shape (prompts, tokens, tokens)."""
    itself = torch.eye(attention_mask.shape[1], dtype=torch.bool, device=attention_mask.device)
    return (attention_mask.bool()[:, None] & torch.ones_like(itself).tril()) | itself


def _positions(attention_mask: Tensor) -> Tensor:
    """Position of every token, counted without padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _check_cache(cache: DynamicCache, length: int) -> None:
    if cache.get_seq_length() != length:
        raise ValueError(
            f"`model` kept {cache.get_seq_length()} of {length} prompt tokens in its cache. Call model.eval(): with "
            "gradient checkpointing a model in training mode keeps no cache."
        )
