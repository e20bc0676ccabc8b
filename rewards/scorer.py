"""The calling convention of every reward: `scorer(prompts, images) -> float32 tensor`, higher is better.

`Scorer` does what all of them need once: each distinct image and prompt goes through its tower once, images are decoded
and preprocessed by threads ahead of the model, batches are halved when memory runs out, long prompts are counted, and a
bad row is an error that names it. A new scorer is a subclass with the four methods at the end.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rewards.batching import BatchSize, in_batches, prefetch
from rewards.checkpoints import Checkpoint
from rewards.images import ImageError, ImageSource, load_image

logger = logging.getLogger(__name__)


class ScoreError(ValueError):
    """Prompts and images that can't be scored; the message names the row."""


@dataclass
class ScoringOptions:
    """Options that every scorer of this package takes.

    Raises:
        ValueError: A value out of range.
    """

    batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per forward pass, halved when memory runs out; none: 32 on a GPU, 4 on a CPU."},
    )
    num_workers: int = field(default=4, metadata={"help": "Threads that decode and preprocess images; 0: none."})
    long_prompts: str = field(
        default="truncate",
        metadata={
            "help": "Prompts longer than the text tower reads: `truncate` them, or score in `chunk`s and average."
        },
    )
    progress: bool = field(default=False, metadata={"help": "Show a progress bar of images."})

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {self.batch_size}.")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, but got {self.num_workers}.")
        if self.long_prompts not in ("truncate", "chunk"):
            raise ValueError(f"`long_prompts` must be `truncate` or `chunk`, but got {self.long_prompts!r}.")


class Scored(NamedTuple):
    """Scores of many pairs, some of which may have failed."""

    scores: Tensor
    """float32 on the CPU, shape (n,); NaN where there is an error."""
    errors: dict[int, str]
    """Row -> reason."""

    def or_raise(self) -> Tensor:
        """The scores, if all rows have one; otherwise raise ScoreError with the first row's reason."""
        for row, reason in self.errors.items():
            more = f" ({len(self.errors) - 1} more rows failed.)" if len(self.errors) > 1 else ""
            raise ScoreError(f"Row {row}: {reason}{more}")
        return self.scores


@dataclass
class PromptCount:
    """How many prompts a scorer has read since it was made, and of how many it saw only the beginning."""

    prompts: int = 0
    truncated: int = 0

    @property
    def share(self) -> float:
        """Share of prompts that were longer than the text tower reads, in [0, 1]."""
        return self.truncated / self.prompts if self.prompts else 0.0


class Piece(NamedTuple):
    """A part of a prompt that fits into the text tower."""

    token_ids: tuple[int, ...]
    weight: float
    """Share of the prompt's tokens; the weights of a prompt's pieces add up to 1."""


