"""What constrained decoding costs and saves: forward passes and seconds per call, and what a large catalogue takes.

    python benchmarks/agent.py --policies smollm2=runs/smollm2 scratch=runs/from_scratch --dataset data/dabench --json

Ways, greedy, on the same prompts of DABench's evaluation split:

- `plain`: transformers' `generate`, unconstrained, until the end token or 320 tokens; calls need not be valid.
- `constrained`: every token is asked for, under the grammar of the catalogue's calls.
- `jump_forward`: the same, but tokens that have to follow are appended and read together (`generate_calls`).

`agreement`: answers of `plain` that are calls in canonical form anyway, how many of them the constraint leaves as they
are, token for token, and the largest difference of a token's log-probability.

One thread, in turns; a call's seconds are the fastest round's. `setup`: seconds and megabytes until the first token can
be constrained, with a catalogue of 6,000 names (the real one's, renamed as often as needed).
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import machine

from align.pairs import load_pairs
from rollouts.call_constraint import CallConstraint
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.constrained_generation import generate_calls
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.policy import load_policy, load_tokenizer
from rollouts.responses import left_padded

WAYS = ("plain", "constrained", "jump_forward")
MAX_NEW_TOKENS = 320
NAMES = 6000


def answer(way: str, policy: Any, prompts: list[list[int]], constraint: CallConstraint) -> list[int]:
    """Answer a batch; forward passes of each prompt."""
    if way == "plain":
        tokenizer = constraint.tokens.tokenizer
        ids, mask = left_padded(prompts, 0, policy.device)
        output = policy.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            generation_config=None, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        return [output.shape[1] - ids.shape[1]] * len(prompts)
    found = generate_calls(policy, prompts, constraint, jump_forward=way == "jump_forward")
    return [item.num_passes for item in found]


def prepare(folder: str, dataset: str, architecture: str, count: int) -> tuple[Any, list[list[int]], CallConstraint]:
    """The policy, prompts of the evaluation split, and the constraint to the architecture's models."""
    torch.set_num_threads(1)
    dialogue = Dialogue(load_tokenizer(folder), DialogueFormat.load(folder))
    catalog = Catalog.load(Path(dataset) / "catalog.jsonl")
    constraint = CallConstraint.of_models(dialogue, catalog.of_architecture(architecture))
    rows = load_pairs(dataset, architecture)["eval"].select(range(count))
    prompts = [dialogue.encode_prompt(row["instruction"], 384) for row in rows]
    return load_policy(folder, dtype="float32"), prompts, constraint


def measure(folder: str, dataset: str, architecture: str, count: int, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Passes and seconds per call, by way and batch size."""
    policy, prompts, constraint = prepare(folder, dataset, architecture, count)
    for way in WAYS:  # the first call of everything
        answer(way, policy, prompts[:2], constraint)
    found: dict[str, Any] = {}
    for size in sizes:
        for way in WAYS * rounds:
            started, passes = time.perf_counter(), []
            for start in range(0, count, size):
                passes += answer(way, policy, prompts[start : start + size], constraint)
            seconds = (time.perf_counter() - started) / count
            old = found.setdefault(str(size), {}).get(way)
            if old is None or seconds < old["seconds"]:
                found[str(size)][way] = {"seconds": seconds, "passes": sum(passes) / len(passes)}
        print(f"{folder}, batch {size}: {found[str(size)]}", file=sys.stderr)
    return found


def agreement(folder: str, dataset: str, architecture: str, count: int) -> dict[str, Any]:
    """How often a valid greedy answer comes out the same under the constraint."""
    policy, prompts, constraint = prepare(folder, dataset, architecture, count)
    end = constraint.tokens.tokenizer.eos_token_id
    found = {"asked": count, "valid": 0, "same": 0, "largest_difference": 0.0}
    for prompt in prompts:
        output = policy.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end,
            pad_token_id=end, output_logits=True, return_dict_in_generate=True,
            generation_config=None, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        ids = output.sequences[0, len(prompt) :].tolist()
        if end not in ids or not is_call(constraint, ids := ids[: ids.index(end)]):
            continue
        found["valid"] += 1
        logps = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, ids, strict=False)]
        for jump_forward in (True, False):
            (call,) = generate_calls(policy, [prompt], constraint, jump_forward=jump_forward, read_description=True)
            if call.token_ids != ids:
                break
            apart = max(abs(a - b) for a, b in zip(call.token_logps, logps, strict=True))
            found["largest_difference"] = max(found["largest_difference"], apart)
        else:
            found["same"] += 1
    return found


def is_call(constraint: CallConstraint, ids: list[int]) -> bool:
    """Whether an answer is a call in canonical form, by reading it (not by the grammar)."""
    text = constraint.tokens.tokenizer.decode(ids).strip()
    judged = Catalog(constraint.grammar.entries.values()).judge(text)
    if judged.reason or judged.call is None or judged.call.to_json() != text:
        return False
    return judged.call.model_description == constraint.grammar.entries[judged.call.model].description


def set_up(folder: str, dataset: str, architecture: str) -> dict[str, float]:
    """Seconds and megabytes of a constraint over 6,000 names."""
    tokenizer = load_tokenizer(folder)
    dialogue = Dialogue(tokenizer, DialogueFormat.load(folder))
    entries = list(Catalog.load(Path(dataset) / "catalog.jsonl").of_architecture(architecture))
    entries = [renamed(entries[i % len(entries)], i, i // len(entries)) for i in range(NAMES)]
    gc.collect()
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    constraint = CallConstraint.of_models(dialogue, entries)
    _, state = constraint.forced(constraint.grammar.start, b"")
    constraint.allowed(state)
    seconds = time.perf_counter() - started
    return {"names": len(entries), "seconds": seconds, "mb": (psutil.Process().memory_info().rss - before) / 1e6}


def renamed(entry: CatalogEntry, number: int, turn: int) -> CatalogEntry:
    """The entry itself, or in later turns a model of its own."""
    return entry if turn == 0 else entry.model_copy(update={"name": f"{entry.name} {turn}", "version_id": number})


def in_a_process(arguments: argparse.Namespace, folder: str, what: str) -> Any:
    """Measure in a fresh process, so that memory is this one's alone."""
    command = [sys.executable, __file__, "--one", what, "--policies", f"x={folder}", "--dataset", arguments.dataset]
    command += ["--architecture", arguments.architecture, "--prompts", str(arguments.prompts)]
    command += ["--rounds", str(arguments.rounds), "--sizes", *map(str, arguments.sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", required=True, help="NAME=FOLDER of trained policies")
    parser.add_argument("--dataset", required=True, help="DABench folder")
    parser.add_argument("--architecture", default="SD 1.5")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="prompts in a batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--one", choices=["calls", "setup", "agreement"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    policies = dict(pair.split("=", 1) for pair in arguments.policies)
    if arguments.one:
        (folder,) = policies.values()
        own = (folder, arguments.dataset, arguments.architecture)
        if arguments.one == "calls":
            found = measure(*own, arguments.prompts, arguments.sizes, arguments.rounds)
        else:
            found = set_up(*own) if arguments.one == "setup" else agreement(*own, arguments.prompts)
        print(json.dumps(found))
        return
    result: dict[str, Any] = {"name": "agent", "machine": machine(), "prompts": arguments.prompts, "policies": {}}
    result["ratios"] = {}
    for name, folder in policies.items():
        setup, calls = in_a_process(arguments, folder, "setup"), in_a_process(arguments, folder, "calls")
        same = in_a_process(arguments, folder, "agreement")
        result["policies"][name] = {"setup": setup, "batch": calls, "agreement": same}
        first = calls[str(arguments.sizes[0])]
        result["ratios"][f"generate, {name}"] = first["plain"]["seconds"] / first["jump_forward"]["seconds"]
    if arguments.json:
        print(json.dumps(result))
        return
    for name, found in result["policies"].items():
        print(f"{name}: set-up for {NAMES} names {found['setup']['seconds']:.2f} s, {found['setup']['mb']:.0f} MB")
        print("  {same} of {valid} valid answers of {asked} stay as they are".format(**found["agreement"]))
        for size, ways in found["batch"].items():
            for way in WAYS:
                row = ways[way]
                ratio = ways["plain"]["seconds"] / row["seconds"]
                print(f"  batch {size:>2}  {way:<12} {row['passes']:6.1f} passes  {row['seconds']:.3f} s  {ratio:.2f}x")


if __name__ == "__main__":
    main()
