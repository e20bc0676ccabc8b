"""Pictures of many checkpoints: this package's rollout beside loops over diffusers, memory, Ray, and the simulator.

Parts:
    speed      200 calls x 4 pictures over 12 checkpoints and 12 LoRAs, shuffled: a pipeline per call (`naive`), an LRU
               of 4 pipelines (`lru`), and ours with the same room. A process each.
    memory     resident memory over 1,000 switches of the checkpoint.
    ray        pictures per second of two Ray workers over one's.
    simulator  the measured times beside those `rollouts.plan`'s simulator predicts from the costs of another run; and
               what it says of models of real size on an A100.

Models are untrained (`pocket.untrained`): real classes, small weights.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.rollout_sides import calls_of, requests_of, settings_of
from pocket.untrained import save_catalog
from rollouts.baseline_planners import LruPlanner, NaivePlanner, batches_in_order
from rollouts.catalog import Catalog
from rollouts.costs import A100, CostModel
from rollouts.model_sizes import model_sizes
from rollouts.planning import Planner, make_batches
from rollouts.requests import RenderSettings, resolve
from rollouts.simulation import Cluster, Prediction, simulate

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("speed", "memory", "ray", "simulator")
CHECKPOINTS, LORAS, CAPACITY = 12, 12, 4
SIZES_GB = (0.1, 0.5, 2.1, 6.9)


def run_side(side: str, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """A side's result, from a process of its own.

    Raises:
        SystemExit: It failed; its own message stands above.
    """
    job = job_of(args) | {"side": side, "output": str(args.folder / "images" / side)} | changes
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.rollout_sides"]
    done = subprocess.run(command, input=json.dumps(job), text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{side} failed.")
    return json.loads(Path(job["result"]).read_text())


def job_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all sides are told."""
    folder = args.folder.resolve()
    return {
        "folder": str(folder / "models"), "result": str(folder / "result.json"), "calls": args.calls, "k": args.k,
        "batch_size": args.batch_size,
        "seed": 0, "capacity": CAPACITY, "switches": args.switches, "output": str(folder / "images"),
    }  # fmt: skip


