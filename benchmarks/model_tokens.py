"""ModelTokens: rows trained on cached hidden states, beside loops that run the backbone in every epoch.

    OMP_NUM_THREADS=1 python benchmarks/model_tokens.py --model runs/smollm2 --dataset runs/dabench --json

Real pairs of a DABench (`--pairs` of its SFT split): the prompt as chat is the prefix, the API call's model the label,
every model in them has a row. The same loss (ChatGen Eq. 3), batches of 64 and AdamW for all:

- `cached`: `ModelTokenTrainer`'s way: one pass of the backbone over all distinct prefixes, files written and read
  again, then epochs on them. Measured whole.
- `naive`: as ToolkenGPT trains (https://arxiv.org/abs/2305.11554, train_llama.py): one prefix at a time, the backbone
  under no_grad, the whole output layer [W_v; W_M] at every position, autograd to W_M, a step after every 64 prefixes.
- `lean`: the same loop with the output layer at the last position only, which is the least that an epoch can take with
  the backbone in it.

The loops are timed on `--loop_pairs` prefixes, drawn by chance, and scaled to all by the number of tokens; `scaled`
says so. They run twice, before and after `cached`, and the faster counts. Each way has a process of its own, on one
thread. Seconds are the CPU time of the process: that of the clock on an idle machine, comparable on a busy one. Losses
of the three on the same prefixes must agree, and so must gradients.

`ratios` are the loop's seconds over those of `cached` (> 1: we are ahead): `naive`, `lean` for 5 epochs with the
backbone's pass, the digest of the weights and all files, `... epoch` for one more epoch, `... memory` for peak resident
size. `growth` has seconds per epoch and memory of training alone, on the same hidden states with random labels, for 100
to 100,000 models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import load_from_disk
from machine import machine
from torch import Tensor

from align.trainers.model_token_cache import HiddenBatch, HiddenCache, ModelTokenExamples
from align.trainers.model_token_config import ModelTokenConfig
from align.trainers.model_token_fit import adamw_epoch, epoch_batches, memory_source
from align.trainers.model_token_loss import loss_and_gradient
from align.trainers.model_token_trainer import ModelTokenTrainer
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.policy import load_policy, load_tokenizer

EPOCHS, BATCH, LEARNING_RATE = 5, 64, 1e-3
GROWTH = (100, 1_000, 10_000, 100_000)
CHECKED = 4  # prefixes on which loss and gradient are compared


class Data(NamedTuple):
    """What every way is given."""

    names: list[str]
    examples: ModelTokenExamples


def read_pairs(model: str, dataset: str, pairs: int) -> Data:
    """Real pairs, the same at every call."""
    rows: Any = load_from_disk(str(Path(dataset) / "sd15"))
    rows = rows["sft"].shuffle(seed=0, keep_in_memory=True).select(range(pairs), keep_in_memory=True)
    dialogue = Dialogue(load_tokenizer(model), DialogueFormat.load(model))
    models = [row["api"]["model"] for row in rows]
    names = sorted(set(models))
    number = {name: i for i, name in enumerate(names)}
    prefixes = [dialogue.encode_prompt(row["instruction"], 1024) for row in rows]
    return Data(names, ModelTokenExamples(prefixes, [number[name] for name in models]))


def first_rows(count: int, width: int) -> Tensor:
    """W_M that all ways begin with."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 0.02


