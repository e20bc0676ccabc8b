"""Prompts of any length and A1111's weights, as embeddings for diffusers' Stable Diffusion pipelines.

As A1111 does it: the prompt's tokens are cut into chunks of 75 (what the text encoder takes beside start and end; at
the last comma, if it is near), every chunk goes through the text encoder by itself, the embeddings are multiplied by
the weights of their tokens and scaled back to their mean, and stand one behind the other. The negative prompt gets as
many chunks. A short prompt without weights is encoded exactly as diffusers itself does; SDXL gets zeros for an empty
negative prompt, as in both.

Differs from A1111: the mean is restored per prompt. A1111 does it over the batch, so that its pictures depend on what
else is drawn at the same time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollouts.prompt_attention import Weighted, parse_attention

NEAR_COMMA = 20
"""A full chunk is cut at its last comma if at most this many tokens follow it (A1111's default)."""


class Chunk(NamedTuple):
    """Tokens of one pass of the text encoder, without start and end."""

    token_ids: list[int]
    weights: list[float]


class PromptEmbeddings(NamedTuple):
    """What a pipeline's call takes."""

    prompt_embeds: Tensor
    """(images, tokens, width)"""
    negative_prompt_embeds: Tensor
    """As `prompt_embeds`, equally long."""
    pooled_prompt_embeds: Tensor | None
    """SDXL only: (images, width)."""
    negative_pooled_prompt_embeds: Tensor | None

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of the pipeline."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@torch.inference_mode()
def encode_prompts(
    pipeline: Any, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int = 1
) -> PromptEmbeddings:
    """Embed prompts and negative prompts for a StableDiffusionPipeline or StableDiffusionXLPipeline.

    Args:
        pipeline: Its tokenizers and text encoders are used.
        prompts: In A1111's notation; all of one batch get equally many chunks.
        negative_prompts: As many.
        clip_skip: As A1111 counts: 1 is the last layer, 2 the last but one. SDXL always takes its last but one.

    Raises:
        ValueError: Numbers that differ, or more layers skipped than there are.
    """
    if len(prompts) != len(negative_prompts):
        raise ValueError(f"Need one negative prompt per prompt, but got {len(prompts)} and {len(negative_prompts)}.")
    second = getattr(pipeline, "text_encoder_2", None)
    towers = [(pipeline.tokenizer, pipeline.text_encoder)]
    towers += [(pipeline.tokenizer_2, second)] if second is not None else []
    texts = [*prompts, *negative_prompts]
    distinct = list(dict.fromkeys(texts))  # k images of a prompt need it encoded once
    parts, pooled = [], None
    for tokenizer, encoder in towers:
        chunked = [chunks_of(parse_attention(text), tokenizer) for text in distinct]
        most = max(map(len, chunked))
        padded = [chunks + [Chunk([], [])] * (most - len(chunks)) for chunks in chunked]
        embedded = [
            _encode([row[index] for row in padded], tokenizer, encoder, clip_skip, xl=second is not None)
            for index in range(most)
        ]
        parts.append(torch.cat([embeddings for embeddings, _ in embedded], 1))
        pooled = embedded[0][1]
    row_of = {text: row for row, text in enumerate(distinct)}
    rows = [row_of[text] for text in texts]
    n = len(prompts)
    embeddings = torch.cat(_equally_long(parts), -1)[rows]
    if second is None or pooled is None:
        return PromptEmbeddings(embeddings[:n], embeddings[n:], None, None)
    negative, negative_pooled = embeddings[n:], pooled[rows][n:]
    if pipeline.config.force_zeros_for_empty_prompt:
        for row, text in enumerate(negative_prompts):
            if not text:
                negative[row], negative_pooled[row] = 0, 0
    return PromptEmbeddings(embeddings[:n], negative, pooled[rows][:n], negative_pooled)


def chunks_of(sections: Sequence[Sequence[Weighted]], tokenizer: Any) -> list[Chunk]:
    """Cut the tokens of a parsed prompt into chunks of at most 75 (CLIP's); a new section begins a new chunk."""
    longest = chunk_length(tokenizer)
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[Chunk] = []
    for section in sections:
        token_ids, weights = [], []
        for piece in section:
            ids = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
            token_ids += ids
            weights += [piece.weight] * len(ids)
        start = 0
        while start < len(token_ids) or start == 0:
            end = min(start + longest, len(token_ids))
            if end < len(token_ids) and token_ids[end] != comma:
                commas = [i for i in range(max(start, end - NEAR_COMMA), end) if token_ids[i] == comma]
                end = commas[-1] + 1 if commas else end
            chunks.append(Chunk(token_ids[start:end], weights[start:end]))
            if end == len(token_ids):
                break
            start = end
    return chunks


def chunk_length(tokenizer: Any) -> int:
    """Tokens that a text encoder takes beside start and end: 75 for CLIP."""
    return min(tokenizer.model_max_length, 77) - 2


def _encode(
    chunks: Sequence[Chunk], tokenizer: Any, encoder: Any, clip_skip: int, *, xl: bool
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (prompts, 77, width) of one chunk of each prompt, weighted, and the pooled ones if there are any."""
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    longest = chunk_length(tokenizer)
    rows = [[start, *chunk.token_ids, end] + [pad] * (longest - len(chunk.token_ids)) for chunk in chunks]
    token_ids = torch.tensor(rows, device=encoder.device)
    output = encoder(token_ids, output_hidden_states=True)
    layers = output.hidden_states
    skip = 2 if xl else clip_skip
    if not 1 <= skip < len(layers):
        raise ValueError(f"`clip_skip` must be from 1 to {len(layers) - 1} for this text encoder, but got {clip_skip}.")
    if xl:
        embeddings = layers[-2]
    elif skip == 1:
        embeddings = output.last_hidden_state
    else:
        embeddings = _final_layer_norm(encoder)(layers[-skip])
    pooled = getattr(output, "text_embeds", None)
    if all(weight == 1 for chunk in chunks for weight in chunk.weights):
        return embeddings, pooled
    weights = torch.ones(token_ids.shape, dtype=embeddings.dtype, device=embeddings.device)
    for row, chunk in enumerate(chunks):
        weights[row, 1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, dtype=weights.dtype)
    weighted = embeddings * weights[..., None]
    before, after = (part.float().mean((1, 2), keepdim=True) for part in (embeddings, weighted))
    scale = torch.where(after == 0, torch.ones_like(after), before / after)
    changed = (weights != 1).any(1)[:, None, None]
    return torch.where(changed, weighted * scale.to(weighted.dtype), embeddings), pooled


def _final_layer_norm(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).final_layer_norm


def _equally_long(parts: list[Tensor]) -> list[Tensor]:
    """SDXL's tokenizers cut alike; should one need more chunks, the other's embeddings are padded with zeros."""
    longest = max(part.shape[1] for part in parts)
    return [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
