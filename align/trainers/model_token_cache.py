"""Hidden states of a frozen backbone after many prefixes, computed once and kept in files.

    cache.json                what it was computed of, labels, and where each example's prefix is
    part-00000.safetensors    hidden (n, d), word_lse (n,), word_max (n,) of some prefixes, longest first

Equal prefixes are computed once. Parts are written atomically; a part that is there is not computed again.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_loss import LogitTransform
from align.trainers.model_token_pictures import PrefixPictures
from rewards.files import write_atomically
from rollouts.responses import MoreInputs
from rollouts.safetensors_reader import read_header

logger = logging.getLogger(__name__)

_FORMAT = 1
_MOST_ROWS = 64  # of a forward pass: word logits of short prefixes take memory, too
_PART = re.compile(r"part-\d{5}\.safetensors")
_SECONDS_BETWEEN_LOGS = 20.0


@dataclass(frozen=True)
class ModelTokenExamples:
    """What is learned from: after `prefixes[i]` (chat and prompt, ChatGen `c, p`) comes the model `labels[i]`.

    Attributes:
        prefixes: Token ids, ending where the model token would be predicted.
        labels: Index into the list of models.
        pictures: Those that prefixes have places for, if the policy sees.
    """

    prefixes: Sequence[Sequence[int]]
    labels: Sequence[int]
    pictures: PrefixPictures | None = None

    def check(self, num_models: int, vocabulary: int, window: int | None) -> None:
        """Find what can't be trained on.

        Raises:
            ModelTokenError: Naming the first bad example.
        """
        if len(self.prefixes) != len(self.labels):
            raise ModelTokenError(f"Need a label per prefix, but got {len(self.prefixes)} and {len(self.labels)}.")
        if not self.prefixes:
            raise ModelTokenError("There are no examples to learn model tokens from.")
        for number, (prefix, label) in enumerate(zip(self.prefixes, self.labels, strict=True)):
            where = f"Example {number}:"
            if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_models:
                raise ModelTokenError(f"{where} `label` must be an index of one of {num_models} models, is {label!r}.")
            if not len(prefix):
                raise ModelTokenError(f"{where} the prefix is empty; at least one token must predict the model.")
            if window is not None and len(prefix) > window:
                raise ModelTokenError(
                    f"{where} the prefix has {len(prefix)} tokens, but the model's window is {window}; shorten it or "
                    "leave the example out."
                )
            if min(prefix) < 0 or max(prefix) >= vocabulary:
                raise ModelTokenError(
                    f"{where} token ids must be from 0 to {vocabulary - 1}, but are from {min(prefix)} to "
                    f"{max(prefix)}; is the tokenizer another model's?"
                )

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)

    def __add__(self, other: "ModelTokenExamples") -> "ModelTokenExamples":
        """These, then the others."""
        pictures = self.pictures and other.pictures and self.pictures + other.pictures
        return ModelTokenExamples([*self.prefixes, *other.prefixes], [*self.labels, *other.labels], pictures)

    def key(self, number: int) -> bytes:
        """What tells an example's prefix from others: its ids, and what its pictures show."""
        ids = torch.tensor(self.prefixes[number]).numpy().tobytes()
        return ids + (self.pictures.digests[number] if self.pictures else b"")


class HiddenBatch(NamedTuple):
    """Some examples, ready for the loss."""

    hidden: Tensor
    """Shape (n, d)."""
    labels: Tensor
    """Shape (n,)."""
    word_lse: Tensor
    """Log-sum-exp of the word logits (nats). Shape (n,)."""
    word_max: Tensor
    """The highest word logit. Shape (n,)."""

    def select(self, index: Tensor) -> "HiddenBatch":
        """Some of them, in this order."""
        return HiddenBatch(*(tensor.index_select(0, index) for tensor in self))


