"""One RRHF step: candidates packed as a trie, beside the plain padded step with a log-softmax over all logits.

    OMP_NUM_THREADS=1 python benchmarks/rrhf_step.py --json

SmolLM2-135M's shape with random weights, float32, one prompt of 180 tokens, 6 responses of 90 that share the first 40.
A step is the forward pass, the loss and the backward pass; the optimizer's part, equal for all, is left out. Ways:

- `packed`: `PackedLayout` and the head in chunks, what `RRHFTrainer` does.
- `padded`: `PaddedLayout` and the head in chunks: what packing alone brings is the difference.
- `plain`: a row per candidate, float32 log-softmax of the logits at all positions, then gathered: RRHF's released code
  and TRL's older trainers. The loss is Eq. 7-10 as in the others, written plainly here.

A run of each in a process of its own, in turns (`--rounds`), of `--steps` steps on one thread; of these the fastest
counts. Seconds are the CPU time of the process: that of the clock on an idle machine, and comparable on a busy one.
Memory is the peak resident size of a process less its size with the weights loaded: activations, logits and gradients.
Losses and gradient norms must agree. `ratios` are the other's seconds or memory over those of `packed` (> 1: we are
ahead); `by_candidates` has them for 2 to 32 candidates, on a model of `--layers_by_candidates` layers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from align.losses import rrhf_loss
from align.trainers.layouts import PackedLayout, PaddedLayout
from align.trainers.token_logps import Way, token_logps

WAYS = ("packed", "padded", "plain")
PROMPT, RESPONSE, SHARED, CANDIDATES = 180, 90, 40, 6
BY_CANDIDATES = (2, 4, 8, 16, 32)


class Task(NamedTuple):
    """What every way is given."""

    layers: int
    candidates: int
    dtype: str


def smollm2(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape, but for the number of layers (30)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def candidates_of(count: int, vocabulary: int) -> dict[str, Any]:
    """A prompt with responses that share their beginning; rewards in no order."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(1, vocabulary, (length,), generator=generator).tolist()  # noqa: E731
    prompt, shared = draw(PROMPT), draw(SHARED)
    return {
        "prompt_ids": prompt,
        "responses": [shared + draw(RESPONSE - SHARED) for _ in range(count)],
        "rewards": torch.rand(count, generator=generator).tolist(),
    }


def our_loss(model: LlamaForCausalLM, row: dict[str, Any], way: Way) -> Tensor:
    """The loss as `RRHFTrainer` computes it."""
    layout = (PackedLayout if way.packed else PaddedLayout)(0, len(row["responses"]))
    batch = layout([row])
    return rrhf_loss(token_logps(model, batch, way), batch["mask"], batch["rewards"]).loss


def plain_loss(model: LlamaForCausalLM, row: dict[str, Any]) -> Tensor:
    """The usual way: whole sequences, all logits, float32 log-softmax everywhere, response tokens gathered."""
    first = len(row["prompt_ids"])
    input_ids = torch.tensor([row["prompt_ids"] + response for response in row["responses"]])
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    logps = logits.float().log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    logps = logps[:, first - 1 :]
    p, rewards = logps.mean(1), torch.tensor(row["rewards"])
    worse = rewards[:, None] < rewards[None, :]
    rank = (p[:, None] - p[None, :]).clamp(min=0)[worse].sum()
    return rank - logps[rewards.argmax()].sum()


def memory(field: str) -> float:
    """A figure of this process in /proc, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(way: str, task: Task, steps: int) -> dict[str, float]:
    """Steps of one way, in this process."""
    model = smollm2(task.layers, getattr(torch, task.dtype))
    row = candidates_of(task.candidates, model.config.vocab_size)
    loaded, seconds, clock, loss = memory("VmRSS"), [], [], torch.zeros(())
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        started, clock_started = time.process_time(), time.perf_counter()
        loss = plain_loss(model, row) if way == "plain" else our_loss(model, row, Way(way == "packed", True))
        loss.backward()
        seconds.append(time.process_time() - started)
        clock.append(time.perf_counter() - clock_started)
    norm = torch.stack([weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]).norm()
    return {
        "seconds": min(seconds),
        "clock_seconds": min(clock),
        "memory_mb": memory("VmHWM") - loaded,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
    }


def run(way: str, task: Task, steps: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--steps", str(steps), "--dtype", task.dtype]
    command += ["--layers", str(task.layers), "--candidates", str(task.candidates)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(ways: tuple[str, ...], task: Task, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """The fastest step and the largest memory of each way.

    Raises:
        RuntimeError: The ways don't compute the same loss and gradient.
    """
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            runs[way].append(run(way, task, steps))
            print(f"{task}, round {number + 1}, {way}: {runs[way][-1]}", flush=True)
    found = {
        way: {
            "seconds": min(one["seconds"] for one in of_way),
            "clock_seconds": min(one["clock_seconds"] for one in of_way),
            "memory_mb": max(one["memory_mb"] for one in of_way),
            "loss": of_way[0]["loss"],
            "gradient_norm": of_way[0]["gradient_norm"],
        }
        for way, of_way in runs.items()
    }
    tolerance = 1e-5 if task.dtype == "float32" else 0.02
    for way in ways[1:]:
        for name in ("loss", "gradient_norm"):
            ours, theirs = found[ways[0]][name], found[way][name]
            if abs(ours - theirs) > tolerance * abs(theirs):
                raise RuntimeError(f"{name} is {ours} {ways[0]}, but {theirs} {way}.")
    return found


def ratios_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of each other way, its seconds and memory over those of `packed`."""
    ours = found["packed"]
    return {
        name: of_way[field] / ours[field]
        for way, of_way in found.items()
        if way != "packed"
        for name, field in ((way, "seconds"), (f"{way} memory", "memory_mb"))
    }


def main() -> None:
    """Time all and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each way.")
    parser.add_argument("--steps", type=int, default=2, help="Steps in a process.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--layers_by_candidates", type=int, default=6, help="0: leave that part out.")
    parser.add_argument("--way", choices=WAYS, help="Run this way only, in this process.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.layers, args.candidates, args.dtype)
    if args.way:
        print(json.dumps(measure(args.way, task, args.steps)))
        return
    found = compare(WAYS, task, args.rounds, args.steps)
    ratios = ratios_of(found)
    print(f"{task}: {ratios}")
    by_candidates = {}
    for count in BY_CANDIDATES if args.layers_by_candidates else ():
        smaller = Task(args.layers_by_candidates, count, args.dtype)
        by_candidates[count] = ratios_of(compare(("packed", "plain"), smaller, 1, args.steps))
        print(f"{smaller}: {by_candidates[count]}")
    if args.json:
        report = {"name": "rrhf_step", "machine": machine(), "task": task._asdict(), "ways": found, "ratios": ratios}
        print(json.dumps(report | {"by_candidates": by_candidates}))


if __name__ == "__main__":
    main()
