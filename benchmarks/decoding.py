"""Diverse beam search: this toolkit's, many prompts in one batch, beside the library's way, one prompt at a time.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --json

SmolLM2-135M's shape with random weights, 16 prompts of about 100 tokens, 6 beams in 6 groups, 64 new tokens, greedy in
every group, no EOS. Ways:

- `ours`: all prompts in one call of `rollouts.decoding.diverse_beam_search`.
- `ours_one_by_one`: the same function, a prompt a call.
- `one_by_one`: what transformers 4.52 did for a prompt, written plainly here: the prompt repeated for every beam before
  the first forward pass, and the cache reordered at every step.

A run of each in a process of its own (`--way`), in turns (`--rounds`), on one thread; a ratio is the other's CPU
seconds over ours, of the fastest runs. `equal_beams` is the share of sequences that are the same: all in float32.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

from rollouts.decoding import diverse_beam_search

WAYS = ("ours", "ours_one_by_one", "one_by_one")
PROMPTS, BEAMS, NEW_TOKENS, PENALTY = 16, 6, 64, 1.0
NO_TOKEN = 0  # EOS that is never the best: its logit is kept at the lowest


def smollm2(dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def prompts_of(vocabulary: int) -> list[torch.Tensor]:
    """Random prompts of 85 to 115 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [85 + 2 * i for i in range(PROMPTS)]
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([p.new_zeros(width - len(p)), p]) for p in prompts])
    return ids, (torch.arange(width)[None] >= torch.tensor([[width - len(p)] for p in prompts])).long()


def never_end(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that forbids EOS, so that every way does the same work."""
    scores[:, NO_TOKEN] = -torch.inf
    return scores


def ours(model: Any, prompts: list[torch.Tensor]) -> list[list[int]]:
    """The search of the toolkit on a batch."""
    ids, mask = left_padded(prompts)
    found = diverse_beam_search(
        model,
        ids,
        mask,
        num_beams=BEAMS,
        num_beam_groups=BEAMS,
        diversity_penalty=PENALTY,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=NO_TOKEN,
        pad_token_id=NO_TOKEN,
        num_return_sequences=BEAMS,
        logits_processor=never_end,
    )
    return found.sequences.tolist()


@torch.no_grad()
def one_by_one(model: Any, prompt: torch.Tensor) -> list[list[int]]:
    """transformers 4.52's group beam search for groups of one beam that do not end."""
    ids = prompt.repeat(BEAMS, 1)
    scores = torch.zeros(BEAMS)
    cache = None
    for step in range(NEW_TOKENS):
        new = ids if cache is None else ids[:, -1:]
        positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1]).expand(BEAMS, -1)
        output = model(new, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logps = never_end(ids, torch.log_softmax(output.logits[:, -1].float(), dim=-1))
        chosen = torch.zeros(BEAMS, dtype=torch.long)
        for group in range(BEAMS):
            counts = torch.bincount(chosen[:group], minlength=logps.shape[1])
            totals = logps[group] - PENALTY * counts + scores[group]
            best = totals.topk(2)
            scores[group], chosen[group] = best.values[0], best.indices[0]
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        if step + 1 < NEW_TOKENS:
            cache.reorder_cache(torch.arange(BEAMS))
    order = scores.argsort(descending=True)
    return ids[order, len(prompt) :].tolist()


def run(way: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and tokens of one way, after a short warm-up."""
    model = smollm2(dtype)
    prompts = prompts_of(model.config.vocab_size)
    diverse_beam_search(  # finds out once how the model can be run
        model, prompts[0][None, :4], None, num_beams=2, num_beam_groups=2, diversity_penalty=1.0, max_new_tokens=2,
        eos_token_id=NO_TOKEN, pad_token_id=NO_TOKEN, num_return_sequences=1,
    )  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    if way == "ours":
        found = ours(model, prompts)
    elif way == "ours_one_by_one":
        found = [row for prompt in prompts for row in ours(model, [prompt])]
    else:
        found = [row for prompt in prompts for row in one_by_one(model, prompt)]
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "found": found}


def main() -> None:
    """Time all ways and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--way", choices=WAYS, help="Run this one here and print its time and tokens.")
    parser.add_argument("--rounds", type=int, default=1, help="Runs of each.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="Of the model.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way:
        print(json.dumps(run(args.way, getattr(torch, args.dtype))))
        return
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--dtype", args.dtype]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results[way].append(json.loads(output.splitlines()[-1]))
    found = [result[0]["found"] for result in results.values()]
    agree = [sum(a == b for a, b in zip(found[0], other, strict=True)) / len(found[0]) for other in found[1:]]
    seconds = {way: min(r["seconds"] for r in of_way) / PROMPTS for way, of_way in results.items()}
    cpu = {way: min(r["cpu"] for r in of_way) / PROMPTS for way, of_way in results.items()}
    ratios = {way: cpu[way] / cpu["ours"] for way in WAYS[1:]}
    print(f"seconds a prompt, {args.dtype}: {seconds}; equal beams: {dict(zip(WAYS[1:], agree, strict=True))}")
    if args.json:
        report = {"name": "decoding", "machine": machine(), "dtype": args.dtype, "seconds_per_prompt": seconds}
        print(json.dumps(report | {"cpu_seconds_per_prompt": cpu, "equal_beams": agree, "ratios": ratios}))


if __name__ == "__main__":
    main()
