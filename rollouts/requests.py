"""One picture to draw: what was asked for, what that means for a catalogue, and what became of it.

A `RenderRequest` is a call, an instruction and a seed. `resolve` turns it into a `RenderJob`, which says which weights
to load and which numbers to draw with, and carries the key under which the picture is stored. Drawing a job ends in a
`RenderResult`: a picture or a `RenderFailure`.
"""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image

from rollouts.api import ARCHITECTURES, APICall
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.schedulers import SamplerError, scheduler_spec
from rollouts.weights import Reason as WeightsReason

RENDERER_VERSION = 2
"""Raised when the same job would give another picture; part of every key."""

Reason = (
    Literal[
        "invalid_call",  # not a call at all, or a parameter out of range
        "unknown_model",  # not in the catalogue, or there as another type or for another architecture
        "unknown_sampler",  # nothing in diffusers comes near it
        "wrong_architecture",  # the weights are of another architecture than the catalogue says
        "out_of_memory",
        "not_finite",  # NaN in the picture
        "black",  # nothing but black, as a safety checker or an overflow leaves it
        "worker_lost",  # the process that drew it died, more often than is tried again
        "error",  # anything else; the message says what
    ]
    | WeightsReason
)
REASONS: tuple[str, ...] = tuple(name for part in get_args(Reason) for name in get_args(part))

_LIBRARIES = ("torch", "diffusers", "transformers")  # what takes part in computing a picture's bits


class RenderFailure(NamedTuple):
    """Why there is no picture: `reason` is one of `REASONS`, for counting; `message` is for people."""

    reason: str
    message: str


class RenderError(Exception):
    """A job, or all jobs of a model, that can't be drawn.

    Attributes:
        failure: As it is recorded.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.failure = RenderFailure(reason, message)


@dataclass(frozen=True)
class RenderSettings:
    """How all pictures of a rollout are drawn. Everything here can change their bits and is part of their keys.

    Attributes:
        dtype: Of the weights on the device: float32, bfloat16 or float16. The VAE of SDXL overflows in float16 and is
            kept in float32, as its authors advise.
        device_type: `cpu`, `cuda`, ...
        batch_size: Most pictures in one call of the pipeline.
        pad_batches: Always draw `batch_size` pictures at once (surplus ones are thrown away): a job's picture is then
            the same to the last bit whatever it is drawn together with. Otherwise it can differ by one grey level.
        resolution_scale: Pictures are drawn at this fraction of the call's size, rounded to multiples of 8 pixels.
        native_side: Or, for small models: pixels that are drawn for the side an architecture was trained at (512 or
            1024). With 64, a call of 512x768 for SD 1.5 is drawn as 64x96, and so is one of 1024x1536 for SDXL.
        vae_tiling: Decode large pictures in tiles, which needs less memory and leaves faint seams.
        compile_unet: torch.compile the denoiser; worth its minutes for many pictures of few models.
        trigger_words: What is added to a prompt that has none of its model's trigger words: `first`, `all` or `none`.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_type: str = "cpu"
    batch_size: int = 4
    pad_batches: bool = False
    resolution_scale: float = 1.0
    native_side: int | None = None
    vae_tiling: bool = False
    compile_unet: bool = False
    trigger_words: Literal["first", "all", "none"] = "first"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, but is {self.dtype!r}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {self.batch_size}.")
        if not 0 < self.resolution_scale <= 4:
            raise ValueError(f"`resolution_scale` must be above 0 and at most 4, but is {self.resolution_scale}.")
        if self.native_side is not None and (self.native_side < 8 or self.resolution_scale != 1):
            raise ValueError(
                f"`native_side` must be at least 8 and stand without `resolution_scale`, but they are "
                f"{self.native_side} and {self.resolution_scale}."
            )
        if self.trigger_words not in ("first", "all", "none"):
            raise ValueError(f"`trigger_words` must be first, all or none, but is {self.trigger_words!r}.")

    def scaled(self, side: int, base_model: str) -> int:
        """Pixels drawn for a side of a call of an architecture."""
        scale = self.resolution_scale
        if self.native_side is not None:
            scale = self.native_side / ARCHITECTURES[base_model].default_side
        return max(8, round(side * scale / 8) * 8)

    def fingerprint(self) -> dict[str, Any]:
        """What of these settings, of the code and of its libraries goes into every key."""
        own = asdict(self)
        del own["trigger_words"]  # its effect is in the prompt
        if self.native_side is None:
            del own["native_side"]
        if not self.pad_batches:
            del own["batch_size"]  # batches of any shape: the last bit is free
        return own | {"renderer": RENDERER_VERSION, "machine": platform.machine(), **_library_versions()}


@dataclass(frozen=True)
class RenderRequest:
    """One picture of a call.

    Attributes:
        call: What to call.
        prompt: In A1111's notation; of any length.
        negative_prompt: Likewise.
        seed: Of the initial noise and of the sampler's.
        clip_skip: As A1111 counts: 1 is the text encoder's last layer. SDXL always takes its last but one.
    """

    call: APICall
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    clip_skip: int = 1


