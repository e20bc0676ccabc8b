"""What the pocket community posted: for every model, pictures in posts of a few with the same settings each.

Settings follow a model's `Habits`: every value as often as it stands there, the first one half a time more, so that it
is the most frequent one. One picture in eight is an outlier. Nothing depends on the clock or on global random state.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pocket.catalogue import MODELS, PocketModel, version_id
from pocket.community_plan import apportion
from pocket.drawing import Scene
from pocket.dump_prompts import NEGATIVES, pick_scene, prompt_key, reword, write_prompt
from rollouts.calls_table import seeds_of

OUTLIER_SHARE = 1 / 8
OUTLIERS: tuple[tuple[str, Any], ...] = (("cfg", 15.0), ("steps", 4), ("cfg", 1.0), ("steps", 50), ("sampler", None))
"""In turn, beginning somewhere else for each model; the sampler is one of `OTHER_SAMPLERS`."""
OTHER_SAMPLERS = (
    "Euler", "Heun", "LMS", "LMS Karras", "DPM++ SDE Karras", "DPM++ 2M SDE Karras", "DPM++ 2S a Karras",
    "DPM2 a Karras",
)  # fmt: skip
SIZES = {"SD 1.5": {(512, 512): 0.8, (512, 768): 0.2}, "SDXL 1.0": {(1024, 1024): 1.0}}
WEIGHTS = {1.0: 0.6, 0.8: 0.25, 0.7: 0.15}
"""Of LoRAs, as a fraction of what the author advises, and their shares."""
OWN_BASE = 0.85
"""Share of a LoRA's posts that use its own base; the others use another general checkpoint of the architecture."""
ORIGINS = {"fresh": 0.95, "near_duplicate": 0.03, "repeat": 0.02}
"""Of prompts: near-duplicates and repeats take up an earlier one of the same model."""
WEBUIS = {"": 0.6, "v1.6.0": 0.25, "v1.9.4": 0.15}
"""What wrote the data; from 1.9 on sampler and schedule stand apart."""
MAX_PICTURES = 9_999
_TRIES = 100  # for a prompt that nobody had

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Settings:
    """What the pictures of a post have in common; `base` is the slug of the checkpoint, `weight` the LoRA's if any."""

    sampler: str
    steps: int
    cfg: float
    size: tuple[int, int]
    base: str
    weight: float | None
    webui: str
    negative_prompt: str


@dataclass(frozen=True)
class Picture:
    """One picture of a post. Its seed is the one that `rollouts` derives from its id; prompts are without LoRA tags."""

    id: int
    post_id: int
    seed: int
    scene: Scene
    prompt: str
    settings: Settings


def pictures_of(model: PocketModel, count: int, seed: int = 0) -> list[Picture]:
    """The pictures in a model's gallery, the same ones for the same arguments; none for a withheld model.

    Args:
        model: One of the catalogue's.
        count: Pictures, 1 to 9,999.
        seed: Any integer.

    Raises:
        ValueError: If `count` is out of range.
    """
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"`images_per_model` must be between 1 and {MAX_PICTURES}, but got {count}.")
    if model.defect == "nsfw":
        return []
    rng = random.Random(f"{seed}/posts/{model.slug}")
    posts = _posts(rng, model, count)
    prompts = _prompts(rng, model, count)
    settings = [(post, settings) for post, (size, settings) in enumerate(posts) for _ in range(size)]
    first_id = version_id(model) * (MAX_PICTURES + 1)
    return [
        Picture(first_id + i, first_id + post, seeds_of(str(first_id + i), 1, seed)[0], scene, prompt, of_post)
        for i, ((post, of_post), (scene, prompt)) in enumerate(zip(settings, prompts, strict=True))
    ]


def _posts(rng: random.Random, model: PocketModel, count: int) -> list[tuple[int, Settings]]:
    """Sizes and settings of posts with `count` pictures in all, in random order."""
    num_outliers = round(count * OUTLIER_SHARE)
    sizes: list[int] = []
    while (left := count - num_outliers - sum(sizes)) > 0:
        sizes.append(min(left, rng.choice((1, 2, 3, 3, 4, 5))))
    habits = model.habits
    columns = {
        "sampler": _habitual(habits.samplers),
        "steps": _habitual(habits.steps),
        "cfg": _habitual(habits.cfg),
        "size": SIZES[model.base_model],
        "base": _bases(rng, model),
        "weight": {round(model.weight * part, 2): share for part, share in WEIGHTS.items()}
        if model.base
        else {None: 1},
        "webui": WEBUIS,
        "negative_prompt": _habitual(NEGATIVES),
    }
    dealt = [_deal(rng, [*sizes, *[1] * num_outliers], shares) for shares in columns.values()]
    posts = [Settings(**dict(zip(columns, values, strict=True))) for values in zip(*dealt, strict=True)]
    first = MODELS.index(model)
    for i in range(num_outliers):
        name, value = OUTLIERS[(first + i) % len(OUTLIERS)]
        odd: Any = rng.choice(OTHER_SAMPLERS) if value is None else value
        posts[len(sizes) + i] = replace(posts[len(sizes) + i], **{name: odd})
    together = list(zip([*sizes, *[1] * num_outliers], posts, strict=True))
    rng.shuffle(together)
    return together


def _habitual(values: Sequence[Value]) -> dict[Value, float]:
    """Each value by how often it stands there, the first one half a time more."""
    return {value: values.count(value) + 0.5 * (value == values[0]) for value in values}


def _bases(rng: random.Random, model: PocketModel) -> dict[str, float]:
    if model.base is None:
        return {model.slug: 1.0}
    others = [
        other.slug
        for other in MODELS
        if other.base_model == model.base_model
        and not (other.base or other.style or other.defect or other.slug == model.base)
    ]
    rng.shuffle(others)
    return {model.base: OWN_BASE} | {slug: (1 - OWN_BASE) / len(others) for slug in others}


def _deal(rng: random.Random, sizes: Sequence[int], shares: Mapping[Value, float]) -> list[Value]:
    """A value for each post, so that the pictures have them in these shares, as nearly as the posts allow."""
    order = list(range(len(sizes)))
    rng.shuffle(order)
    order.sort(key=lambda post: -sizes[post])  # large ones first: small ones then even out
    whole, total = sum(shares.values()), sum(sizes)
    lacking = {value: total * share / whole for value, share in shares.items()}
    dealt: dict[int, Value] = {}
    for post in order:
        dealt[post] = max(lacking, key=lambda value: lacking[value])
        lacking[dealt[post]] -= sizes[post]
    return [dealt[post] for post in range(len(sizes))]


def _prompts(rng: random.Random, model: PocketModel, count: int) -> list[tuple[Scene, str]]:
    """A scene and a prompt for each picture. Only planned repeats say the same words again."""
    origins = [
        name for name, n in zip(ORIGINS, apportion(count, list(ORIGINS.values())), strict=True) for _ in range(n)
    ]
    rng.shuffle(origins)
    prompts: list[tuple[Scene, str]] = []
    seen: set[str] = set()
    for origin in origins:
        if origin == "repeat" and prompts:
            prompts.append(rng.choice(prompts))
            continue
        for _ in range(_TRIES):
            if origin == "near_duplicate" and prompts:
                scene, earlier = rng.choice(prompts)
                text = reword(rng, earlier)
            else:
                scene = pick_scene(rng, model)
                text = write_prompt(rng, scene, model)
            if prompt_key(text) not in seen:
                break
        seen.add(prompt_key(text))
        prompts.append((scene, text))
    return prompts