def speed(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Ours beside the loops."""
    sides = {
        "naive": run_side("naive", args, capacity=0),
        "lru": run_side("lru", args),
        "planned": run_side("planned", args),
    }
    for name, side in sides.items():
        print(
            f"{name:8} {side['images'] / side['seconds']:6.2f} images/s, {side['loads']:4d} loads, "
            f"peak {side['peak_mb']:.0f} MB",
            flush=True,
        )
    summary["sides"] = sides
    summary["ratios"] |= {name: sides[name]["seconds"] / sides["planned"]["seconds"] for name in ("naive", "lru")}


def memory(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Memory over switches."""
    found = run_side("memory", args)
    after = found["rss_mb"]
    print(
        f"memory: {after[0]:.0f} MB after the first cycle, {after[-1]:.0f} MB after {found['switches']} switches "
        f"({100 * found['growth']:+.1f} %), at most {max(after):.0f} MB",
        flush=True,
    )
    summary["memory"] = {"growth": found["growth"], "switches": found["switches"], "first_mb": after[0]}


def ray(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Two Ray workers beside one."""
    rates = run_side("ray", args)
    print(f"ray: {rates['1']:.2f} images/s with one worker, {rates['2']:.2f} with two", flush=True)
    summary["ratios"]["ray_one_worker"] = rates["2"] / rates["1"]


def simulator(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Predicted beside measured, and models of real size on paper."""
    costs_file = args.folder.resolve() / "costs.json"
    costs_file.unlink(missing_ok=True)
    # Other calls than those that are predicted; before and after, since the machine is not always equally fast.
    run_side("planned", args, seed=1, costs=str(costs_file))
    measured = {
        "planned": run_side("planned", args, seed=2),
        "small_cache": run_side("planned", args, seed=2, capacity=1),
    }
    run_side("planned", args, seed=3, costs=str(costs_file))
    costs = CostModel.load(costs_file)
    for name, capacity in (("planned", CAPACITY), ("small_cache", 1)):
        catalog = Catalog.load(Path(job_of(args)["folder"]) / "catalog.jsonl")
        sizes = model_sizes(catalog, catalog, job_of(args)["folder"])
        batches, _ = batches_of(args, catalog, seed=2)
        device_gb = capacity * 1.01 * max(sizes.values()) / 1e9
        cluster = Cluster(workers=1, gpus_per_node=1, device_gb=device_gb, cpu_gb=0)
        predicted = simulate(Planner(batches, sizes, costs), cluster, costs, sizes).makespan
        error = predicted / measured[name]["seconds"] - 1
        print(
            f"simulator, {name}: {predicted:.1f} s predicted, {measured[name]['seconds']:.1f} s measured "
            f"({100 * error:+.1f} %)",
            flush=True,
        )
        summary.setdefault("simulator_error", {})[name] = error
    summary["by_model_size"] = by_model_size(args)


def by_model_size(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same calls at 512 x 512 pixels and 25 steps on one A100 with 24 GB for pipelines, on paper."""
    found = {}
    for size in SIZES_GB:
        catalog = Catalog.load(Path(job_of(args)["folder"]) / "catalog.jsonl")
        sizes = {name: round(size * 1e9 if entry.type == "Checkpoint" else 0.1e9) for name, entry in catalog.items()}
        batches, in_order = batches_of(
            args, catalog, seed=0, settings=RenderSettings(batch_size=args.batch_size), steps=25
        )
        costs, cluster = CostModel(A100), Cluster(workers=1, gpus_per_node=1, device_gb=24, cpu_gb=0)
        planners: dict[str, Any] = {
            "naive": NaivePlanner(in_order), "lru": LruPlanner(in_order), "planned": Planner(batches, sizes, costs),
        }  # fmt: skip
        seconds = {name: _run(planner, cluster, costs, sizes).makespan for name, planner in planners.items()}
        found[f"{size:g} GB"] = {name: seconds[name] / seconds["planned"] for name in ("naive", "lru")}
        print(
            f"models of {size:g} GB, on paper: " + ", ".join(f"{k} {v:.2f}" for k, v in found[f"{size:g} GB"].items())
        )
    return found


def batches_of(
    args: argparse.Namespace, catalog: Catalog, *, seed: int, settings: RenderSettings | None = None, steps: int = 0
) -> tuple[Any, Any]:
    """The calls' batches, grouped and in their own order."""
    calls = calls_of(catalog, args.calls, seed)
    calls = [call.model_copy(update={"sampling_steps": steps}) for call in calls] if steps else calls
    requests = requests_of(calls, args.k)
    keys = [resolve(request, catalog, settings or settings_of(job_of(args))).batch_key for request in requests]
    return make_batches(keys, args.batch_size), batches_in_order(keys, args.k)


def _run(planner: Any, cluster: Cluster, costs: CostModel, sizes: dict[str, int]) -> Prediction:
    return simulate(planner, cluster, costs, sizes)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--k", type=int, default=4, help="Pictures per call.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pictures we draw at once; the loops draw a call's.")
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/rollouts_benchmark"), help="For models and pictures.")
    return parser.parse_args()


def main() -> None:
    """Run the parts and print what they found."""
    args = parse()
    models = args.folder / "models"
    if not (models / "catalog.jsonl").is_file():
        save_catalog(models, sd15=CHECKPOINTS, sdxl=0, loras=LORAS, sdxl_loras=0)
    summary: dict[str, Any] = {"name": "rollouts", "machine": machine(), "ratios": {}}
    parts = {"speed": speed, "memory": memory, "ray": ray, "simulator": simulator}
    for name in args.parts:
        parts[name](args, summary)
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
