"""How well a model draws what it is asked for, by the judge."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from pocket.drawing import ATTRIBUTES, Scene, caption
from pocket.judge import Judge

_BATCH = 24


@torch.inference_mode()
def sample(pipeline: Any, prompts: Sequence[str], *, steps: int = 20, cfg: float = 3.0, seed: int = 0) -> np.ndarray:
    """Draw one picture per prompt with DPM++ 2M Karras: uint8 (n, 64, 64, 3).

    Args:
        pipeline: A diffusers pipeline of the pocket world.
        prompts: What to draw.
        steps: Of the sampler.
        cfg: Guidance scale.
        seed: Of the first picture; the others count on.
    """
    pipeline = copy.copy(pipeline)  # with its own scheduler; the weights are the same
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )
    drawn = []
    for start in range(0, len(prompts), _BATCH):
        some = list(prompts[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        images = pipeline(
            some, num_inference_steps=steps, guidance_scale=cfg, generator=generators, height=64, width=64,
            output_type="np",
        ).images  # fmt: skip
        drawn.append((images * 255).round().astype(np.uint8))
    return np.concatenate(drawn)


def judged(judge: Judge, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures with the right value of each attribute, mean sharpness and mean quality."""
    truth = torch.tensor([scene.indices() for scene in scenes])
    right = (judge.predict(images) == truth).float().mean(0)
    verdict = judge(images, scenes)
    measured = dict(zip(ATTRIBUTES, right.tolist(), strict=True))
    measured |= {"sharpness": float(verdict.sharpness.mean()), "quality": float(verdict.quality.mean())}
    return {f"judge/{name}": round(value, 3) for name, value in measured.items()}


def measure(pipeline: Any, judge: Judge, scenes: Sequence[Scene], *, cfg: float = 3.0) -> dict[str, float]:
    """What the judge says of one picture per scene, drawn from its full caption."""
    return judged(judge, sample(pipeline, [caption(scene) for scene in scenes], cfg=cfg), scenes)
