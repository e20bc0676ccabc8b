"""What a rollout would have to draw, for planning on paper: `Synthetic` invents a table of calls of any size."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rollouts.costs import GB
from rollouts.requests import BatchKey

ASSUMED_GB = {
    ("Checkpoint", "SD 1.5"): 3.4,
    ("Checkpoint", "SDXL 1.0"): 6.9,
    ("LoRA", "SD 1.5"): 0.1,
    ("LoRA", "SDXL 1.0"): 0.3,
}
"""Where a catalogue does not say: means over Civitai's SD 1.5 files of July 2023; a full and a typical SDXL file."""

# Civitai's SD 1.5 versions of July 2023, in counts: what the samples of 2,525 usable ones were made with, and the sizes
# of all files. Rare values are left out.
_SIZES = {(512, 768): 965, (512, 512): 511, (768, 512): 98, (768, 768): 53, (512, 640): 52, (512, 704): 42,
          (768, 1024): 40, (640, 960): 31}  # fmt: skip
_SAMPLERS = {"DPM++ 2M Karras": 1090, "Euler a": 654, "DPM++ SDE Karras": 396, "DPM++ 2S a Karras": 104, "DDIM": 65,
             "Euler": 53, "UniPC": 44, "DPM++ 2M SDE Karras": 36}  # fmt: skip
_STEPS = {20: 930, 30: 448, 25: 221, 40: 127, 28: 111, 24: 92, 50: 77, 35: 71, 32: 48, 45: 42}
_CFG = {7.0: 1466, 8.0: 213, 6.0: 138, 5.0: 109, 9.0: 89, 11.0: 81, 7.5: 68, 10.0: 59}
_CHECKPOINT_GB = {2.13: 1537, 2.4: 143, 3.9: 143, 4.1: 102, 4.27: 569, 5.7: 112, 7.7: 80}
_LORA_GB = {0.038: 2790, 0.076: 864, 0.151: 2216, 0.3: 101}


@dataclass
class Workload:
    """Pictures to draw.

    Attributes:
        keys: Of each picture, in the table's order: call by call, seed by seed.
        sizes: Bytes by model name.
        failures: Calls that can't be drawn, by reason.
    """

    keys: list[BatchKey]
    sizes: dict[str, int]
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def models(self) -> int:
        """Different checkpoints and LoRAs."""
        return len({key.checkpoint for key in self.keys} | {key.lora for key in self.keys if key.lora})

    @property
    def checkpoints(self) -> int:
        """Different checkpoints."""
        return len({key.checkpoint for key in self.keys})


@dataclass(frozen=True)
class Synthetic:
    """An invented table of calls of SD 1.5 models.

    Attributes:
        models: Checkpoints and LoRAs together.
        lora_share: Of the models; DiffAgent Sec. 3.1 has 77%.
        prompts: Each with `candidates` calls.
        candidates: See above.
        seeds: Pictures of each call.
        zipf: The r-th most popular model is called in proportion to r ** -zipf; 0: all alike. The same law says which
            checkpoint a LoRA is made for.
        seed: Of all chance.
    """

    models: int = 5500
    lora_share: float = 0.77
    prompts: int = 5000
    candidates: int = 6
    seeds: int = 10
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("models", "prompts", "candidates", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if not 0 <= self.lora_share < 1:
            raise ValueError(f"`lora_share` must be from 0 to less than 1, but is {self.lora_share}.")
        if self.zipf < 0:
            raise ValueError(f"`zipf` must not be below 0, but is {self.zipf}.")

    def workload(self) -> Workload:
        """Draw the table; the same numbers give the same table."""
        chance = random.Random(self.seed)
        loras = round(self.models * self.lora_share)
        kinds = ["LoRA"] * loras + ["Checkpoint"] * (self.models - loras)
        chance.shuffle(kinds)  # position is popularity
        checkpoints = [f"checkpoint {rank}" for rank, kind in enumerate(kinds) if kind == "Checkpoint"]
        base = _Draw({name: (rank + 1) ** -self.zipf for rank, name in enumerate(checkpoints)}, chance)
        models = [
            (f"checkpoint {rank}", "") if kind == "Checkpoint" else (base(), f"lora {rank}")
            for rank, kind in enumerate(kinds)
        ]
        model = _Draw({pair: (rank + 1) ** -self.zipf for rank, pair in enumerate(models)}, chance)
        size, sampler, steps, cfg = (_Draw(shares, chance) for shares in (_SIZES, _SAMPLERS, _STEPS, _CFG))
        keys = []
        for _ in range(self.prompts * self.candidates):
            checkpoint, lora = model()
            width, height = size()
            key = BatchKey("SD 1.5", checkpoint, lora, 1.0, sampler(), width, height, steps(), cfg(), 1)
            keys += [key] * self.seeds
        checkpoint_gb, lora_gb = _Draw(_CHECKPOINT_GB, chance), _Draw(_LORA_GB, chance)
        sizes = {name: round(checkpoint_gb() * GB) for name in checkpoints}
        sizes |= {lora: round(lora_gb() * GB) for _, lora in models if lora}
        return Workload(keys, sizes)


class _Draw:
    """One of some values, each as often as its weight says."""

    def __init__(self, weights: Mapping[Any, float], chance: random.Random) -> None:
        self._values, self._chance = list(weights), chance
        self._cumulative = list(accumulate(weights.values()))

    def __call__(self) -> Any:
        return self._chance.choices(self._values, cum_weights=self._cumulative)[0]