class Scorer(ABC):
    """How well images fit prompts, or how much people would like them.

    Attributes:
        name: As in `load_scorer`.
        reads_prompts: False for scorers of the image alone.
        max_tokens: Tokens of a prompt that count, without the special ones.
        prompt_count: Prompts read so far and how many were longer than that.
    """

    name: ClassVar[str]
    reads_prompts: ClassVar[bool] = True
    max_tokens: int

    def __init__(
        self, *, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint | None = None,
        options: ScoringOptions | None = None,
    ):  # fmt: skip
        self.device, self.dtype, self.checkpoint = device, dtype, checkpoint
        self.options = options or ScoringOptions()
        self.prompt_count = PromptCount()
        # A CPU gains nothing from large batches, and small ones start before all images are decoded.
        self.batch_size = self.options.batch_size or (4 if device.type == "cpu" else 32)
        self._batch_size = BatchSize(self.batch_size)
        self._warned = False

    def __call__(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> Tensor:
        """Score `images[i]` for `prompts[i]`.

        Args:
            prompts: As many as images; a prompt may occur many times and is encoded once.
            images: Paths, PIL images, uint8 or [0, 1] arrays, or file contents. The same object or path is encoded
                once.

        Returns:
            float32 on the CPU, shape (n,).

        Raises:
            ScoreError: Numbers that differ, an empty prompt, an image that can't be read, a score that is not finite.
        """
        return self.score(prompts, images).or_raise()

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> Scored:
        """Like a call, but rows that can't be scored are NaN with a reason instead of an exception.

        Raises:
            ScoreError: Numbers of prompts and images that differ.
        """
        check_pairs(prompts, images)
        if not self.reads_prompts:
            prompts = [""] * len(images)
        scores = torch.full((len(prompts),), torch.nan)
        errors = self._bad_prompts(prompts)
        rows_of = rows_by_image(images, skip=errors)
        if not rows_of:
            return Scored(scores, errors)
        wanted = dict.fromkeys(prompts[row] for rows in rows_of for row in rows)
        pieces = self._pieces(list(wanted))
        texts = self.encode_texts(list(dict.fromkeys(piece.token_ids for parts in pieces.values() for piece in parts)))

        bar = tqdm(total=len(rows_of), desc=self.name, unit="image", disable=not self.options.progress)
        with bar:
            work = in_batches(
                self._prepared(images, rows_of, errors),
                self._batch_size,
                lambda batch: self._score_batch(batch, prompts, pieces, texts),
            )
            for results in work:
                bar.update()
                for row, score in results:
                    scores[row] = score
        for row in (~torch.isfinite(scores)).nonzero()[:, 0].tolist():
            errors.setdefault(row, f"the score in {self.dtype} is not finite; a wider `dtype` may help.")
            scores[row] = torch.nan
        return Scored(scores, dict(sorted(errors.items())))

    def describe(self) -> dict[str, Any]:
        """What a result has to say about where it came from: name, weights, precision, long prompts."""
        origin = self.checkpoint.describe() if self.checkpoint else {}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, **origin, "dtype": dtype, "long_prompts": self.options.long_prompts}

    def truncated_share(self, prompts: Sequence[str]) -> float:
        """Share of texts among `prompts` that are longer than `max_tokens`, in [0, 1]; 0 if prompts aren't read."""
        texts = [prompt for prompt in prompts if prompt_problem(prompt) is None] if self.reads_prompts else []
        too_long = {prompt: len(self.tokenize(prompt)) > self.max_tokens for prompt in set(texts)}
        return sum(too_long[prompt] for prompt in texts) / len(texts) if texts else 0.0

    def _bad_prompts(self, prompts: Sequence[str]) -> dict[int, str]:
        if not self.reads_prompts:
            return {}
        problems = {row: prompt_problem(prompt) for row, prompt in enumerate(prompts)}
        return {row: problem for row, problem in problems.items() if problem}

    def _pieces(self, prompts: list[str]) -> dict[str, list[Piece]]:
        """Tokens of each prompt, cut so that every piece fits."""
        pieces, too_long = {}, 0
        for prompt in prompts:
            token_ids = self.tokenize(prompt) if self.reads_prompts else []
            too_long += len(token_ids) > self.max_tokens
            pieces[prompt] = cut_tokens(token_ids, self.max_tokens, self.options.long_prompts)
        if self.reads_prompts:
            self.prompt_count.prompts += len(prompts)
            if self.options.long_prompts == "truncate":
                self.prompt_count.truncated += too_long
        if too_long and self.options.long_prompts == "truncate" and not self._warned:
            self._warned = True
            logger.warning(
                "%s reads %d tokens of a prompt: %d of %d prompts are longer and their tails don't count "
                '(long_prompts="chunk" scores them too).',
                self.name, self.max_tokens, too_long, len(prompts),
            )  # fmt: skip
        return pieces

    def _prepared(
        self, images: Sequence[ImageSource], rows_of: list[list[int]], errors: dict[int, str]
    ) -> "Iterator[_Ready]":
        """Pixels of each distinct image; rows of an image that can't be read go to `errors` instead."""

        def prepare(rows: list[int]) -> Tensor | ImageError:
            try:
                return self.preprocess(load_image(images[rows[0]]))
            except ImageError as error:
                return error

        ahead = 2 * self._batch_size.value
        ready = prefetch(prepare, rows_of, num_workers=self.options.num_workers, ahead=ahead)
        for rows, pixels in zip(rows_of, ready, strict=True):
            if isinstance(pixels, ImageError):
                errors.update(dict.fromkeys(rows, str(pixels)))
            else:
                yield _Ready(rows, pixels)

    def _score_batch(
        self, batch: "list[_Ready]", prompts: Sequence[str], pieces: dict[str, list[Piece]], texts: Any
    ) -> list[list[tuple[int, float]]]:
        """(row, score) of the rows of each image in a batch."""
        pixels = torch.stack([ready.pixels for ready in batch])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        features = self.encode_images(pixels.to(self.device, self.dtype, non_blocking=True))
        pairs = dict.fromkeys(
            (index, piece.token_ids)
            for index, ready in enumerate(batch)
            for row in ready.rows
            for piece in pieces[prompts[row]]
        )
        score_of = dict(zip(pairs, self.score_pairs(features, texts, list(pairs)).float().tolist(), strict=True))
        return [
            [
                (row, sum(score_of[index, piece.token_ids] * piece.weight for piece in pieces[prompts[row]]))
                for row in ready.rows
            ]
            for index, ready in enumerate(batch)
        ]

    def tokenize(self, prompt: str) -> list[int]:
        """All token ids of a prompt, without special tokens and not truncated."""
        raise NotImplementedError(f"{type(self).__name__} reads prompts, but has no `tokenize`.")

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """A decoded image of any mode -> float32 (3, height, width); runs on threads, raises ImageError."""

    def encode_texts(self, pieces: list[tuple[int, ...]]) -> Any:
        """What `score_pairs` needs of the distinct pieces of prompts, none longer than `max_tokens`."""
        return None

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Any:
        """What `score_pairs` needs of a batch (images, 3, height, width) of `self.dtype` on `self.device`."""

    @abstractmethod
    def score_pairs(self, images: Any, texts: Any, pairs: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        """Scores, shape (pairs,), of pairs of an index into the images encoded last and a piece of a prompt."""


def score_rows(scorer: Any, prompts: Sequence[str], images: Sequence[ImageSource]) -> Scored:
    """`scorer.score`, or for a scorer that only can be called, a call; if that fails, a call per row.

    A failure that is not a row's fault (a service that is gone) fails in every row and is raised.

    Raises:
        Exception: Whatever the scorer raises other than ValueError, or its ValueError if no row succeeds.
    """
    if hasattr(scorer, "score"):
        return scorer.score(prompts, images)
    if not len(prompts):
        return Scored(torch.zeros(0), {})
    try:
        return Scored(scorer(prompts, images), {})
    except ValueError as error:
        whole = error
    scores, errors = torch.full((len(prompts),), torch.nan), {}
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        try:
            scores[row] = scorer([prompt], [image])[0]
        except ValueError as error:
            errors[row] = str(error)
    if len(errors) == len(prompts) > 1:
        raise whole
    return Scored(scores, errors)


class _Ready(NamedTuple):
    rows: list[int]
    pixels: Tensor


def check_pairs(prompts: Sequence[str], images: Sequence[ImageSource]) -> None:
    """Raise ScoreError unless these are two sequences of equal length."""
    if isinstance(prompts, str) or isinstance(images, str | bytes | Path | Image.Image):
        raise ScoreError("`prompts` and `images` must be sequences of equal length; put a single one in a list.")
    if len(prompts) != len(images):
        raise ScoreError(f"Need one prompt per image, but got {len(prompts)} prompts and {len(images)} images.")


def prompt_problem(prompt: object) -> str | None:
    """Why a prompt can't be scored, or None."""
    if not isinstance(prompt, str):
        return f"the prompt is {prompt!r:.100}, not a text."
    if not prompt.strip():
        return "the prompt is empty."
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return f"the prompt is {prompt!a:.100}, with half a character that no tokenizer can read."
    return None


def cut_tokens(token_ids: Sequence[int], room: int, long_prompts: str) -> list[Piece]:
    """The first `room` tokens (`truncate`), or all of them in pieces of at most `room` (`chunk`)."""
    if long_prompts == "truncate" or len(token_ids) <= room:
        return [Piece(tuple(token_ids[:room]), 1.0)]
    parts = [tuple(token_ids[start : start + room]) for start in range(0, len(token_ids), room)]
    return [Piece(part, len(part) / len(token_ids)) for part in parts]


def rows_by_image(images: Sequence[ImageSource], skip: dict[int, str]) -> list[list[int]]:
    """Rows that show the same image (the same object or path), in order of first appearance."""
    lasting = isinstance(images, list | tuple)  # a lazy column makes new objects, whose ids are used again
    groups: dict[Hashable, list[int]] = {}
    for row in range(len(images)):
        if row in skip:
            continue
        image = images[row] if lasting else None
        if isinstance(image, str | Path):
            key: Hashable = str(image)
        else:
            key = (row,) if image is None else id(image)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def pick_device(device: str | torch.device | None) -> torch.device:
    """The given device, or the GPU if there is one."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating-point type by name; float32 by default, the precision of the official scores on a CPU.

    Raises:
        ValueError: No such type.
    """
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, but got {dtype!r}.")
    return found
