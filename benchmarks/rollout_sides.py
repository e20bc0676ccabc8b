"""One side of benchmarks/rollout_speed.py, in a process of its own for its memory: draws calls and writes PNG files.

`naive` and `lru` are what people write around diffusers: a pipeline per call, or an OrderedDict of the last few, both
in the order of the calls, k pictures at once. `planned` is this package. All of them draw the same pictures.
"""

import json
import os
import random
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rollouts.api import APICall
from rollouts.catalog import Catalog
from rollouts.costs import CPU, CostModel
from rollouts.model_sizes import model_sizes
from rollouts.planning import Planner, make_batches
from rollouts.requests import Batch, RenderRequest, RenderSettings, Spent, resolve
from rollouts.schedulers import scheduler_spec
from rollouts.workers import InProcessPool, Pool, WorkerSpec, memory_in_use


class Side(NamedTuple):
    """What a side reports."""

    images: int
    seconds: float
    loads: int
    peak_mb: float


def calls_of(catalog: Catalog, count: int, seed: int) -> list[APICall]:
    """Calls of all models in turn, shuffled."""
    entries = [list(catalog.values())[i % len(catalog)] for i in range(count)]
    random.Random(seed).shuffle(entries)
    return [entry.default_call() for entry in entries]


def requests_of(calls: list[APICall], k: int) -> list[RenderRequest]:
    """k pictures of each call, for a prompt of its own."""
    return [
        RenderRequest(call, f"a fox in the snow, {n}", "blurry", s) for n, call in enumerate(calls) for s in range(k)
    ]


def settings_of(job: dict[str, Any]) -> RenderSettings:
    """As small as the toy models are."""
    return RenderSettings(resolution_scale=0.125, batch_size=job["batch_size"])


class Loop:
    """Diffusers in a loop over calls."""

    def __init__(self, job: dict[str, Any], catalog: Catalog):
        self.folder, self.catalog, self.capacity = Path(job["folder"]), catalog, job["capacity"]
        self.output, self.loads = Path(job["output"]), 0
        self.saved = 0
        self.pipelines: OrderedDict[str, Any] = OrderedDict()

    def pipeline(self, name: str) -> Any:
        """A checkpoint's pipeline; the last `capacity` ones are kept."""
        from diffusers import StableDiffusionPipeline

        if name not in self.pipelines:
            while len(self.pipelines) >= max(self.capacity, 1):
                self.pipelines.popitem(last=False)
            self.loads += 1
            path = self.folder / self.catalog[name].files[0].uri
            self.pipelines[name] = StableDiffusionPipeline.from_pretrained(
                path, safety_checker=None, local_files_only=True, use_safetensors=True
            )
            self.pipelines[name].set_progress_bar_config(disable=True)
        self.pipelines.move_to_end(name)
        return self.pipelines[name]

    def draw(self, requests: list[RenderRequest]) -> None:
        """The k pictures of a call."""
        import diffusers

        call, request = requests[0].call, requests[0]
        entry = self.catalog[call.model]
        pipeline = self.pipeline(entry.base_checkpoint or entry.name)
        spec = scheduler_spec(call.sampling_method)
        pipeline.scheduler = getattr(diffusers, str(spec.scheduler)).from_config(
            pipeline.scheduler.config, **spec.config
        )
        if entry.type == "LoRA":
            pipeline.load_lora_weights(str(self.folder / entry.files[0].uri), adapter_name="lora")
            pipeline.set_adapters("lora", entry.lora_weight or 1.0)
        images = pipeline(
            [request.prompt] * len(requests), negative_prompt=[request.negative_prompt] * len(requests),
            width=call.width // 8, height=call.height // 8, num_inference_steps=call.sampling_steps,
            guidance_scale=call.cfg_scale, generator=[torch.Generator().manual_seed(r.seed) for r in requests],
        ).images  # fmt: skip
        if entry.type == "LoRA":
            pipeline.unload_lora_weights()
        for image in images:
            self.saved += 1
            image.save(self.output / f"{self.saved}.png", compress_level=1)
        if self.capacity == 0:
            self.pipelines.clear()


def loop(job: dict[str, Any], catalog: Catalog) -> Side:
    """The naive loop (capacity 0) or the one with an LRU of pipelines."""
    side, k = Loop(job, catalog), job["k"]
    requests = requests_of(calls_of(catalog, job["calls"], job["seed"]), k)
    started = time.perf_counter()
    for start in range(0, len(requests), k):
        side.draw(requests[start : start + k])
    return _side(len(requests), started, side.loads)


