"""What there is to learn in the pocket world: every model with several parameters, on prompts nothing was trained on.

    python -m pocket.study --world runs/world --output runs/study

Draws and scores every call for every prompt with the project's own rollout (a killed run goes on), then compares ways
of choosing a call by the unified metric, says which model is best for which prompt, and whether the scorers agree with
the judge. Writes study.json and study.md beside the rollout's own files.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.evaluation.metrics import bootstrap
from pocket.catalogue import BY_SLUG, PocketModel, usable_models
from pocket.drawing import ATTRIBUTES, STYLES, Scene, caption, random_scenes
from pocket.world import GENERAL, NATIVE_SIDE, SCORERS, WEIGHTS, WorldError, build
from rewards import load_scorer
from rewards.commandline import run_command
from rewards.files import write_atomically
from rollouts.api import DEFAULT_CFG, DEFAULT_SAMPLER, DEFAULT_STEPS
from rollouts.catalog import Catalog

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """Parameters of a call."""

    sampler: str
    steps: int
    cfg: float


_PARAMETERS = ("sampling method", "sampling steps", "cfg scale")
SETTINGS = (
    Setting(DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_CFG),  # DiffAgent's default call
    Setting("DPM++ 2M Karras", 20, 3.0),
    Setting("DPM++ 2M Karras", 20, 1.5),
    Setting("DDIM", 50, 5.0),
)


@dataclass
class StudyConfig:
    """Options of `python -m pocket.study`."""

    world: str = field(metadata={"help": "Folder of the world's models; built if it is empty."})
    output: str = field(metadata={"help": "Folder of the results."})
    prompts_per_style: int = field(default=3, metadata={"help": "Held-out prompts of each style."})
    num_images: int = field(default=4, metadata={"help": "Pictures per call; an even number."})
    num_workers: int = field(default=1, metadata={"help": "Processes that draw; more than one by Ray."})
    seed: int = field(default=0, metadata={"help": "Of prompts and pictures."})

    def __post_init__(self) -> None:
        if self.num_images < 2 or self.num_images % 2:
            raise ValueError(f"`num_images` must be even and at least 2, but is {self.num_images}.")


class Choice(NamedTuple):
    """One column of the study: a model and how it is called."""

    model: PocketModel
    setting: Setting


@dataclass(frozen=True)
class Drawn:
    """Everything that was drawn.

    Attributes:
        scenes: Of the prompts.
        choices: Of the calls.
        rewards: Unified metric of each picture, (prompts, choices, images).
        scores: By scorer, likewise.
        images: Where each picture lies: prompt, choice, picture.
    """

    scenes: list[Scene]
    choices: list[Choice]
    rewards: np.ndarray
    scores: dict[str, np.ndarray]
    images: list[list[list[str]]]


def main(config: StudyConfig) -> dict[str, Any]:
    """Draw, score, compare; returns what study.json says."""
    catalog = build(config.world)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    scenes = [
        scene
        for style in STYLES
        for scene in random_scenes(config.prompts_per_style, config.seed + 500, held_out=True, styles=(style,))
    ]
    choices = [Choice(model, setting) for model in usable_models() for setting in SETTINGS]
    write_atomically(output / "calls.jsonl", _calls_table(scenes, choices, catalog).encode())
    _roll_out(config, output)
    drawn = _read(output, scenes, choices)
    pictures = _pictures(drawn)
    report = compare(drawn) | {"agreement": agreement(drawn, _qualities(drawn, pictures))}
    report["right_caption"] = right_captions(drawn, pictures)
    report["images"] = int(drawn.rewards.size)
    write_atomically(output / "study.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "study.md", to_markdown(report).encode())
    logger.info("%s", to_markdown(report))
    return report


def compare(drawn: Drawn) -> dict[str, Any]:
    """Ways of choosing a call, by the mean unified metric over prompts with 95 % intervals.

    Where the best of several calls is chosen by reward it is chosen on one half of the pictures and judged on the
    other, both ways round, so that luck with seeds does not count. The best call for all prompts is chosen on all
    prompts but the one it is judged on.
    """
    rewards, choices = drawn.rewards, drawn.choices
    means, rows = rewards.mean(-1), np.arange(len(rewards))
    with_defaults = [i for i, choice in enumerate(choices) if choice.setting == SETTINGS[0]]
    others = (means.sum(0) - means) / max(1, len(means) - 1)
    popular = max(usable_models(), key=lambda model: model.downloads)
    general = BY_SLUG[GENERAL["SD 1.5"]]
    ways = {
        "oracle: best call per prompt": _best_per_prompt(rewards),
        "best model per prompt, default parameters": _best_per_prompt(rewards[:, with_defaults]),
        "best single call for all prompts": means[rows, others.argmax(1)],
        "default call (of the most popular model)": means[:, choices.index(Choice(popular, SETTINGS[0]))],
        "general model, default parameters": means[:, choices.index(Choice(general, SETTINGS[0]))],
        "community's distribution": (means * community_shares(drawn.scenes, choices)).sum(1),
        "any call": means.mean(1),
    }
    best = Counter(choices[i].model.catalog_name for i in means.argmax(1))
    settings: dict[str, Any] = {}
    for model in {choice.model.slug: choice.model for choice in choices}.values():
        own = [i for i, choice in enumerate(choices) if choice.model == model]
        relevant = [i for i, scene in enumerate(drawn.scenes) if not model.style or scene.style == model.style]
        by_setting = {_say(choices[i].setting): round(float(means[relevant, i].mean()), 4) for i in own}
        settings[model.catalog_name] = {"best": max(by_setting, key=by_setting.__getitem__), "reward": by_setting}
    return {
        "ways": {name: bootstrap(values.tolist())._asdict() for name, values in ways.items()},
        "best_model_by_prompt": dict(best.most_common()),
        "settings_on_own_style": settings,
    }


def agreement(drawn: Drawn, qualities: np.ndarray) -> dict[str, float]:
    """Kendall's tau over models between each scorer's mean and the judge's mean quality.

    Args:
        drawn: Its scores.
        qualities: The judge's, (prompts, choices, images).
    """
    from scipy.stats import kendalltau

    slugs = list(dict.fromkeys(choice.model.slug for choice in drawn.choices))
    columns = [[i for i, choice in enumerate(drawn.choices) if choice.model.slug == slug] for slug in slugs]
    truth = [float(qualities[:, own].mean()) for own in columns]
    taus = {}
    for name, values in {**drawn.scores, "unified": drawn.rewards}.items():
        taus[name] = round(float(kendalltau([float(values[:, own].mean()) for own in columns], truth).statistic), 3)
    return taus


def right_captions(drawn: Drawn, pictures: np.ndarray) -> dict[str, float]:
    """How often CLIP prefers a picture's caption to all that differ in one attribute, for the best call of each style.

    That call is chosen on one half of the pictures and looked at in the other: CLIP has a part in the reward.

    Args:
        drawn: Rewards say which call is the best for the prompts of a style.
        pictures: uint8, (prompts, choices, images, 64, 64, 3).
    """
    from PIL import Image

    clip = load_scorer(**SCORERS["clip_score"])
    right: dict[str, list[bool]] = {attribute: [] for attribute in ATTRIBUTES}
    for style in STYLES:
        rows = [row for row, scene in enumerate(drawn.scenes) if scene.style == style]
        best = int(drawn.rewards[rows][..., ::2].mean((0, 2)).argmax())
        for row in rows:
            images = [Image.fromarray(picture) for picture in pictures[row, best, 1::2]]
            for attribute, values in ATTRIBUTES.items():
                captions = [caption(replace(drawn.scenes[row], **{attribute: value})) for value in values]
                scores = clip(captions * len(images), [image for image in images for _ in values])
                chosen = scores.view(len(images), len(values)).argmax(1)
                right[attribute] += (chosen == values.index(getattr(drawn.scenes[row], attribute))).tolist()
    return {attribute: round(float(np.mean(hits)), 3) for attribute, hits in right.items()}


def community_shares(scenes: list[Scene], choices: list[Choice]) -> np.ndarray:
    """How often people call each choice for each scene, (scenes, choices), rows adding up to 1.

    Models that are for the scene's style or for everything, as often as they were downloaded; parameters as in the
    models' habits, each taken for the nearest cfg scale of the study.
    """
    shares = np.zeros((len(scenes), len(choices)))
    for row, scene in enumerate(scenes):
        for column, (model, setting) in enumerate(choices):
            if model.style in ("", scene.style):
                cfgs = model.habits.cfg
                nearest = [min(SETTINGS, key=lambda other: abs(other.cfg - cfg)) for cfg in cfgs]
                shares[row, column] = model.downloads * nearest.count(setting) / len(cfgs)
    return shares / shares.sum(1, keepdims=True)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["| way of choosing | unified metric, 95 % interval |", "| --- | --- |"]
    lines += [
        f"| {name} | {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}] |"
        for name, entry in report["ways"].items()
    ]
    lines += ["", "| model | prompts it is best for, by the mean of all pictures |", "| --- | --- |"]
    lines += [f"| {name} | {count} |" for name, count in report["best_model_by_prompt"].items()]
    lines += ["", "| model | best parameters on its own style |", "| --- | --- |"]
    lines += [f"| {name} | {entry['best']} |" for name, entry in report["settings_on_own_style"].items()]
    lines += ["", "| scorer | Kendall's tau with the judge, over models |", "| --- | --- |"]
    lines += [f"| {name} | {tau:.2f} |" for name, tau in report["agreement"].items()]
    lines += ["", "| attribute | CLIP prefers the right caption (best call of each style) |", "| --- | --- |"]
    lines += [f"| {name} | {share:.0%} |" for name, share in report["right_caption"].items()]
    return "\n".join(lines) + "\n"


def _best_per_prompt(rewards: np.ndarray) -> np.ndarray:
    """Reward of the best call of each prompt, chosen on one half of the pictures and judged on the other."""
    even, odd, rows = rewards[..., ::2].mean(-1), rewards[..., 1::2].mean(-1), np.arange(len(rewards))
    return (odd[rows, even.argmax(1)] + even[rows, odd.argmax(1)]) / 2


def _say(setting: Setting) -> str:
    return f"{setting.sampler}, {setting.steps} steps, cfg {setting.cfg:g}"


def _calls_table(scenes: list[Scene], choices: list[Choice], catalog: Catalog) -> str:
    calls = [
        catalog.reconstruct(model.catalog_name, dict(zip(_PARAMETERS, setting, strict=True))).to_dict()
        for model, setting in choices
    ]
    lines = []
    for number, scene in enumerate(scenes):
        candidates = [{"response": "", "origin": "study", "call": call} for call in calls]
        instruction = {"prompt": caption(scene), "negative prompt": ""}
        lines.append(json.dumps({"prompt_id": f"{number:03}", "instruction": instruction, "candidates": candidates}))
    return "\n".join(lines) + "\n"


def _roll_out(config: StudyConfig, output: Path) -> None:
    from rollouts.run import RunConfig
    from rollouts.run import main as run

    settings = RunConfig(
        calls=str(output / "calls.jsonl"), catalog=str(Path(config.world) / "catalog.jsonl"), weights=config.world,
        output=str(output / "rollout"), num_images=config.num_images, seed=config.seed, scorers=SCORERS,
        native_side=NATIVE_SIDE, batch_size=32, device="cpu",
    )  # fmt: skip
    if config.num_workers > 1:
        settings = replace(settings, pool="ray", num_workers=config.num_workers, num_threads=1)
    run(settings)


def _read(output: Path, scenes: list[Scene], choices: list[Choice]) -> Drawn:
    import pyarrow.parquet as pq
    import torch

    from rewards.unified import UnifiedMetric

    rows = pq.read_table(output / "rollout" / "scored.parquet").to_pylist()
    candidates = [row["candidates"] for row in rows]
    if failed := Counter(c["error"] for row in candidates for c in row if c["reward"] is None):
        raise WorldError(
            f"{output}: {failed.total()} calls have no reward, most of them: {failed.most_common(1)[0][0]}"
        )
    scores = {
        name: np.array([[c["scores"][name] for c in row] for row in candidates], float) for name in SCORERS
    }  # fmt: skip
    metric = UnifiedMetric.load(output / "rollout" / "unified.json")
    flat = metric({name: torch.from_numpy(values.ravel()).float() for name, values in scores.items()})
    shape = next(iter(scores.values())).shape
    return Drawn(
        scenes, choices, flat.values.numpy().reshape(shape), scores, [[c["images"] for c in row] for row in candidates]
    )


def _pictures(drawn: Drawn) -> np.ndarray:
    """uint8 (prompts, choices, images, 64, 64, 3)."""
    from PIL import Image

    def read(path: str) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    return np.stack([[np.stack([read(path) for path in paths]) for paths in row] for row in drawn.images])


def _qualities(drawn: Drawn, pictures: np.ndarray) -> np.ndarray:
    from pocket.judge import Judge

    judge = Judge.load(WEIGHTS / "judge")
    qualities = np.zeros(drawn.rewards.shape)
    for row, scene in enumerate(drawn.scenes):
        flat = pictures[row].reshape(-1, *pictures.shape[-3:])
        qualities[row] = judge(flat, [scene] * len(flat)).quality.numpy().reshape(qualities.shape[1:])
    return qualities


if __name__ == "__main__":
    run_command(main, StudyConfig, errors=(WorldError, OSError))
