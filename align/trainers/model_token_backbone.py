"""The frozen part: what the output layer of a language model is given after a prefix, and what it makes of it."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_loss import LogitTransform
from rollouts.responses import MoreInputs

_SCALES = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_PROBE_LENGTHS = (11, 4, 7, 1)
# Of a configuration, what has no influence on hidden states.
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"}


class BackboneOutput(NamedTuple):
    """After each of n prefixes."""

    hidden: Tensor
    """h_{i-1} of ChatGen Eq. 4, exactly what the output layer is given. Shape (n, d), in the model's type."""
    word_lse: Tensor
    """Log-sum-exp of all word logits (nats), float32 (float64 if the model is). Shape (n,)."""
    word_max: Tensor
    """The highest word logit. Shape (n,)."""


class Backbone:
    """A causal language model, one that sees pictures too, frozen, in evaluation mode while it computes.

    Attributes:
        model: As given.
        head: Its output layer.
        transform: What it does with the layer's values.
        window: Tokens of the longest prefix; None: no limit known.
    """

    def __init__(self, model: Any):
        """Measure, on a few tokens, what the model does with logits, and that padded batches change nothing.

        Args:
            model: On its device, not wrapped for training on several processes.

        Raises:
            ModelTokenError: The output layer is no plain linear layer, logits are changed in a way that is not known,
                or what follows a token changes what is computed at it.
        """
        self.model, self.head = model, model.get_output_embeddings()
        if type(self.head) is not nn.Linear:
            raise ModelTokenError(
                f"The output layer of {self._name} is a {type(self.head).__name__}, not a plain linear layer; merge an "
                "adapter into its model first, or load the model without quantization of this layer."
            )
        config = self._text_config()
        self.window: int | None = getattr(config, "max_position_embeddings", None)
        self.transform = self._measure_transform(config)
        self._check_padding()

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer, |V|; ids of tokens must be below."""
        return self.head.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.head.weight.shape[1]

    @torch.no_grad()
    def __call__(self, prefixes: Sequence[Sequence[int]], more_inputs: MoreInputs | None = None) -> BackboneOutput:
        """One forward pass over prefixes of token ids, at least one token each; `more_inputs` gives their pictures."""
        hidden, logits = self._last(prefixes, more_inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return BackboneOutput(hidden, logits.logsumexp(-1), logits.amax(-1))

    def digest(self) -> str:
        """16 hex digits over every weight and the configuration."""
        digest = hashlib.sha256()
        config = _with_effect(self.model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        seen: set[tuple[int, torch.Size]] = set()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            if (weight.data_ptr(), weight.shape) in seen:  # tied
                continue
            seen.add((weight.data_ptr(), weight.shape))
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _text_config(self) -> Any:
        config = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _last(self, prefixes: Sequence[Sequence[int]], more_inputs: MoreInputs | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states and the model's own word logits after each prefix: (n, d) and (n, |V|)."""
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        width = int(lengths.max())
        # Padded on the right, where a causal model can't see it, and so without a mask, which would only cost time.
        # By the last token, as some models warn of their pad token.
        ids = torch.tensor([[*prefix, *[prefix[-1]] * (width - len(prefix))] for prefix in prefixes])
        captured: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            last = hidden[torch.arange(len(hidden), device=hidden.device), (lengths - 1).to(hidden.device)]
            captured.append(last)
            return F.linear(last, self.head.weight, self.head.bias)[:, None]

        ids = ids.to(self.model.get_input_embeddings().weight.device)
        inputs = more_inputs(range(len(prefixes)), ids) if more_inputs else {}
        logits = self._forward(ids, head, inputs)
        return captured[-1], logits[:, 0]

    def _forward(self, ids: Tensor, head: Any = None, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The model's logits, with another function in the place of its output layer."""
        device = self.model.get_input_embeddings().weight.device
        training = self.model.training
        self.model.eval()
        try:
            with _replaced(self.head, head):
                return self.model(input_ids=ids.to(device), use_cache=False, **(inputs or {})).logits
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _measure_transform(self, config: Any) -> LogitTransform:
        """Let the model transform a ramp of values, and find which transformation this is."""
        weight = self.head.weight
        ramp = torch.linspace(-60, 60, self.vocabulary, device=weight.device, dtype=weight.dtype)
        ramp = torch.stack([ramp, ramp.flip(0)])[:, None]
        found = self._forward(torch.zeros(2, 1, dtype=torch.long), lambda _: ramp)
        exact = weight.dtype in (torch.float32, torch.float64)
        for transform in _known_transforms(config):
            expected = transform(ramp.double())
            tolerance = (1e-5 if exact else 0.02) * float(expected.abs().max())
            if found.shape == expected.shape and float((found - expected).abs().max()) <= tolerance:
                return transform
        raise ModelTokenError(
            f"{self._name} changes its logits after the output layer in a way that is not known here (known are a "
            f"scale, {', '.join((*_SCALES, *_DIVISORS))}, and a cap, {', '.join(_CAPS)}); model tokens trained without "
            "it would have other probabilities. Choose another model."
        )

    @torch.no_grad()
    def _check_padding(self) -> None:
        """A padded batch must give what each prefix gives alone, with the output layer as it is."""
        lengths = [min(length, self.window or length) for length in _PROBE_LENGTHS]
        prefixes = [[(7919 * (i + 3 * n + 1)) % self.vocabulary for i in range(k)] for n, k in enumerate(lengths)]
        _, found = self._last(prefixes)
        expected = torch.stack([self._forward(torch.tensor([prefix]))[0, -1] for prefix in prefixes])
        exact = expected.dtype in (torch.float32, torch.float64) and self.head.weight.dtype.itemsize >= 4
        difference = float((found - expected).abs().max())
        # TF32 and half precision round differently in batches of another shape; wrong hidden states differ by more.
        tolerance = (2e-3 if exact else 0.1) * max(1.0, float(expected.abs().max()))
        if not difference <= tolerance:
            raise ModelTokenError(
                f"{self._name} gives other logits in a batch padded on the right (by {difference:.2g}) than for each "
                "prefix alone, or NaN; it is no causal model, or its weights are damaged. Choose another model."
            )


@contextmanager
def _replaced(head: nn.Module, forward: Any) -> Generator[None]:
    """`forward` in the place of a layer's own, inside of whatever wraps its call."""
    if forward is None:
        yield
        return
    plain = head.__dict__.get("forward")  # wrappers may have put one there
    head.forward = forward
    try:
        yield
    finally:
        if plain is None:
            del head.forward
        else:
            head.forward = plain


def _with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration hidden states depend on; also of the parts of a model that sees."""
    return {
        key: _with_effect(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _WITHOUT_EFFECT and (key == "image_token_id" or not str(key).endswith("_token_id"))
    }


def _known_transforms(config: Any) -> list[LogitTransform]:
    scales = {1.0} | {float(getattr(config, key)) for key in _SCALES if getattr(config, key, None)}
    scales |= {1 / float(getattr(config, key)) for key in _DIVISORS if getattr(config, key, None)}
    caps = [None, *(float(getattr(config, key)) for key in _CAPS if getattr(config, key, None))]
    return [LogitTransform(scale, cap) for scale, cap in product(sorted(scales), caps)]
