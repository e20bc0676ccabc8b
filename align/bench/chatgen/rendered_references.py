"""Pictures that chats point to, drawn from their demonstrations where the community's own can't be had."""

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from align.bench.chatgen.references import picture_path
from align.bench.chatgen.schema import Demonstration
from rewards.files import write_atomically
from rollouts.api import APICall
from rollouts.catalog import Catalog
from rollouts.requests import RenderError, RenderJob, RenderRequest, RenderSettings, resolve
from rollouts.weights import WeightFolder

AT_ONCE = 32
SEED = 0  # one picture of each demonstration


def draw(
    demonstrations: Sequence[Demonstration], catalog: Catalog, weights: Path, folder: Path, settings: RenderSettings
) -> dict[str, str]:
    """Draw each demonstration's picture as it says, model after model; what is there already is not drawn again.

    Args:
        demonstrations: Their models are in the catalogue.
        catalog: With files.
        weights: Folder of the files.
        folder: Made if missing.
        settings: How to draw.

    Returns:
        Why a demonstration has no picture, by its id.
    """
    from rollouts.rendering import DiffusersRenderer

    folder.mkdir(parents=True, exist_ok=True)
    missing = [item for item in demonstrations if not picture_path(item, folder).is_file()]
    problems: dict[str, str] = {}  # by id
    jobs: list[tuple[RenderJob, Demonstration]] = []
    for item in missing:
        try:
            jobs.append((resolve(request_of(item, catalog), catalog, settings), item))
        except RenderError as error:
            problems[item.id] = error.failure.reason
    # Checkpoint by checkpoint, so that each is loaded once.
    jobs.sort(key=lambda pair: pair[0].batch_key)
    renderer = DiffusersRenderer(catalog, WeightFolder(weights), settings)
    with tqdm(total=len(jobs), desc="reference pictures", unit="picture", disable=None) as progress:
        for _, group in groupby(jobs, key=lambda pair: pair[0].batch_key[:2]):
            pairs = list(group)
            for start in range(0, len(pairs), AT_ONCE):
                some = pairs[start : start + AT_ONCE]
                for (_, item), result in zip(some, renderer.render([job for job, _ in some]), strict=True):
                    if result.image is None:
                        problems[item.id] = result.failure.reason if result.failure else "unknown"
                        continue
                    data = io.BytesIO()
                    result.image.save(data, "PNG")
                    write_atomically(picture_path(item, folder), data.getvalue())
                progress.update(len(some))
    return problems


def request_of(item: Demonstration, catalog: Catalog) -> RenderRequest:
    """The demonstration as a picture to draw.

    Raises:
        RenderError: Its model is not in the catalogue.
    """
    entry = catalog.get(item.model)
    if entry is None:
        raise RenderError("unknown_model", f"{item.model!r} is not in the catalogue.")
    given = item.arguments
    call = APICall.from_dict(
        entry.default_call().to_dict()
        | {
            "width": given["width"],
            "height": given["height"],
            "sampling method": given["sampler"],
            "sampling steps": given["steps"],
            "cfg scale": given["cfg_scale"],
        }
    )
    return RenderRequest(call, item.prompt, item.negative_prompt, SEED, clip_skip=given["clip_skip"] or 1)