def planned(job: dict[str, Any], catalog: Catalog) -> Side:
    """This package, with as much memory for pipelines as the LRU has."""
    requests = requests_of(calls_of(catalog, job["calls"], job["seed"]), job["k"])
    pool = InProcessPool(spec_of(job, catalog))
    started = time.perf_counter()
    records = list(run_pool(pool, job, catalog, requests))
    side = _side(len(requests), started, sum(spent.loads for _, spent in records))
    if "costs" in job:  # go on with those of an earlier run
        costs = CostModel.load(job["costs"]) if Path(job["costs"]).is_file() else CostModel(CPU)
        sizes = model_sizes(catalog, catalog, job["folder"])
        for batch, spent in records:
            costs.observe(batch, spent, sizes[batch.key.checkpoint])
        costs.save(job["costs"])
    return side


def run_pool(
    pool: Pool, job: dict[str, Any], catalog: Catalog, requests: list[RenderRequest]
) -> Iterator[tuple[Batch, Spent]]:
    """Draw requests with a pool; what each batch took."""
    jobs = [resolve(request, catalog, settings_of(job)) for request in requests]
    batches = make_batches([item.batch_key for item in jobs], job["batch_size"])
    sizes, costs = model_sizes(catalog, catalog, job["folder"]), CostModel(CPU)
    for finished in pool.run(Planner(batches, sizes, costs, workers=pool.num_workers), jobs, requests):
        costs.observe(finished.batch, finished.report.spent, sizes[finished.batch.key.checkpoint])
        yield finished.batch, finished.report.spent


def spec_of(job: dict[str, Any], catalog: Catalog) -> WorkerSpec:
    """A worker with room for `capacity` checkpoints."""
    sizes = model_sizes(catalog, [e.name for e in catalog.values() if e.type == "Checkpoint"], job["folder"])
    return WorkerSpec(
        catalog=str(Path(job["folder"]) / "catalog.jsonl"), weights=job["folder"], settings=settings_of(job),
        device="cpu", device_gb=job["capacity"] * 1.01 * max(sizes.values()) / 1e9, store=job["output"], num_threads=1,
    )  # fmt: skip


def memory(job: dict[str, Any], catalog: Catalog) -> dict[str, Any]:
    """Resident memory after each cycle through all checkpoints, one picture of each: every draw is a switch."""
    pool = InProcessPool(spec_of(job | {"capacity": 2}, catalog))
    checkpoints = [entry for entry in catalog.values() if entry.type == "Checkpoint"]
    after: list[float] = []
    for cycle in range(-(-job["switches"] // len(checkpoints))):
        for entry in checkpoints:
            request = RenderRequest(entry.default_call(), f"a fox, {cycle}", "", 0)
            pool.worker.run([resolve(request, catalog, settings_of(job))], [request])
        after.append(memory_in_use() / 1e6)
    spent = pool.worker.renderer.spent
    return {"switches": spent.loads, "rss_mb": after, "growth": after[-1] / after[0] - 1}


def ray_workers(job: dict[str, Any], catalog: Catalog) -> dict[str, float]:
    """Pictures per second of one worker and of two, the better of two runs each; starting them is not counted."""
    from rollouts.ray_pool import RayOptions, RayPool

    os.environ["RAY_AUTH_MODE"] = "disabled"
    rates = {"1": 0.0, "2": 0.0}
    # 20 steps, as people use: with the toys' 4, the process that hands out the work would be a third worker.
    calls = [call.model_copy(update={"sampling_steps": 20}) for call in calls_of(catalog, job["calls"], job["seed"])]
    requests = requests_of(calls, job["k"])
    for workers in (1, 2, 1, 2):
        with RayPool(spec_of(job, catalog), RayOptions(num_workers=workers)) as pool:
            list(run_pool(pool, job, catalog, requests[: 16 * job["k"]]))  # until all are there and warm
            while len(pool.pids) < workers:
                list(run_pool(pool, job, catalog, requests[: job["k"]]))
            started = time.perf_counter()
            list(run_pool(pool, job, catalog, requests))
            rate = len(requests) / (time.perf_counter() - started)
            rates[str(workers)] = max(rates[str(workers)], rate)
    return rates


def _side(images: int, started: float, loads: int) -> Side:
    seconds = time.perf_counter() - started
    return Side(images, seconds, loads, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Run the job on standard input."""
    from diffusers.utils.logging import disable_progress_bar, set_verbosity_error
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_progress_bar(), disable_transformers_bar(), set_verbosity_error()
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    catalog = Catalog.load(Path(job["folder"]) / "catalog.jsonl")
    Path(job["output"]).mkdir(parents=True, exist_ok=True)
    side = {"naive": loop, "lru": loop, "planned": planned, "memory": memory, "ray": ray_workers}[job["side"]]
    found = side(job, catalog)
    Path(job["result"]).write_text(json.dumps(found._asdict() if isinstance(found, Side) else found))


if __name__ == "__main__":
    main()
