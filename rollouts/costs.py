"""What loading and drawing cost in seconds: assumed at first, learned from what a rollout spends.

    costs = CostModel(A100)
    costs.observe(batch, spent)  # after each batch
    costs.save("runs/rollout/costs.json")  # for `python -m rollouts.plan --costs …`

Every cost is a line, `constant · count + slope · amount`: a batch has a constant and a price per megapixel-step,
reading a checkpoint a constant and a price per GB. `A100` and `CPU` are assumptions; after the first observation only
the way they split a cost between constant and slope is left of them, and that fades too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rewards.files import write_atomically
from rollouts.requests import Batch, BatchKey, Spent
from rollouts.schedulers import scheduler_spec

GB = 1e9
PRIOR_WEIGHT = 0.1  # how many observations the prior's split of a cost is worth


class CostError(ValueError):
    """A file of costs that can't be used; the message names the file and the field."""


class Line(NamedTuple):
    """Seconds = `constant` · count + `slope` · amount."""

    constant: float
    slope: float

    def __call__(self, amount: float, count: float = 1) -> float:
        """Seconds for `count` times the constant and an amount."""
        return self.constant * count + self.slope * amount


@dataclass(frozen=True)
class Priors:
    """Costs before anything was observed.

    Attributes:
        draw: A batch, by base model; per megapixel-step (see `megapixel_steps`).
        read: A checkpoint's weights from disk into memory, which can be done ahead; per GB, for one reader alone.
        build: A pipeline on the device from weights in memory, which drawing waits for; per GB.
        lora: Seconds to swap a LoRA.
    """

    draw: Mapping[str, Line]
    read: Line
    build: Line
    lora: float

    def draw_line(self, base_model: str) -> Line:
        """Of a base model; the first one's for a base model that is not there."""
        return self.draw.get(base_model) or next(iter(self.draw.values()))


A100 = Priors(
    draw={"SD 1.5": Line(0.3, 0.032), "SDXL 1.0": Line(0.3, 0.048)},
    read=Line(0.2, 0.5),
    build=Line(1.0, 0.2),
    lora=0.5,
)
"""Assumptions, not measurements of this project. Drawing follows the docs of diffusers for an A100, not compiled: 13.12
and 3.6 steps a second for SD 1.5 at 512 x 512 with guidance in float16, 4 and 16 pictures at a time
(docs/source/en/optimization/torch2.0.md at 2c529b7), which makes 0.032 s a megapixel-step and 9 ms a step; 3.31 s for
30 steps of SDXL at 1024 x 1024 in bfloat16 (tutorials/fast_diffusion.md at 06d6b30). Text encoders and VAE are guessed
into the constant. Loading is a guess: 2 GB/s for one reader, 1 s to build a pipeline, 5 GB/s from pageable memory to
the device, half a second for a LoRA."""

CPU = Priors(
    draw={"SD 1.5": Line(1.0, 8.0), "SDXL 1.0": Line(1.0, 16.0)}, read=Line(0.2, 1.0), build=Line(1.0, 0.2), lora=0.5
)
"""A guess of the right order for models of real size; a rollout replaces it with its first batch."""

PRIORS = {"a100": A100, "cpu": CPU}


@cache
def _calls_per_step(sampler: str) -> int:
    return scheduler_spec(sampler).calls_per_step


def megapixel_steps(key: BatchKey, images: int) -> float:
    """How much there is to draw: megapixels times evaluations of the denoiser, twice as many with guidance.

    Raises:
        SamplerError: The sampler is unknown.
    """
    return evaluations(key.width, key.height, key.sampler, key.steps, guidance=key.cfg > 1) * images


def evaluations(width: int, height: int, sampler: str, steps: int, *, guidance: bool) -> float:
    """Megapixels of one picture times evaluations of the denoiser.

    Raises:
        SamplerError: The sampler is unknown.
    """
    return width * height / 1e6 * steps * _calls_per_step(sampler) * (2 if guidance else 1)


