"""A contact sheet of a catalogue's models: models x prompts, and for some models steps x cfg.

    python -m pocket.gallery --world runs/pocket/world --output sheet.png
    python -m pocket.gallery --world runs/pocket/world --output sheet.png --models "Pixel Wave - v10" \
        --prompts "a cat, pixel art" --steps 2 8 20 --cfg 1 3 7 15 --samplers "Euler a" DDIM

Models x prompts are drawn with each model's default parameters, all pictures from the same seed. What can't be drawn is
a crossed-out cell that says why.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pocket.contact_sheet import Cell, contact_sheet, stack
from rewards.commandline import run_command
from rewards.files import write_atomically
from rollouts.api import MAX_CFG, MAX_STEPS, MIN_CFG, APICall
from rollouts.catalog import Catalog, CatalogError
from rollouts.rendering import DiffusersRenderer
from rollouts.requests import RenderError, RenderFailure, RenderJob, RenderRequest, RenderSettings, resolve
from rollouts.samplers import KNOWN_SAMPLERS
from rollouts.weights import WeightFolder

logger = logging.getLogger(__name__)

PROMPTS = (
    "a red cat on the grass, flat illustration",
    "a yellow star at night, pixel art",
    "a brown house on a white background, pencil sketch",
    "a blue fish on a black background, neon glow",
    "a pink flower in the sky, watercolor painting",
    "a green car at sunset, comic book",
)
"""One of each style, none of them held out."""


@dataclass
class GalleryConfig:
    """Options of `python -m pocket.gallery`."""

    world: str = field(metadata={"help": "Folder with catalog.jsonl and the weights it names."})
    output: str = field(metadata={"help": "PNG file to write."})
    models: list[str] | None = field(default=None, metadata={"help": "Rows, as the catalogue names them; none: all."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Columns; none: one of each style."})
    grid_models: list[str] | None = field(
        default=None, metadata={"help": "Drawn with all steps and cfg; none: `models`, or the first of the catalogue."}
    )
    steps: list[int] = field(default_factory=lambda: [2, 8, 20], metadata={"help": "Rows of these grids."})
    cfg: list[float] = field(default_factory=lambda: [1.0, 3.0, 7.0, 15.0], metadata={"help": "Their columns."})
    samplers: list[str] | None = field(
        default=None, metadata={"help": "A grid for each; none: one with the model's default sampler."}
    )
    scale: int = field(default=2, metadata={"help": "Pixels of the sheet per pixel of a picture."})
    seed: int = field(default=0, metadata={"help": "Of all pictures."})
    native_side: int = field(default=64, metadata={"help": "Pixels drawn for an architecture's own side."})
    batch_size: int = field(default=8, metadata={"help": "Pictures drawn at once."})

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"`scale` must be at least 1, but is {self.scale}.")
        for name in ("models", "prompts", "grid_models", "steps", "cfg", "samplers"):
            if getattr(self, name) == []:
                raise ValueError(f"`{name}` needs at least one value; leave it out for the default.")
        for name, low, high in (("steps", 1, MAX_STEPS), ("cfg", MIN_CFG, MAX_CFG)):
            if wrong := [value for value in getattr(self, name) if not low <= value <= high]:
                raise ValueError(f"`{name}` must lie in [{low}, {high}], but has {wrong}.")
        if unknown := sorted(set(self.samplers or []) - KNOWN_SAMPLERS):
            raise ValueError(f"`samplers` may hold names such as Euler a and DPM++ 2M Karras, but has {unknown}.")


class Gallery:
    """Draws sheets of the models of a catalogue.

    Args:
        world: Folder with catalog.jsonl and the weights it names.
        native_side: See `RenderSettings`.
        batch_size: Pictures drawn at once.
        seed: Of all pictures.
    """

    def __init__(self, world: str | Path, *, native_side: int = 64, batch_size: int = 8, seed: int = 0):
        self.catalog = Catalog.load(Path(world) / "catalog.jsonl")
        self.settings = RenderSettings(native_side=native_side, batch_size=batch_size)
        self.renderer = DiffusersRenderer(self.catalog, WeightFolder(world), self.settings)
        self.seed = seed

    def models_by_prompts(self, models: Sequence[str], prompts: Sequence[str], scale: int = 1) -> Image.Image:
        """The sheet of models (rows), with their default parameters, and prompts (columns)."""
        calls = [self.catalog[name].default_call() for name in models]
        cells = [self._draw([(call, p) for p in prompts]) for call in tqdm(calls, desc="models", unit="model")]
        labels = [f"{call.model} ({call.type}, {call.base_model}): {_parameters(call)}" for call in calls]
        return contact_sheet(cells, labels, list(prompts), scale=scale)

    def steps_by_cfg(
        self, model: str, prompt: str, steps: Sequence[int], cfg: Sequence[float], sampler: str | None = None,
        scale: int = 1,
    ) -> Image.Image:  # fmt: skip
        """The sheet of a model's steps (rows) and cfg scales (columns).

        Raises:
            APICallError: A value out of range, or an unknown sampler.
        """
        default = self.catalog[model].default_call()
        parameters = default.to_dict() | ({"sampling method": sampler} if sampler else {})
        calls = [
            [APICall.from_dict(parameters | {"sampling steps": rows, "cfg scale": columns}) for columns in cfg]
            for rows in steps
        ]
        drawn = self._draw([(call, prompt) for row in calls for call in row])
        cells = [drawn[start : start + len(cfg)] for start in range(0, len(drawn), len(cfg))]
        title = f"{model}, {sampler or default.sampling_method}: {prompt}"
        labels = [f"{number} steps" for number in steps]
        return contact_sheet(cells, labels, [f"cfg {value:g}" for value in cfg], title=title, scale=scale)

    def _draw(self, wanted: Sequence[tuple[APICall, str]]) -> list[Cell]:
        """Pictures of calls and prompts, or why there is none."""
        cells: list[Cell] = []
        jobs: dict[int, RenderJob] = {}
        for call, prompt in wanted:
            try:
                jobs[len(cells)] = resolve(RenderRequest(call, prompt, seed=self.seed), self.catalog, self.settings)
            except RenderError as error:
                cells.append(_reason(error.failure))
            else:
                cells.append("")
        for index, result in zip(jobs, self.renderer.render(list(jobs.values())), strict=True):
            cells[index] = result.image or _reason(result.failure)
        return cells


def _reason(failure: RenderFailure | None) -> str:
    assert failure is not None
    return f"{failure.reason}: {failure.message}"


def _parameters(call: APICall) -> str:
    return f"{call.sampling_method}, {call.sampling_steps} steps, cfg {call.cfg_scale:g}"


def main(config: GalleryConfig) -> None:
    """Draw the sheets and write them below each other."""
    gallery = Gallery(config.world, native_side=config.native_side, batch_size=config.batch_size, seed=config.seed)
    models, prompts = config.models or list(gallery.catalog), config.prompts or list(PROMPTS)
    grid_models = config.grid_models or config.models or models[:1]
    if unknown := [name for name in (*models, *grid_models) if name not in gallery.catalog]:
        raise CatalogError(f"{config.world} has no model {unknown[0]!r}, but {', '.join(gallery.catalog)}.")
    sheets = [gallery.models_by_prompts(models, prompts, config.scale)]
    for model in tqdm(grid_models, desc="steps x cfg", unit="model"):
        for sampler in config.samplers or [None]:
            sheets.append(gallery.steps_by_cfg(model, prompts[0], config.steps, config.cfg, sampler, config.scale))
    buffer = io.BytesIO()
    stack(sheets).save(buffer, format="PNG")
    write_atomically(config.output, buffer.getvalue())
    logger.info("Wrote %s", config.output)


if __name__ == "__main__":
    run_command(main, GalleryConfig, errors=(CatalogError,))
