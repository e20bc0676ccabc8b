"""Model tokens as part of an ordinary model folder: a longer output layer, and a tokenizer with a token per model."""

import copy
import re
import unicodedata
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_loss import LogitTransform

# Printable ASCII: byte-level decoders take accented letters of an added token for bytes.
_UNSAFE = re.compile(r"[^!-;=?-{}~]+")


def token_names(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """A token for each model, `<|model:NAME|>`, in characters that every tokenizer gives back.

    Accents are dropped, other characters become `_`; equal tokens get a number. They are for people to read: which
    model a token means is in model_tokens.json.

    Args:
        names: Of models.
        taken: Tokens that there are.
    """
    used, tokens = set(taken), []
    for name in names:
        plain = unicodedata.normalize("NFKD", name)
        plain = "".join(character for character in plain if not unicodedata.combining(character))
        plain = _UNSAFE.sub("_", plain).strip("_") or "_"
        token, number = f"<|model:{plain}|>", 1
        while token in used:
            number += 1
            token = f"<|model:{plain}~{number}|>"
        used.add(token)
        tokens.append(token)
    return tokens


def export_model(
    names: Sequence[str],
    rows: Tensor,
    transform: LogitTransform,
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    untie: bool = False,
) -> tuple[list[str], int]:
    """Save a copy of a model whose output layer is [W_v; W_M] (ChatGen Eq. 4), and its tokenizer or processor.

    Every weight that was there stays as it is, bit by bit. New rows are rounded to the model's type; a bias of the
    output layer is 0 for them. Input embeddings of the new tokens are the means of those of their names' tokens; where
    the output layer is the input embedding, they are the new rows, unless it is untied.

    Ids from the tokenizer's length up to the output layer's (some models have padding rows there) get reserved tokens
    that nothing means, so that model tokens come after all old rows.

    Args:
        names, rows, transform: Of `ModelTokens`.
        model, tokenizer, folder, untie: See `ModelTokens.export`.

    Returns:
        Token of each model, and the id of the first one.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelTokenError(f"`model` must be a model of transformers, but is a {type(model).__name__}; merge first.")
    backbone = Backbone(model)
    if rows.shape[1] != backbone.hidden_size or transform != backbone.transform:
        raise ModelTokenError(
            f"The rows are for hidden states of {rows.shape[1]} and {transform}, but the model has "
            f"{backbone.hidden_size} and {backbone.transform}; export with the backbone they were trained on."
        )
    processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
    if processor is not None:
        tokenizer = cast(Any, processor).tokenizer
    longer, tokens = _longer_tokenizer(tokenizer, names, backbone.vocabulary)
    exported = _longer_model(model, rows, untie, [_name_ids(tokenizer, name) for name in names])
    exported.save_pretrained(folder)
    if processor is not None:
        processor = copy.copy(processor)
        cast(Any, processor).tokenizer = longer
        processor.save_pretrained(folder)  # with the tokenizer
    else:
        longer.save_pretrained(folder)
    return tokens, backbone.vocabulary


def _longer_tokenizer(tokenizer: Any, names: Sequence[str], first_id: int) -> tuple[Any, list[str]]:
    if len(tokenizer) > first_id:
        raise ModelTokenError(
            f"The tokenizer has {len(tokenizer)} tokens, but the output layer only {first_id} rows; call "
            "`model.resize_token_embeddings(len(tokenizer))` before training, or use the model's own tokenizer."
        )
    longer, taken = copy.deepcopy(tokenizer), set(tokenizer.get_vocab())
    reserved = [f"<|reserved:{number}|>" for number in range(len(tokenizer), first_id)]
    tokens = token_names(names, taken | set(reserved))
    # Special, so that `split_special_tokens=True` keeps users' text from containing them.
    added = [AddedToken(token, special=True, normalized=False) for token in (*reserved, *tokens)]
    longer.add_tokens(added, special_tokens=True)
    found = longer.convert_tokens_to_ids(tokens)
    if found != list(range(first_id, first_id + len(tokens))):
        raise ModelTokenError(
            f"The tokenizer gave the model tokens ids from {found[0]} to {found[-1]} instead of from {first_id} on: "
            "its own ids have gaps. Use another tokenizer of this model."
        )
    return longer, tokens


def _name_ids(tokenizer: Any, name: str) -> list[int]:
    return tokenizer(name, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _longer_model(model: PreTrainedModel, rows: Tensor, untie: bool, name_ids: Sequence[Sequence[int]]) -> Any:
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    size = len(head.weight)
    if len(embedding.weight) != size:
        raise ModelTokenError(f"The input embedding has {len(embedding.weight)} rows, the output layer {size}; resize.")
    # Only these two are copied: `resize_token_embeddings` changes them in place.
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for tensor in (embedding.weight, head.weight, head.bias):
        shared.pop(id(tensor), None)
    longer: Any = copy.deepcopy(model, shared)
    with torch.random.fork_rng(devices=[]):
        longer.resize_token_embeddings(size + len(rows), mean_resizing=False)
    tied = longer.get_output_embeddings().weight is longer.get_input_embeddings().weight
    if tied and untie:
        longer.get_output_embeddings().weight = nn.Parameter(longer.get_input_embeddings().weight.clone())
        longer.config.tie_word_embeddings = False
        longer.config.get_text_config().tie_word_embeddings = False
    table: Any = longer.get_input_embeddings().weight
    for number, ids in enumerate(name_ids):
        place = torch.tensor(ids, device=table.device)
        table[size + number] = table[place].mean(0) if len(ids) else table[:size].mean(0)
    # Last: where the two are one, the output row counts.
    output: Any = longer.get_output_embeddings()
    output.weight[size:] = rows.to(output.weight)
    if output.bias is not None:
        output.bias[size:] = 0
    return longer