@dataclass(frozen=True)
class Manifest:
    """cache.json.

    Attributes:
        backbone: Digest of the weights and configuration.
        prefixes: Digest of all token ids and pictures, in order.
        labels: Of each example.
        places: Where each example's prefix is, counted over all parts.
        num_prefixes: Distinct ones.
        part_rows: Prefixes in a part; the last one may have fewer.
        hidden_size: d.
        dtype: Of hidden states on disk.
        scale, cap: The model's `LogitTransform`.
    """

    backbone: str
    prefixes: str
    labels: list[int]
    places: list[int]
    num_prefixes: int
    part_rows: int
    hidden_size: int
    dtype: str
    scale: float
    cap: float | None
    format: int = _FORMAT

    @property
    def num_parts(self) -> int:
        """Files."""
        return -(-self.num_prefixes // self.part_rows)

    def rows_of(self, part: int) -> int:
        """Prefixes in a part."""
        return min(self.part_rows, self.num_prefixes - part * self.part_rows)

    def key(self) -> str:
        """16 hex digits that tell this cache's content from another's."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


class HiddenCache:
    """Read access to a complete cache; parts are mapped, not read, so any size will do."""

    def __init__(self, folder: str | Path):
        """Open a cache that `build_cache` has completed.

        Raises:
            ModelTokenError: It is missing, incomplete or damaged.
        """
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise ModelTokenError(f"There is no cache of hidden states in {folder}; `build_cache` makes one.")
        self.manifest = manifest
        for part in range(manifest.num_parts):
            if problem := _part_problem(self.folder, manifest, part):
                raise ModelTokenError(
                    f"{_part_path(self.folder, part)} {problem}; build the cache again to complete it."
                )
        self._maps = [_map(_part_path(self.folder, part)) for part in range(manifest.num_parts)]
        self._labels, self._places = torch.tensor(manifest.labels), torch.tensor(manifest.places)

    def __len__(self) -> int:
        """Examples."""
        return len(self.manifest.labels)

    @property
    def transform(self) -> LogitTransform:
        """What the model does with its output layer's values."""
        return LogitTransform(self.manifest.scale, self.manifest.cap)

    def gather(
        self, index: Tensor, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> HiddenBatch:
        """Some examples, in memory.

        Args:
            index: Numbers of examples. Shape (n,).
            dtype: Of hidden states and log-sum-exps.
            device: Where to.
        """
        places = self._places[index]
        parts, offsets = places // self.manifest.part_rows, places % self.manifest.part_rows
        hidden = torch.empty(len(index), self.manifest.hidden_size, dtype=dtype)
        word_lse, word_max = torch.empty(len(index), dtype=dtype), torch.empty(len(index), dtype=dtype)
        for part in parts.unique().tolist():
            here = (parts == part).nonzero()[:, 0]
            for target, name in ((hidden, "hidden"), (word_lse, "word_lse"), (word_max, "word_max")):
                target[here] = self._maps[part][name][offsets[here]].to(dtype)
        return HiddenBatch(hidden.to(device), self._labels[index].to(device), word_lse.to(device), word_max.to(device))


def build_cache(
    folder: str | Path,
    backbone: Backbone,
    examples: ModelTokenExamples,
    *,
    dtype: str = "auto",
    tokens_per_batch: int = 2048,
    part_rows: int = 256,
    replace_stale: bool = False,
) -> HiddenCache:
    """Compute what is not there yet, and open the cache.

    One process does this; it may be killed at any moment and started again. Only labels that differ are no reason to
    compute anything again.

    Args:
        folder: Made if it isn't there.
        backbone: The frozen model.
        examples: Checked before.
        dtype: Of hidden states on disk; auto: as the model computes them. Log-sum-exps are float32 at least.
        tokens_per_batch: Padded tokens of a forward pass; a longer prefix goes alone.
        part_rows: Prefixes in a file.
        replace_stale: Replace a cache that was computed of other weights, prefixes or types.

    Raises:
        ModelTokenError: The cache is stale and `replace_stale` is false, or hidden states are not finite.
    """
    folder = Path(folder)
    order, manifest = _plan(backbone, examples, dtype, part_rows)
    _prepare(folder, manifest, replace_stale)
    missing = [part for part in range(manifest.num_parts) if _part_problem(folder, manifest, part)]
    logger.info(
        "%s: %d prefixes in %d parts, %d parts to compute", folder, len(order), manifest.num_parts, len(missing)
    )
    last_log = time.monotonic()
    for done, part in enumerate(missing):
        first = part * part_rows
        tensors = _compute(backbone, examples, tokens_per_batch, order[first : first + part_rows])
        tensors["hidden"] = _narrowed(tensors["hidden"], getattr(torch, manifest.dtype), part)
        write_atomically(_part_path(folder, part), safetensors.torch.save(tensors))
        if time.monotonic() - last_log > _SECONDS_BETWEEN_LOGS:
            last_log = time.monotonic()
            logger.info("%s: %d of %d parts computed", folder, done + 1, len(missing))
    return HiddenCache(folder)


def read_manifest(folder: str | Path) -> Manifest | None:
    """A cache's description; None if there is none.

    Raises:
        ModelTokenError: It can't be read.
    """
    path = Path(folder) / "cache.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ModelTokenError(
                f"{path} has format {content['format']}, but this version reads {_FORMAT}; delete it."
            )
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ModelTokenError):
            raise
        raise ModelTokenError(f"{path} can't be used ({error!r}); delete it to compute the cache again.") from error


