"""Scores and times of our scorers and of their bare towers for benchmarks/reward_parity.py, one process each (memory).

The job is benchmarks/official_scores.py's, with `dtype` and `role`: `ours`, or `limit`: the forward passes alone, on
tensors that are ready, with texts padded to the official lengths.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import load_scorer
from rewards.blip import lower_precision
from rewards.images import load_image
from rewards.scorer import pick_dtype


def limit_of_hps(scorer: Any, dtype: torch.dtype, prompts: list[str], images: list[str]) -> Callable[[], Tensor]:
    """Both towers of HPS v2 over each distinct prompt and image."""
    import open_clip

    model = scorer.towers.model.to(dtype)
    pixels = torch.stack([scorer.preprocess(load_image(image)) for image in images]).to(scorer.device, dtype)
    tokens = open_clip.get_tokenizer("ViT-H-14")(prompts).to(scorer.device)
    return lambda: model.encode_text(tokens, normalize=True) @ model.encode_image(pixels, normalize=True).T


def limit_of_image_reward(
    scorer: Any, dtype: torch.dtype, prompts: list[str], images: list[str]
) -> Callable[[], Tensor]:
    """The vision encoder over each image, and the text encoder over every pair at the official 35 tokens."""
    pixels = torch.stack([scorer.preprocess(load_image(image)) for image in images]).to(scorer.device, dtype)
    lower_precision(scorer.model.blip, dtype)
    texts = scorer.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    input_ids = texts["input_ids"].repeat_interleave(len(images), 0).to(scorer.device)
    mask = texts["attention_mask"].bool().repeat_interleave(len(images), 0).to(scorer.device)
    image_of = torch.arange(len(images), device=scorer.device).repeat(len(prompts))

    def forward() -> Tensor:
        encoded = scorer.model.blip.visual_encoder(pixels)
        features = scorer.model.blip.text_encoder(input_ids, mask, encoded, image_of)
        return scorer.model.mlp(features.float()).view(len(prompts), len(images))

    return forward


LIMITS = {"hps_v2": limit_of_hps, "image_reward": limit_of_image_reward}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run the job's cases."""
    job = json.load(sys.stdin)
    started = time.perf_counter()
    options = {"tokenizer": job["tokenizer"]} if job["scorer"] == "image_reward" else {}
    dtype = pick_dtype(job["dtype"])
    loaded = torch.float32 if job["role"] == "limit" else dtype
    scorer: Any = load_scorer(
        job["scorer"], checkpoint=job["checkpoint"], device=job["device"], dtype=loaded, num_workers=1, **options
    )
    first = job["cases"][0]
    scorer(first["prompts"][:1], first["images"][:1])
    result: dict[str, Any] = {"ready": time.perf_counter() - started, "cases": {}}
    for case in job["cases"]:
        prompts, images = case["prompts"], case["images"]
        if job["role"] == "limit":
            run = LIMITS[job["scorer"]](scorer, dtype, prompts, images)
        else:
            pairs = [prompt for prompt in prompts for _ in images], images * len(prompts)
            run = lambda pairs=pairs, images=images: scorer(*pairs).view(-1, len(images))  # noqa: E731
        seconds, scores = [], torch.empty(0)
        with torch.inference_mode():
            for _ in range(case["repeats"]):
                started = time.perf_counter()
                scores = run()
                synchronize(scorer.device)
                seconds.append(time.perf_counter() - started)
        result["cases"][case["name"]] = {"seconds": min(seconds), "scores": scores.tolist()}
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