def memory(field: str) -> float:
    """A figure of this process in /proc, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def loop(way: str, model: str, data: Data, loop_pairs: int) -> dict[str, Any]:
    """Some steps with the backbone in them, in this process, scaled to an epoch."""
    policy = load_policy(model, dtype="float32").requires_grad_(False)
    backbone, head = policy.base_model, policy.get_output_embeddings().weight
    rows = first_rows(len(data.names), head.shape[1]).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=LEARNING_RATE, weight_decay=0.01)

    def loss_of(number: int) -> Tensor:
        ids = torch.tensor([data.examples.prefixes[number]])
        with torch.no_grad():
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
            hidden = hidden if way == "naive" else hidden[-1:]
            words = F.linear(hidden, head)
        logits = torch.cat([words, F.linear(hidden, rows)], dim=1)
        labels = torch.full((len(hidden),), -100)
        labels[-1] = len(head) + data.examples.labels[number]
        return F.cross_entropy(logits, labels)

    checked = torch.stack([loss_of(number) for number in range(CHECKED)]).mean()
    checked.backward()
    assert rows.grad is not None
    norm = rows.grad.norm().item()
    rows.grad = None
    chosen = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(1))[:loop_pairs].tolist()
    started, clock = time.process_time(), time.perf_counter()
    for done, number in enumerate(chosen, start=1):
        (loss_of(number) / BATCH).backward()
        if done % BATCH == 0 or done == len(chosen):
            optimizer.step()
            optimizer.zero_grad()
    scale = sum(map(len, data.examples.prefixes)) / sum(len(data.examples.prefixes[i]) for i in chosen)
    return {
        "epoch": (time.process_time() - started) * scale,
        "epoch_clock": (time.perf_counter() - clock) * scale,
        "timed_pairs": len(chosen),
        "peak_mb": memory("VmHWM"),
        "loss": checked.item(),
        "gradient_norm": norm,
    }


def cached(model: str, data: Data, folder: str) -> dict[str, Any]:
    """The backbone's pass and five epochs, in this process."""
    policy = load_policy(model, dtype="float32")
    started, clock = time.process_time(), time.perf_counter()
    config = ModelTokenConfig(folder, init="normal", batch_size=BATCH)
    trainer = ModelTokenTrainer(policy, config, data.names, data.examples)
    cache = trainer.build_cache()
    seconds = time.process_time() - started
    everything = torch.arange(len(cache))
    source = memory_source(cache, dtype=torch.float32, device=torch.device("cpu"), memory_mb=2048)
    rows = first_rows(len(data.names), cache.manifest.hidden_size)
    batch = source(everything[:CHECKED])
    loss, gradient = loss_and_gradient(rows, batch.hidden, batch.labels, batch.word_lse)
    optimizer = torch.optim.AdamW([rows], lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    epochs_started = time.process_time()
    for epoch in range(EPOCHS):
        adamw_epoch(rows, optimizer, source, epoch_batches(everything, BATCH, seed=0, epoch=epoch))
    return {
        "pass": seconds,
        "epoch": (time.process_time() - epochs_started) / EPOCHS,
        "whole": time.process_time() - started,
        "whole_clock": time.perf_counter() - clock,
        "distinct_prefixes": cache.manifest.num_prefixes,
        "cache_mb": sum(path.stat().st_size for path in cache.folder.iterdir()) / 1e6,
        "peak_mb": memory("VmHWM"),
        "loss": loss.item(),
        "gradient_norm": gradient.norm().item(),
    }


def growth(folder: str, models: int) -> dict[str, float]:
    """An epoch of training with so many models, without the backbone, in this process."""
    cache = HiddenCache(Path(folder) / "cache")
    everything = torch.arange(len(cache))
    source = memory_source(cache, dtype=torch.float32, device=torch.device("cpu"), memory_mb=2048)
    labels = torch.randint(0, models, (len(cache),), generator=torch.Generator().manual_seed(0))
    relabelled = lambda index: HiddenBatch(source(index).hidden, labels[index], *source(index)[2:])  # noqa: E731
    loaded, rows = memory("VmRSS"), first_rows(models, cache.manifest.hidden_size)
    optimizer = torch.optim.AdamW([rows], lr=LEARNING_RATE, fused=True)
    started = time.process_time()
    adamw_epoch(rows, optimizer, relabelled, epoch_batches(everything, BATCH, seed=0, epoch=0))
    seconds = time.process_time() - started
    return {"epoch": seconds, "peak_mb": memory("VmHWM"), "memory_mb": memory("VmHWM") - loaded}


def run(args: argparse.Namespace, part: str, folder: str) -> dict[str, Any]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", folder, "--model", args.model]
    command += ["--dataset", args.dataset, "--pairs", str(args.pairs), "--loop_pairs", str(args.loop_pairs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{part}: {found}", flush=True)
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, and the report.

    Raises:
        RuntimeError: The ways don't compute the same loss and gradient.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = {way: run(args, way, folder) for way in ("naive", "lean")}
        ours = run(args, "cached", folder)
        after = {way: run(args, way, folder) for way in ("naive", "lean")}
        by_models = {count: run(args, f"growth:{count}", folder) for count in GROWTH}
    ratios = {}
    for way in before:
        theirs = min(before[way], after[way], key=lambda found: found["epoch"])
        for name in ("loss", "gradient_norm"):
            if abs(ours[name] - theirs[name]) > 1e-4 * abs(theirs[name]):
                raise RuntimeError(f"{name} is {ours[name]} cached, but {theirs[name]} {way}.")
        ratios[way] = EPOCHS * theirs["epoch"] / ours["whole"]
        ratios[f"{way} epoch"] = theirs["epoch"] / ours["epoch"]
        ratios[f"{way} memory"] = theirs["peak_mb"] / ours["peak_mb"]
    data = read_pairs(args.model, args.dataset, args.pairs)
    lengths = [len(prefix) for prefix in data.examples.prefixes]
    return {
        "name": "model_tokens",
        "machine": machine(),
        "task": {
            "model": args.model, "dataset": args.dataset, "pairs": args.pairs, "models": len(data.names),
            "tokens": sum(lengths), "longest": max(lengths), "epochs": EPOCHS, "batch_size": BATCH,
        },
        "scaled": f"naive and lean: timed on {args.loop_pairs} of {args.pairs} pairs and scaled by tokens",
        "ways": {"cached": ours, "before": before, "after": after},
        "ratios": ratios,
        "growth": by_models,
    }  # fmt: skip


def main() -> None:
    """Time all and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--model", default="runs/smollm2", help="Folder of a policy.")
    parser.add_argument("--dataset", default="runs/dabench", help="DABench folder with sd15/.")
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--loop_pairs", type=int, default=128, help="Pairs that the loops are timed on.")
    parser.add_argument("--part", help="Run this part only, in this process.")
    parser.add_argument("--folder", default="", help="Of the cache, with --part.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.part:
        report = compare(args)
        print(f"ratios: {report['ratios']}")
        if args.json:
            print(json.dumps(report))
        return
    if args.part.startswith("growth:"):
        print(json.dumps(growth(args.folder, int(args.part.removeprefix("growth:")))))
        return
    data = read_pairs(args.model, args.dataset, args.pairs)
    if args.part == "cached":
        print(json.dumps(cached(args.model, data, args.folder)))
    else:
        print(json.dumps(loop(args.part, args.model, data, args.loop_pairs)))


if __name__ == "__main__":
    main()