def _plan(backbone: Backbone, examples: ModelTokenExamples, dtype: str, part_rows: int) -> tuple[list[int], Manifest]:
    """An example for each distinct prefix, longest first, and the description of the cache."""
    digest, first = hashlib.sha256(), {}
    keys = [examples.key(number) for number in range(len(examples))]
    for number, key in enumerate(keys):
        digest.update(len(examples.prefixes[number]).to_bytes(8, "little") + key)
        first.setdefault(key, number)
    # The longest first: if memory does not suffice, that is seen at once.
    order = sorted(first.values(), key=lambda number: (-len(examples.prefixes[number]), number))
    place_of = {number: place for place, number in enumerate(order)}
    places = [place_of[first[key]] for key in keys]
    own = str(backbone.head.weight.dtype).removeprefix("torch.")
    manifest = Manifest(
        backbone=backbone.digest(),
        prefixes=digest.hexdigest()[:16],
        labels=[int(label) for label in examples.labels],
        places=places,
        num_prefixes=len(order),
        part_rows=part_rows,
        hidden_size=backbone.hidden_size,
        dtype=own if dtype == "auto" else dtype,
        scale=backbone.transform.scale,
        cap=backbone.transform.cap,
    )
    return order, manifest


def _prepare(folder: Path, manifest: Manifest, replace_stale: bool) -> None:
    """Make `folder` hold this manifest and only parts that belong to it."""
    found = read_manifest(folder)
    stale = found is None
    if found is not None:
        fields = [name for name in ("backbone", "prefixes", "dtype", "part_rows") if _differ(found, manifest, name)]
        stale = bool(fields)
        why = "; ".join(f"`{name}` is {getattr(manifest, name)}, there {getattr(found, name)}" for name in fields)
        if stale and not replace_stale:
            raise ModelTokenError(
                f"{folder / 'cache.json'} is of something else ({why}). Choose another `cache_dir`, delete this one, "
                "or set `replace_stale_cache: true`."
            )
        if stale:
            logger.warning("%s is replaced: %s", folder, why)
    if stale:
        # First: without it, parts that are left over belong to nothing.
        (folder / "cache.json").unlink(missing_ok=True)
        for path in folder.glob("part-*.safetensors"):
            if _PART.fullmatch(path.name):
                path.unlink()
    if found != manifest:
        write_atomically(folder / "cache.json", json.dumps(asdict(manifest)).encode())


def _differ(one: Manifest, other: Manifest, name: str) -> bool:
    return getattr(one, name) != getattr(other, name)


def _compute(
    backbone: Backbone, examples: ModelTokenExamples, tokens_per_batch: int, numbers: Sequence[int]
) -> dict[str, Tensor]:
    outputs, start = [], 0
    while start < len(numbers):
        # In order of length, so the first one is the widest.
        size = max(1, min(_MOST_ROWS, tokens_per_batch // len(examples.prefixes[numbers[start]])))
        some = numbers[start : start + size]
        output = backbone([examples.prefixes[number] for number in some], _more_inputs(examples.pictures, some))
        bad = ~(output.hidden.isfinite().all(1) & output.word_lse.isfinite())
        if bad.any():
            number = numbers[start + int(bad.nonzero()[0])]
            raise ModelTokenError(
                f"Example {number}: the model's hidden state or logits are not finite; load it in float32 or bfloat16 "
                "if it is float16, else its weights are damaged."
            )
        outputs.append([tensor.cpu() for tensor in output])
        start += size
    names = ("hidden", "word_lse", "word_max")
    return {name: torch.cat([one[i] for one in outputs]) for i, name in enumerate(names)}


def _more_inputs(pictures: PrefixPictures | None, numbers: Sequence[int]) -> MoreInputs | None:
    if pictures is None:
        return None
    return lambda places, input_ids: pictures.inputs([numbers[place] for place in places], input_ids)


def _narrowed(hidden: Tensor, dtype: torch.dtype, part: int) -> Tensor:
    narrow = hidden.to(dtype)
    if not narrow.isfinite().all():
        raise ModelTokenError(f"Part {part}: hidden states do not fit into {dtype}; set `cache_dtype: bfloat16`.")
    return narrow


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.safetensors"


def _part_problem(folder: Path, manifest: Manifest, part: int) -> str:
    """Why a part must be computed (again), as the end of a sentence; empty if it is there and whole."""
    path, rows = _part_path(folder, part), manifest.rows_of(part)
    if not path.is_file():
        return "is missing"
    try:
        tensors = read_header(path).tensors
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"
    shapes = {"hidden": (rows, manifest.hidden_size), "word_lse": (rows,), "word_max": (rows,)}
    if {name: tuple(info.shape) for name, info in tensors.items()} != shapes:
        return "has other tensors than the cache needs"
    if str(tensors["hidden"].dtype).removeprefix("torch.") != manifest.dtype:
        return f"has hidden states in {tensors['hidden'].dtype}, not {manifest.dtype}"
    end = max(info.start + info.shape.numel() * info.dtype.itemsize for info in tensors.values())
    return "" if path.stat().st_size == end else "is cut short"


def _map(path: Path) -> dict[str, Tensor]:
    """Tensors of a file without reading it: the system reads pages as they are used, and may drop them again."""
    whole: Any = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {
        name: whole[info.start : info.start + info.shape.numel() * info.dtype.itemsize]
        .view(info.dtype)
        .reshape(info.shape)
        for name, info in read_header(path).tensors.items()
    }
