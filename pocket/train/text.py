"""Captions as denoisers hear them, encoded once by a pipeline's frozen text encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollouts.prompt_encoding import encode_prompts

TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
"""SDXL's size conditions: original height and width, crop, target height and width."""


class TextConditions:
    """Embeddings of captions and of the empty prompt, exactly as the renderer computes them."""

    def __init__(self, pipeline: Any, captions: Sequence[str]):
        distinct = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        texts = list(distinct)
        parts: list[Any] = [
            encode_prompts(pipeline, texts[i : i + 128], [""] * len(texts[i : i + 128]))
            for i in range(0, len(texts), 128)
        ]
        self._row = torch.tensor([distinct[text] for text in captions])
        self._text = torch.cat([part.prompt_embeds for part in parts]).clone()
        self._empty = parts[0].negative_prompt_embeds[:1].clone()
        self._pooled: Tensor | None = None
        self._empty_pooled: Tensor | None = None
        if parts[0].pooled_prompt_embeds is not None:
            self._pooled = torch.cat([part.pooled_prompt_embeds for part in parts]).clone()
            self._empty_pooled = parts[0].negative_pooled_prompt_embeds[:1].clone()

    def rows(self, rows: Tensor, empty: Tensor | bool) -> dict[str, Any]:
        """Arguments of the denoiser for some captions.

        Args:
            rows: Which captions.
            empty: Where the prompt is left empty.
        """
        mask = torch.as_tensor(empty).expand(len(rows)).view(-1, 1, 1)
        text = torch.where(mask, self._empty, self._text[self._row[rows]])
        if self._pooled is None or self._empty_pooled is None:
            return {"encoder_hidden_states": text}
        pooled = torch.where(mask[..., 0], self._empty_pooled, self._pooled[self._row[rows]])
        time_ids = torch.tensor(TIME_IDS).expand(len(rows), -1)
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }
