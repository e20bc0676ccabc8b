"""How long the pocket world takes: to be built, and to draw 1,000 pictures, beside a loop over diffusers' pipelines.

    python benchmarks/pocket_world.py --json

Ours: `rollouts.run` with as many Ray workers as there are cores. The loop: one process, one picture per call of the
pipeline, with as many threads as there are cores, on a sample of the same calls. 20 steps, cfg 7, 64 x 64, all usable
models in turn.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from machine import machine

from pocket.catalogue import usable_models
from pocket.drawing import caption, random_scenes
from pocket.world import NATIVE_SIDE, build
from rollouts.catalog import Catalog
from rollouts.run import RunConfig
from rollouts.run import main as run

STEPS, CFG, SAMPLER = 20, 7.0, "Euler a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--peer_pictures", type=int, default=36, help="Pictures of the loop.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="Print the result as JSON only.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        started = time.perf_counter()
        catalog = build(world)
        built = time.perf_counter() - started
        calls = _calls(catalog, args.pictures)
        result = machine() | {"build_seconds": round(built, 1)}
        ours = _ours(world, calls, args.workers, Path(folder))
        loop = _loop(world, calls[:: max(1, len(calls) // args.peer_pictures)], args.workers)
    result |= {
        "pictures": len(calls), "seconds": round(ours, 1), "seconds_per_picture": round(ours / len(calls), 4),
        "diffusers_loop_seconds_per_picture": round(loop, 4), "ratio": round(loop / (ours / len(calls)), 2),
    }  # fmt: skip
    print(json.dumps(result, indent=None if args.json else 1))


def _calls(catalog: Catalog, count: int) -> list[dict]:
    """Rows of a table of calls: a model and a prompt each."""
    models, scenes = usable_models(), random_scenes(count, 7)
    rows = []
    for number, scene in enumerate(scenes):
        parameters = {"sampling method": SAMPLER, "sampling steps": STEPS, "cfg scale": CFG}
        call = catalog.reconstruct(models[number % len(models)].catalog_name, parameters).to_dict()
        rows.append({"prompt_id": str(number), "instruction": caption(scene), "call": call})
    return rows


def _ours(world: Path, calls: list[dict], workers: int, folder: Path) -> float:
    """Seconds that the rollout took, from its start to its tables."""
    table = folder / "calls.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in calls))
    config = RunConfig(
        calls=str(table), catalog=str(world / "catalog.jsonl"), weights=str(world), output=str(folder / "out"),
        num_images=1, native_side=NATIVE_SIDE, batch_size=16, device="cpu", num_threads=1,
        pool="ray" if workers > 1 else "in_process", num_workers=workers,
    )  # fmt: skip
    started = time.perf_counter()
    run(config)
    return time.perf_counter() - started


def _loop(world: Path, calls: list[dict], threads: int) -> float:
    """Seconds a picture of a loop that loads a pipeline and draws one picture per call."""
    import torch
    from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler

    from pocket.catalogue import BY_SLUG, MODELS

    by_name = {model.catalog_name: model for model in MODELS}
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for row in calls:
        model = by_name[row["call"]["model"]]
        checkpoint = BY_SLUG[model.base] if model.base else model
        pipeline = DiffusionPipeline.from_pretrained(world / checkpoint.uri, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if model.base:
            pipeline.load_lora_weights(world / model.uri)
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
        pipeline(row["instruction"], num_inference_steps=STEPS, guidance_scale=CFG, height=64, width=64)
    return (time.perf_counter() - started) / len(calls)


if __name__ == "__main__":
    main()