@dataclass
class Sums:
    """What is kept of observations (count, amount, seconds) of one cost: enough for least squares."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    nn: float = 0.0
    nx: float = 0.0
    xx: float = 0.0
    ny: float = 0.0
    xy: float = 0.0

    def add(self, count: float, amount: float, seconds: float, decay: float) -> None:
        """One observation more; earlier ones count `decay` times as much as before."""
        new = Sums(
            count, amount, seconds, count * count, count * amount, amount * amount, count * seconds, amount * seconds
        )
        for name, value in vars(new).items():
            setattr(self, name, getattr(self, name) * decay + value)

    def line(self, prior: Line) -> Line:
        """The line of least squares with neither part below zero, scaled so that it predicts the observed total.

        Observations alike in all but noise can't tell the constant from the slope: they are drawn weakly to the prior's
        split, at the observed scale.
        """
        if self.n <= 0:
            return prior
        if self.y <= 0:
            return Line(0.0, 0.0)
        expected = prior(self.x, self.n)
        scale = self.y / expected if expected > 0 else 0.0
        constant, slope = prior.constant * scale, prior.slope * scale
        typical = self.xx / self.nn  # mean square of an amount
        if typical > 0:
            a, b, d = self.nn + PRIOR_WEIGHT, self.nx, self.xx + PRIOR_WEIGHT * typical
            p, q = self.ny + PRIOR_WEIGHT * constant, self.xy + PRIOR_WEIGHT * typical * slope
            determinant = a * d - b * b
            constant, slope = max(0.0, (p * d - q * b) / determinant), max(0.0, (q * a - p * b) / determinant)
        total = constant * self.n + slope * self.x
        if total <= 0:
            return Line(self.y / self.n, 0.0)
        return Line(constant * self.y / total, slope * self.y / total)


@dataclass
class CostModel:
    """Seconds of loading and drawing.

    Attributes:
        priors: What is assumed where nothing was observed.
        half_life: After how many observations of a cost an observation counts half; none: all count the same. A rollout
            whose machine slows down wants some hundreds.
        observed: How many batches were observed.
    """

    priors: Priors = A100
    half_life: float | None = None
    observed: int = 0
    _draw: dict[str, Sums] = field(default_factory=dict)
    _read: Sums = field(default_factory=Sums)
    _build: Sums = field(default_factory=Sums)
    _lora: Sums = field(default_factory=Sums)
    _lines: dict[str, Line] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"`half_life` must be above 0, or none, but is {self.half_life}.")

    def draw_line(self, base_model: str) -> Line:
        """A batch of a base model, scored and stored, per megapixel-step.

        One that was never drawn is assumed to differ from its prior by as much as the ones that were.
        """
        if base_model not in self._lines:
            if base_model in self._draw:
                line = self._draw[base_model].line(self.priors.draw_line(base_model))
            else:
                expected = sum(self.priors.draw_line(name)(sums.x, sums.n) for name, sums in self._draw.items())
                scale = sum(sums.y for sums in self._draw.values()) / expected if expected > 0 else 1.0
                line = Line(*(scale * part for part in self.priors.draw_line(base_model)))
            self._lines[base_model] = line
        return self._lines[base_model]

    def draw_seconds(self, batch: Batch) -> float:
        """Seconds to draw a batch with everything loaded."""
        return self.draw_line(batch.key.base_model)(megapixel_steps(batch.key, len(batch.jobs)))

    def read_line(self) -> Line:
        """A checkpoint's weights from disk into memory, per GB."""
        return self._line("read", self._read, self.priors.read)

    def build_seconds(self, size: int) -> float:
        """Seconds to make a pipeline on the device of a checkpoint of so many bytes that is in memory."""
        return self._line("build", self._build, self.priors.build)(size / GB)

    def load_seconds(self, size: int) -> float:
        """Seconds to read a checkpoint of so many bytes and build its pipeline, nothing of it done ahead."""
        return self.read_line()(size / GB) + self.build_seconds(size)

    def lora_seconds(self) -> float:
        """Seconds to swap a LoRA."""
        return self._line("lora", self._lora, Line(self.priors.lora, 0.0)).constant

    def _line(self, name: str, sums: Sums, prior: Line) -> Line:
        if name not in self._lines:
            self._lines[name] = sums.line(prior)
        return self._lines[name]

    def observe(self, batch: Batch, spent: Spent, size: int = 0) -> None:
        """Learn from a batch.

        Args:
            batch: Which one.
            spent: What it cost. If it does not say `read_seconds` and `build_seconds`, all of `load_seconds` is taken
                for reading where something was read, and for building where not.
            size: Bytes of the batch's checkpoint, for one that was read with an earlier batch.
        """
        if not all(math.isfinite(value) and value >= 0 for value in spent):
            raise ValueError(f"What a batch spent must be finite and not below 0, but is {spent}.")
        decay = 1.0 if self.half_life is None else 0.5 ** (1 / self.half_life)
        if spent.draw_seconds > 0:
            images = spent.images or len(batch.jobs)
            sums = self._draw.setdefault(batch.key.base_model, Sums())
            seconds = spent.draw_seconds + spent.after_seconds  # a worker does one after the other
            sums.add(spent.batches or 1, megapixel_steps(batch.key, images), seconds, decay)
        if spent.loads:
            waited = spent.load_seconds - spent.build_seconds
            self._read.add(spent.loads, spent.loaded_bytes / GB, spent.read_seconds or max(0.0, waited), decay)
        self._observe_building(spent, size, decay)
        if spent.lora_seconds > 0:  # taking the last one out costs time, too
            self._lora.add(spent.lora_loads, 0.0, spent.lora_seconds, decay)
        self.observed += 1
        self._lines.clear()

    def _observe_building(self, spent: Spent, size: int, decay: float) -> None:
        amount = size / GB if size or not spent.loads else spent.loaded_bytes / GB / spent.loads
        if spent.build_seconds > 0:
            self._build.add(1, amount, spent.build_seconds, decay)
        elif spent.loads and spent.load_seconds >= spent.read_seconds:  # nothing was read ahead
            self._build.add(1, amount, spent.load_seconds - (spent.read_seconds or spent.load_seconds), decay)
        elif not spent.loads and spent.load_seconds > 0:
            self._build.add(1, amount, spent.load_seconds, decay)

    @classmethod
    def fit(
        cls, records: Iterable[tuple[Batch, Spent]], sizes: Mapping[str, int] | None = None, priors: Priors = A100
    ) -> "CostModel":
        """The costs of a run, from all its batches alike: totals of what was observed are reproduced exactly.

        Args:
            records: Each batch and what it cost.
            sizes: Bytes by checkpoint name; see `observe`.
            priors: What is assumed of what the run did not do.
        """
        model = cls(priors)
        for batch, spent in records:
            model.observe(batch, spent, (sizes or {}).get(batch.key.checkpoint, 0))
        return model

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; `seconds` is for people and not read back."""
        bases = {*self.priors.draw, *self._draw}
        return {
            "seconds": {
                "draw a batch": {base: self.draw_line(base)._asdict() for base in sorted(bases)},
                "read a checkpoint, per GB": self.read_line()._asdict(),
                "build a pipeline, per GB": self._line("build", self._build, self.priors.build)._asdict(),
                "swap a LoRA": self.lora_seconds(),
            },
            "observed": self.observed,
            "half_life": self.half_life,
            "priors": {
                "draw": {base: list(line) for base, line in self.priors.draw.items()},
                "read": list(self.priors.read), "build": list(self.priors.build), "lora": self.priors.lora,
            },
            "sums": {
                "draw": {base: asdict(sums) for base, sums in self._draw.items()},
                "read": asdict(self._read), "build": asdict(self._build), "lora": asdict(self._lora),
            },
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2).encode())

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Read what `save` wrote.

        Raises:
            CostError: The file is missing or no such file.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CostError(f"Can't read the costs {path}: {error.strerror}.") from error
        except ValueError as error:
            raise CostError(f"{path} is not JSON: {error}.") from error
        try:
            priors, sums = value["priors"], value["sums"]
            return cls(
                Priors(
                    {str(base): Line(*map(float, line)) for base, line in priors["draw"].items()},
                    Line(*map(float, priors["read"])), Line(*map(float, priors["build"])), float(priors["lora"]),
                ),
                value["half_life"], int(value["observed"]),
                {str(base): _sums(entry) for base, entry in sums["draw"].items()},
                _sums(sums["read"]), _sums(sums["build"]), _sums(sums["lora"]),
            )  # fmt: skip
        except KeyError as error:
            raise CostError(f"{path} has no `{error.args[0]}`; it must be a file written by CostModel.save.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CostError(f"{path} is no file written by CostModel.save: {error}.") from error


def _sums(entry: Mapping[str, Any]) -> Sums:
    sums = Sums(**{name: float(value) for name, value in entry.items()})
    if not all(math.isfinite(value) and value >= 0 for value in vars(sums).values()):
        raise ValueError(f"sums must be finite and not below 0, but are {dict(entry)}")
    return sums
