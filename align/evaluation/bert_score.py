"""BERTScore (Zhang et al. 2020, https://arxiv.org/abs/1904.09675): how alike two texts are, token by token.

With unit-length token embeddings x_i of the candidate and y_j of the reference, P = mean_i max_j <x_i, y_j>,
R = mean_j max_i <x_i, y_j> and F1 = 2PR / (P + R). Scores are those of the package `bert-score` 0.3.13 without idf
weights: texts are stripped and cut to the encoder's window; [CLS] and [SEP] can be matched but are not averaged over; a
text without any other token scores 0 with everything. What differs:

- The package pads a batch with zeros that take part in its maxima, so that a negative cosine becomes 0 if another text
  of the batch is longer (up to 0.005 of F1 with MiniLM). Here, as there with one pair at a time, nothing but a text's
  own tokens is matched.
- RoBERTa's tokenizer gets a space before the text, as from the package under transformers 4; under 5 it gets none.
- The layer is the last unless it is given; the package has a table for well-known encoders (17 of roberta-large).

`embed` puts each distinct text through the encoder once; pairs are then scored as batched matrix products. Scores of
unrelated texts depend on the encoder (0.83 with roberta-large), so only with a `Baseline` does a threshold mean much.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rewards.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from rewards.files import write_atomically
from rewards.scorer import pick_device, pick_dtype

TOKENS_PER_BATCH, TOKENS_PER_BATCH_GPU = 1024, 32_768
"""Padded tokens per forward pass."""
NUMBERS_PER_BLOCK, NUMBERS_PER_BLOCK_GPU = 1 << 20, 1 << 26
"""Numbers of the padded embeddings that are multiplied at once; on a CPU they should fit into its cache."""
PAIRS_AT_ONCE = 4096
"""Pairs of a call whose embeddings are held in memory."""
LENGTH_STEP = 16
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


class BertScore(NamedTuple):
    """Scores of pairs of texts: float32 on the CPU, shape (pairs,), in [-1, 1] before rescaling, higher is more alike.

    Attributes:
        precision: How much of the candidate is in the reference.
        recall: How much of the reference is in the candidate.
        f1: Their harmonic mean; the same for (a, b) and (b, a).
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor


@dataclass(frozen=True)
class Baseline:
    """Mean scores of unrelated texts, which rescaling makes 0, equal texts staying at 1: (x - b) / (1 - b).

    The package has published values for some encoders: `rescale_baseline/<language>/<name>.tsv`, a row per layer.

    Attributes:
        precision, recall, f1: The means.
        layer: Of the encoder; None: not checked.
        encoder: SHA-256 of the encoder's weights; None: not checked.
        pairs: How many the means are of.

    Raises:
        ValueError: A mean that is not below 1.
    """

    precision: float
    recall: float
    f1: float
    layer: int | None = None
    encoder: str | None = None
    pairs: int | None = None

    def __post_init__(self):
        for name in BertScore._fields:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not -1 <= value < 1:
                raise ValueError(f"`{name}` of a baseline must be at least -1 and below 1, but is {value!r}.")

    def rescale(self, score: BertScore) -> BertScore:
        """Scores from which chance is taken out."""
        means = (self.precision, self.recall, self.f1)
        return BertScore(*((value - mean) / (1 - mean) for value, mean in zip(score, means, strict=True)))

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: No such content.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no baseline; fit one and save it. {error}") from error