class BatchKey(NamedTuple):
    """What pictures have in common that one call of a pipeline can draw. Sorts by what is expensive to change."""

    base_model: str
    checkpoint: str
    lora: str
    """Empty: none."""
    lora_weight: float
    sampler: str
    width: int
    height: int
    steps: int
    cfg: float
    clip_skip: int


class Batch(NamedTuple):
    """Jobs that one call of a pipeline draws."""

    key: BatchKey
    jobs: tuple[int, ...]
    """Indices into the rollout's jobs."""


class RenderJob(NamedTuple):
    """A request, resolved.

    Attributes:
        key: SHA-256 of everything that decides the picture's bits; hex.
        batch_key: Models and parameters; its size is what is drawn, `resolution_scale` included.
        prompt: With trigger words.
        negative_prompt: As asked.
        seed: As asked.
    """

    key: str
    batch_key: BatchKey
    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class RenderResult:
    """What became of a job: either `image` or `failure`."""

    key: str
    image: Image.Image | None = None
    failure: RenderFailure | None = None
    seconds: float = 0.0
    """Its share of the time its batch took to draw, loading left out."""
    scores: dict[str, float] = field(default_factory=dict)
    """By scorer, if the worker scores what it draws."""
    pixels: str = ""
    """SHA-256 of the picture's pixels, if the worker stores what it draws; `image` is then None."""
    file_bytes: int | None = None
    """Size of the picture's file, likewise; None: it was not kept, or there was no room for it."""


class Spent(NamedTuple):
    """What drawing has cost so far, or (as a difference) what a batch did."""

    loads: int = 0
    """Checkpoints read from disk."""
    loaded_bytes: int = 0
    """Of their files."""
    load_seconds: float = 0.0
    """How long drawing waited for checkpoints; one that was prefetched costs less than its reading took."""
    lora_loads: int = 0
    lora_seconds: float = 0.0
    batches: int = 0
    images: int = 0
    draw_seconds: float = 0.0
    """With reading the prompts."""
    read_seconds: float = 0.0
    """How long reading weights took, waited for or in the background."""
    build_seconds: float = 0.0
    """Of `load_seconds`, how long pipelines were built from weights in memory."""
    after_seconds: float = 0.0
    """Scoring and storing what was drawn, while the worker draws nothing else."""

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, earlier: "Spent") -> "Spent":
        """What was spent since."""
        return Spent(*(now - then for now, then in zip(self, earlier, strict=True)))


def resolve(request: RenderRequest, catalog: Catalog, settings: RenderSettings) -> RenderJob:
    """What a request means for a catalogue. No weights are looked at.

    Raises:
        RenderError: Unknown model or sampler, or a model without a file.
    """
    call = request.call
    if problems := catalog.validate(call):
        known = catalog.get(call.model)
        what = f"is {known.type} for {known.base_model} there" if known else "is not in the catalogue"
        raise RenderError("unknown_model", f"{call.model!r} ({call.type}, {call.base_model}) {what}: {problems[0]}.")
    entry = catalog[call.model]
    checkpoint = catalog[entry.base_checkpoint] if entry.base_checkpoint is not None else entry
    lora = entry if entry.type == "LoRA" else None
    try:
        sampler = scheduler_spec(call.sampling_method).sampler
    except SamplerError as error:
        raise RenderError("unknown_sampler", str(error)) from error
    weight = 1.0 if lora is None or lora.lora_weight is None else lora.lora_weight
    batch_key = BatchKey(
        call.base_model, checkpoint.name, lora.name if lora else "", weight, sampler,
        settings.scaled(call.width, call.base_model), settings.scaled(call.height, call.base_model),
        call.sampling_steps, float(call.cfg_scale), request.clip_skip,
    )  # fmt: skip
    prompt = with_trigger_words(request.prompt, entry.trigger_words, settings.trigger_words)
    return RenderJob(
        _key(request, prompt, batch_key, [checkpoint, *([lora] if lora else [])], settings),
        batch_key,
        prompt,
        request.negative_prompt,
        request.seed,
    )


def with_trigger_words(prompt: str, trigger_words: Iterable[str], policy: str) -> str:
    """The prompt, followed by its model's trigger words unless it has one of them already."""
    words = [word.strip(" ,") for word in trigger_words]
    words = [word for word in words if word]
    if policy == "none" or not words or any(word.lower() in prompt.lower() for word in words):
        return prompt
    added = words if policy == "all" else words[:1]
    return ", ".join([prompt.rstrip(" ,"), *added] if prompt.strip(" ,") else added)


def _key(
    request: RenderRequest, prompt: str, batch_key: BatchKey, entries: list[CatalogEntry], settings: RenderSettings
) -> str:
    """Names are left out: a model that is renamed draws the same pictures."""
    for entry in entries:
        if not entry.files:
            raise RenderError("no_file", f"{entry.name}: the catalogue lists no file.")
    content = batch_key._asdict() | {
        "checkpoint": [file.sha256.lower() for file in entries[0].files],
        "lora": [file.sha256.lower() for file in entries[1].files] if len(entries) == 2 else None,
        "prompt": prompt,
        "prompt_as_asked": request.prompt,  # scores are of this one
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "settings": settings.fingerprint(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _library_versions() -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            return "none"

    return {name: installed(name) for name in _LIBRARIES}