class Embedded:
    """Texts whose token embeddings are in memory; made by `BertScorer.embed`.

    Equal texts (to the encoder: upper case may not matter) share a row.

    Attributes:
        rows: Row of each text. Shape (texts,).
        sentences: Unit-length mean of the last hidden states of each row, special tokens included, as
            sentence-transformers has it; float32. Shape (rows, width).
    """

    def __init__(
        self, rows: Tensor, sentences: Tensor, tokens: Tensor, weights: Tensor, lengths: Tensor,
        baseline: Baseline | None,
    ):  # fmt: skip
        self.rows, self.sentences, self.baseline = rows, sentences, baseline
        # One after the other without padding: unit vectors (tokens, width), and each one's share in the mean (tokens,).
        self._tokens, self._weights = tokens, weights
        self._lengths, self._offsets = lengths, lengths.cumsum(0) - lengths

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def score(self, candidates: Tensor, references: Tensor, *, rescale: bool = True) -> BertScore:
        """Scores of pairs of the texts, by number.

        Args:
            candidates, references: Numbers of texts. Shape (pairs,).
            rescale: With the baseline, if the scorer had one.

        Raises:
            ValueError: Other shapes.
            IndexError: A number that no text has.
        """
        if candidates.ndim != 1 or candidates.shape != references.shape:
            shapes = f"{tuple(candidates.shape)} and {tuple(references.shape)}"
            raise ValueError(f"`candidates` and `references` must have the same shape (pairs,), but have {shapes}.")
        for numbers in (candidates, references):
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self):
                raise IndexError(f"Texts have numbers from 0 to {len(self) - 1}, but got {numbers.tolist()[:20]}.")
        left, right = self.rows[candidates.cpu()], self.rows[references.cpu()]
        scores = torch.empty(3, len(left))
        for block in self._blocks(left, right):
            scores[:, block] = self._score_block(left[block], right[block]).cpu()
        score = BertScore(*scores)
        return self.baseline.rescale(score) if self.baseline and rescale else score

    def _blocks(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """Numbers of pairs to be scored together: about equally long ones, as many as `NUMBERS_PER_BLOCK` allows."""
        step = self._lengths[left] // LENGTH_STEP
        lengths = self._lengths[right]
        numbers = NUMBERS_PER_BLOCK if self._tokens.device.type == "cpu" else NUMBERS_PER_BLOCK_GPU
        for value in step.unique().tolist():
            members = (step == value).nonzero().flatten()
            members = members[lengths[members].argsort(descending=True, stable=True)]
            start = 0
            while start < len(members):
                longest = (value + 1) * LENGTH_STEP + int(lengths[members[start]])
                block = members[start : start + max(1, numbers // (longest * self._tokens.shape[1]))]
                yield block
                start += len(block)

    def _score_block(self, left: Tensor, right: Tensor) -> Tensor:
        """Precision, recall and F1 of pairs of rows, shape (3, pairs)."""
        x, x_weights = self._padded(left)
        y, y_weights = self._padded(right)
        cosines = torch.bmm(x, y.mT)  # (pairs, tokens of left, tokens of right)
        precision = (cosines.amax(2) * x_weights).sum(1)
        recall = (cosines.amax(1) * y_weights).sum(1)
        total = precision + recall
        f1 = torch.where(total == 0, 0.0, 2 * precision * recall / total)
        is_empty = (x_weights.sum(1) == 0) | (y_weights.sum(1) == 0)
        return torch.stack([precision, recall, f1]).masked_fill(is_empty, 0.0)

    def _padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (rows, tokens, width) and weights (rows, tokens) of rows.

        A shorter text is filled up with its own last token, which changes no maximum, at weight 0.
        """
        lengths = self._lengths[rows, None]
        position = torch.arange(int(lengths.max()))
        index = self._offsets[rows, None] + torch.minimum(position, lengths - 1)
        index, inside = index.to(self._tokens.device), (position < lengths).to(self._tokens.device)
        return F.embedding(index, self._tokens).float(), self._weights[index] * inside


def check_texts(texts: Sequence[str]) -> None:
    """Raise TypeError for the first thing that is no text, ValueError for half a surrogate pair."""
    if isinstance(texts, str):
        raise TypeError(f"Texts must be in a list, but got the string {texts[:80]!r}.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {number} must be a string, but is {text!r}.")
        if _HALF_A_PAIR.search(text):
            raise ValueError(f"Text {number} has half a surrogate pair, which is no character: {text[:80]!r}.")


class BertScorer:
    """Scores pairs of texts; see the module.

    Args:
        model: A transformers text encoder, e.g. a BertModel; the states of its last layer are compared.
        tokenizer: Its tokenizer; has to add special tokens, so that no text is without tokens.
        layer: Which layer of the original model its last one is, for baselines.
        storage: Type in which embeddings are held, default float32; float16 moves scores by some 1e-5.
        tokens_per_batch: Padded tokens per forward pass, default `TOKENS_PER_BATCH`; fewer if memory runs out.
        max_tokens: Of a text, special ones included; longer ones are cut. Default: what the tokenizer says.
        baseline: To rescale scores with.
        checkpoint: Where the weights came from, for baselines.

    Raises:
        ValueError: An option out of range, a tokenizer that doesn't fit, or a baseline of another encoder or layer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, layer: int | None = None, checkpoint: Checkpoint | None = None,
        storage: str | torch.dtype | None = None, tokens_per_batch: int | None = None, max_tokens: int | None = None,
        baseline: Baseline | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.checkpoint = model.eval().requires_grad_(False), tokenizer, checkpoint
        self.layer, self.storage, self.baseline = layer, pick_dtype(storage), baseline
        default = TOKENS_PER_BATCH if model.device.type == "cpu" else TOKENS_PER_BATCH_GPU
        self.tokens_per_batch = default if tokens_per_batch is None else tokens_per_batch
        self.max_tokens = tokenizer.model_max_length if max_tokens is None else max_tokens
        if self.tokens_per_batch < 1:
            raise ValueError(f"`tokens_per_batch` must be at least 1, but got {self.tokens_per_batch}.")
        if not tokenizer("")["input_ids"]:
            raise ValueError(f"{type(tokenizer).__name__} adds no special tokens; take an encoder such as BERT.")
        window = getattr(model.config, "max_position_embeddings", None) or 1_000_000
        if not 3 <= self.max_tokens <= window:  # transformers' "no limit" is 1e30
            problem = "the tokenizer allows any" if self.max_tokens > 1e20 else f"is {self.max_tokens}"
            raise ValueError(f"`max_tokens` must be from 3, two of them special, to {window}, but {problem}; give it.")
        self._prefix = " " if type(tokenizer).__name__.startswith("Roberta") else ""
        self._unweighted = torch.tensor([t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None])
        if baseline and baseline.layer is not None and layer is not None and baseline.layer != layer:
            raise ValueError(f"The baseline is of layer {baseline.layer}, but scores are of {layer}; fit another.")
        if baseline and baseline.encoder is not None and checkpoint and baseline.encoder != checkpoint.sha256:
            raise ValueError(f"The baseline is of another encoder than {checkpoint.source}; fit one for this.")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, layer: int | None = None, baseline: Baseline | str | Path | None = None,
        device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
        storage: str | torch.dtype | None = None, tokens_per_batch: int | None = None, max_tokens: int | None = None,
    ) -> Self:  # fmt: skip
        """Load an encoder; layers above `layer` are left out.

        Args:
            path: Folder with a transformers encoder in safetensors, or `org/repo@revision` on the Hub.
            layer: From 0, the token embeddings, to the last one, the default; the package's is about 3/4 up.
            baseline: A baseline or the file of one.
            device: Default: the GPU if there is one.
            dtype: Of the weights; default float32. bfloat16 is faster and moves scores by some 1e-3.
            storage, tokens_per_batch, max_tokens: See the class.

        Raises:
            CheckpointError: No encoder there, or weights missing.
            ValueError: An option out of range.
        """
        checkpoint = find_checkpoint(path, folder_of="transformers")
        model, tokenizer = _load_encoder(checkpoint, pick_dtype(dtype))
        baseline = Baseline.load(baseline) if isinstance(baseline, str | Path) else baseline
        return cls(
            model.to(pick_device(device)), tokenizer, layer=_cut(model, layer), checkpoint=checkpoint, storage=storage,
            tokens_per_batch=tokens_per_batch, max_tokens=max_tokens, baseline=baseline,
        )  # fmt: skip

    def __call__(self, candidates: Sequence[str], references: Sequence[str], *, rescale: bool = True) -> BertScore:
        """Score `candidates[i]` against `references[i]`, `PAIRS_AT_ONCE` at a time.

        A text in many pairs is embedded once per `PAIRS_AT_ONCE` of them; with `embed` and `Embedded.score`, once.

        Args:
            candidates, references: Texts. Shape (pairs,).
            rescale: With the baseline, if there is one.

        Raises:
            ValueError: Not one reference per candidate, or half a surrogate pair in a text.
            TypeError: Something that is no text.
        """
        for texts in (candidates, references):
            check_texts(texts)
        if len(candidates) != len(references):
            raise ValueError(f"Need one reference per candidate, but got {len(candidates)} and {len(references)}.")
        parts = [BertScore(*torch.empty(3, 0))]
        for start in range(0, len(candidates), PAIRS_AT_ONCE):
            left, right = (list(texts[start : start + PAIRS_AT_ONCE]) for texts in (candidates, references))
            numbers = torch.arange(len(left))
            parts.append(self.embed(left + right).score(numbers, numbers + len(left), rescale=rescale))
        return BertScore(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed texts, each distinct one once.

        They stay on the model's device and take 4 bytes x tokens x width (2 if `storage` is float16): with 25,000 texts
        of 80 tokens and 384 numbers, 3 GB.

        Raises:
            TypeError: Something that is no text.
            ValueError: Half a surrogate pair in a text, or an encoder that makes NaN.
        """
        encoded = self._tokenize(texts)
        # Longest first: batches hardly need padding, and if memory runs out, then at once.
        distinct = sorted(set(encoded), key=lambda ids: (-len(ids), ids))
        row = {ids: number for number, ids in enumerate(distinct)}
        lengths = torch.tensor([len(ids) for ids in distinct], dtype=torch.long)
        width, device = self.model.config.hidden_size, self.model.device
        tokens = torch.empty(int(lengths.sum()), width, dtype=self.storage, device=device)
        weights = torch.empty(len(tokens), device=device)
        sentences = torch.empty(len(distinct), width, device=device)
        start = offset = 0
        while start < len(distinct):
            batch = distinct[start : start + max(1, self.tokens_per_batch // len(distinct[start]))]
            padding = self.tokenizer.pad_token_id or 0
            ids = pad_sequence([torch.tensor(text) for text in batch], True, padding).to(device)  # (texts, tokens)
            length = lengths[start : start + len(batch), None].to(device)
            mask = torch.arange(ids.shape[1], device=device) < length
            hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            sentences[start : start + len(batch)] = F.normalize((hidden * mask[..., None]).sum(1) / length, dim=-1)
            counts = mask & ~torch.isin(ids, self._unweighted.to(device))
            stop = offset + int(length.sum())
            tokens[offset:stop] = F.normalize(hidden[mask], dim=-1)
            weights[offset:stop] = (counts / counts.sum(1, keepdim=True).clamp(min=1))[mask]
            start, offset = start + len(batch), stop
        if not sentences.isfinite().all():
            raise ValueError(f"The encoder makes NaN or infinite values in {self.model.dtype}; try float32.")
        rows = torch.tensor([row[ids] for ids in encoded], dtype=torch.long)
        return Embedded(rows, sentences, tokens, weights, lengths, self.baseline)

    def fit_baseline(self, texts: Sequence[str], *, seed: int = 0) -> Baseline:
        """Mean scores of random pairs of texts, as the package's authors made theirs: each text is in one pair.

        Args:
            texts: Of the kind that will be scored, unrelated to each other; equal ones count once. The authors took a
                million lines of news; the standard error is about 0.1 / sqrt(pairs).
            seed: Of the pairing.

        Raises:
            ValueError: Fewer than two distinct texts.
        """
        distinct = list(dict.fromkeys(texts))
        if len(distinct) < 2:
            raise ValueError(f"A baseline needs at least 2 distinct texts, better some thousands, but got {distinct}.")
        random.Random(seed).shuffle(distinct)
        half = len(distinct) // 2
        means = (float(value.mean()) for value in self(distinct[:half], distinct[half : 2 * half], rescale=False))
        digest = self.checkpoint.sha256 if self.checkpoint else None
        return Baseline(*means, layer=self.layer, encoder=digest, pairs=half)

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        check_texts(texts)
        if not texts:
            return []
        prepared = [self._prefix + stripped if (stripped := text.strip()) else "" for text in texts]
        encoded = self.tokenizer(prepared, truncation=True, max_length=self.max_tokens, padding=False)["input_ids"]
        return [tuple(ids) for ids in encoded]


def _load_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Any]:
    """Encoder and tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    try:
        loaded: Any = AutoModel.from_pretrained(
            checkpoint.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} is no encoder with safetensors and a tokenizer: {error}") from error
    model, info = loaded
    # The pooler is not used, and language models are published without.
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise CheckpointError(f"{checkpoint.path} lacks weights of its encoder: {missing[:50]}.", missing)
    return model.get_encoder() if model.config.is_encoder_decoder else model, tokenizer


def _cut(model: Any, layer: int | None) -> int:
    """Drop the layers above `layer`; the number of the last one left."""
    count = model.config.num_hidden_layers
    if layer is None or layer == count:
        return count
    if not 0 <= layer < count:
        raise ValueError(f"`layer` must be from 0, the token embeddings, to {count}, the last one, but got {layer}.")
    stack = next((part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} can't be cut at layer {layer}; leave `layer` out for the last one.")
    del stack[layer:]
    return layer
