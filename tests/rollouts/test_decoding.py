"""Diverse beam search beside the answers of the library's last version, in batches, with processors, and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from rollouts.decoding import LogitsError, diverse_beam_search

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens"
SEARCH = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.7,
    "max_new_tokens": 12,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "num_return_sequences": 4,
}
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"the library's answers are not at {GOLDENS}")


@pytest.fixture(scope="module")
def library():
    """Prompts, arguments and answers of transformers 4.52."""
    return json.loads((GOLDENS / "diverse_beam" / "tiny_llama.json").read_text())


@pytest.fixture(scope="module")
def golden_models():
    return {
        dtype: AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny_llama", dtype=dtype).eval()
        for dtype in (torch.float32, torch.float64)
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, intermediate_size=48, initializer_range=0.3, **size)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts():
    """Three left-padded prompts of 3, 5 and 1 tokens."""
    ids = torch.tensor([[0, 0, 5, 9, 13], [4, 8, 15, 16, 23], [0, 0, 0, 0, 42]])
    return ids, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


def up_to_eos(sequences, eos=2):
    return [row[: row.index(eos) + 1] if eos in row else row for row in sequences.tolist()]


def of_library(args):
    return {key: value for key, value in args.items() if key != "do_sample"}


def clean(case):
    """The case without the penalty on the pad token of groups that have ended."""
    return case["no_pad_penalty"]["generated"], pytest.approx(case["no_pad_penalty"]["scores"], abs=1e-4, rel=1e-5)


@needs_goldens
def test_single_prompts_are_answered_as_the_library_did(library, golden_models):
    cases = [case for case in library["cases"] if case["min_margin_fp64"] >= 1e-4][::5]
    equal_to_library = 0
    for case in cases:
        ids = torch.tensor([library["prompts"][case["prompt"]]["input_ids"]])
        found = diverse_beam_search(golden_models[torch.float32], ids, None, **of_library(case["args"]))
        assert (up_to_eos(found.sequences), found.scores.tolist()) == clean(case)
        equal_to_library += up_to_eos(found.sequences) == case["generated"]
    # Where they differ, the library penalised the pad token of groups that had ended.
    assert len(cases) > 50 and equal_to_library > 0.7 * len(cases)


@needs_goldens
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batches_are_answered_as_single_prompts(library, attention):
    model = AutoModelForCausalLM.from_pretrained(
        GOLDENS / "tiny_llama", dtype=torch.float64, attn_implementation=attention
    )
    single = {(case["prompt"], json.dumps(case["args"])): case for case in library["cases"]}
    compared = 0
    for batch in library["batched"][:: 1 if attention == "sdpa" else 6]:
        ids, mask = torch.tensor(batch["padded_input_ids"]), torch.tensor(batch["attention_mask"])
        found = diverse_beam_search(model, ids, mask, **of_library(batch["args"]))
        returned = batch["args"]["num_return_sequences"]
        for i, prompt in enumerate(batch["prompts"]):
            if case := single.get((prompt, json.dumps(batch["args"]))):
                own = slice(i * returned, (i + 1) * returned)
                assert (up_to_eos(found.sequences[own]), found.scores[own].tolist()) == clean(case)
                compared += 1
    assert compared > 15


def test_one_group_of_one_beam_is_greedy(model, prompts):
    ids, mask = prompts
    found = diverse_beam_search(
        model, ids, mask, **SEARCH | {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}
    )
    greedy = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=[2, 3], pad_token_id=0
    )
    width = found.sequences.shape[1]
    ends = [next((i for i, t in enumerate(row) if t in (2, 3)), 12) for row in greedy[:, 5:].tolist()]
    for row, wanted, end in zip(found.sequences.tolist(), greedy[:, 5 : 5 + width].tolist(), ends, strict=True):
        assert row[:end] == wanted[:end]
        assert row[end : end + 1] in ([], [2]), "whichever EOS it was, the first is returned"


def test_first_group_does_not_depend_on_the_others(model, prompts):
    # Alone, its two beams are ordinary beam search; a later group must not change them.
    alone = diverse_beam_search(
        model, *prompts, **SEARCH | {"num_beams": 2, "num_beam_groups": 1, "num_return_sequences": 2}
    )
    both = diverse_beam_search(model, *prompts, **SEARCH)
    for i in range(3):
        known = up_to_eos(both.sequences[4 * i : 4 * i + 4])
        for row in up_to_eos(alone.sequences[2 * i : 2 * i + 2]):
            assert row in known


def rescored(model, prompt, row, processor):
    """The mean of a sequence's processed log-probabilities, token by token, without search or cache."""
    total = 0.0
    for i, token in enumerate(row):
        read = torch.cat([prompt, torch.tensor(row[:i], dtype=torch.long)])[None]
        logps = torch.log_softmax(model(input_ids=read).logits[:, -1].float(), dim=-1)
        total += processor(read, logps)[0, token].item()
    return total / len(row)


@torch.no_grad()
def test_processors_see_prompt_and_response_and_come_before_the_penalty(model):
    prompt = torch.tensor([4, 8, 15, 16, 23])
    processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)])
    options = SEARCH | {"num_beams": 2, "num_return_sequences": 2, "diversity_penalty": 0.2, "eos_token_id": 2}
    found = diverse_beam_search(model, prompt[None], None, logits_processor=processor, **options)
    rows, scores = up_to_eos(found.sequences), found.scores.tolist()
    means = [rescored(model, prompt, row, processor) for row in rows]
    # The first group's score is its mean; the second's lacks 0.2 for each token they chose alike at the same step.
    first = min(range(2), key=lambda i: abs(scores[i] - means[i]))
    alike = sum(a == b for a, b in zip(*rows, strict=False))
    assert alike > 0
    assert scores[first] == pytest.approx(means[first], abs=1e-5)
    second = means[1 - first] - 0.2 * alike / len(rows[1 - first])
    assert scores[1 - first] == pytest.approx(second, abs=1e-5)


def test_processors_may_count_prompts(model, prompts):
    # The third prompt ends at once and the first after 3 tokens; the row's number must still mean the same prompt.
    seen = []

    def allowed(prompt, tokens):
        seen.append((prompt, len(tokens) - 5))
        new = len(tokens) - 5
        return {0: [10 + new] if new < 3 else [2], 1: [20, 21], 2: [2, 3]}[prompt]

    search = SEARCH | {"num_beams": 2, "num_beam_groups": 1, "num_return_sequences": 1, "eos_token_id": 2}
    processor = PrefixConstrainedLogitsProcessor(allowed, num_beams=2)
    found = diverse_beam_search(model, *prompts, logits_processor=processor, **search | {"max_new_tokens": 8})
    rows = found.sequences.tolist()
    assert rows[0] == [10, 11, 12, 2, 0, 0, 0, 0]
    assert set(rows[1]) <= {20, 21} and len(rows[1]) == 8
    assert rows[2][0] in (2, 3)
    assert (1, 7) in seen


class Counting(torch.nn.Module):
    """Counts the rows and query positions of every call."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, []

    def forward(self, **inputs):
        self.calls.append(tuple(inputs["input_ids"].shape))
        return self.module(**inputs)


def test_what_has_ended_costs_nothing_more(model, prompts):
    diverse_beam_search(model, *prompts, **SEARCH)  # tries once whether the cache can be shared
    counting = Counting(model)

    def ends(ids, scores):
        """The first prompt ends after 2 tokens, and the first of the second's two groups after 4."""
        new = ids.shape[1] - 5
        scores = scores.view(3, 2, -1).clone()
        scores[:, :, 2] = -50.0
        scores[0, :, 2] = 1.0 if new >= 1 else -50.0
        scores[1, 0, 2] = 1.0 if new >= 3 else -50.0
        return scores.view(6, -1)

    search = SEARCH | {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": 2, "max_new_tokens": 6}
    search |= {"logits_processor": ends, "early_stopping": True}
    found = diverse_beam_search(counting, *prompts, **search)
    assert counting.calls == [(3, 5), (3, 2), (2, 2), (2, 2), (2, 2), (2, 2)]
    lengths = [len(row) for row in up_to_eos(found.sequences)]
    assert lengths[:2] == [2, 2] and sorted(lengths[2:4]) == [4, 6] and lengths[4:] == [6, 6]
    counting.calls.clear()
    diverse_beam_search(counting, prompts[0][1:2], None, **search | {"logits_processor": lambda ids, scores: ends(
        torch.cat([ids] * 3), scores.repeat(3, 1))[2:4]})  # fmt: skip
    assert counting.calls == [(1, 5), (1, 2), (1, 2), (1, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beam_groups": 3}, "`num_beams` must be a multiple of `num_beam_groups`.*4 and 3"),
        ({"num_beams": 0}, "both at least 1, but they are 0 and 2"),
        ({"diversity_penalty": 0.0}, "`diversity_penalty` must be above 0 with several groups, but is 0.0.*or set"),
        ({"diversity_penalty": float("nan")}, "`diversity_penalty` must be above 0"),
        ({"num_return_sequences": 5}, r"`num_return_sequences` must be 1 to `num_beams` \(4\), but is 5"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, but is 0"),
        ({"early_stopping": "always"}, "`early_stopping` must be True, False or 'never', but is 'always'"),
        ({"length_penalty": float("inf")}, "`length_penalty` must be a finite number, but is inf"),
        ({"eos_token_id": []}, r"`eos_token_id` must be one or more token ids, but is \[\]"),
        (
            {"eos_token_id": list(range(64))},
            "64 EOS tokens need a vocabulary of 65 tokens, but it has 64. Check `eos_token_id`",
        ),
    ],
)
def test_bad_options_are_named(model, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        diverse_beam_search(model, *prompts, **SEARCH | changes)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2], [0, 0]], [[1, 1], [0, 0]], "Prompt 1 of `input_ids` has no token"),
        ([[1, 2], [3, 0]], [[1, 1], [1, 0]], "padding right of a token; pad prompts on the left"),
        ([[1, 2]], [[1, 1, 1]], r"must both be \(prompts, tokens\), but are \(1, 2\) and \(1, 3\)"),
        ([1, 2], [1, 1], r"must both be \(prompts, tokens\), but are \(2,\) and \(2,\)"),
    ],
)
def test_bad_prompts_are_named(model, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        diverse_beam_search(model, torch.tensor(ids), torch.tensor(mask), **SEARCH)


def test_no_prompts_are_refused(model):
    with pytest.raises(ValueError, match="`input_ids` holds no prompt; only with `synced_gpus`"):
        diverse_beam_search(model, torch.zeros(0, 3, dtype=torch.long), None, **SEARCH)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_mean_nothing_are_an_error(prompts, value):
    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    broken = LlamaForCausalLM(config).eval()
    broken.lm_head.weight.data[7] = value
    with pytest.raises(LogitsError, match="logits of `model` for prompt 0 at new token 1 are NaN.*float16.*bfloat16"):
        diverse_beam_search(broken, *prompts, **SEARCH)


def test_processor_that_makes_nan_is_named(model, prompts):
    def broken(ids, scores):
        return scores / 0 * 0 if ids.shape[1] == 7 else scores

    with pytest.raises(LogitsError, match="scores of `logits_processor` for prompt 0 at new token 3 are NaN"):
        diverse_beam_search(model, *prompts, logits_processor=broken, **SEARCH)


def test_arguments_are_not_changed(model, prompts):
    ids, mask = prompts
    before = ids.clone(), mask.clone()
    diverse_beam_search(model, ids, mask, **SEARCH)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


SHARDED = """
import json, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from rollouts.decoding import diverse_beam_search
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2 and type(model.lm_head.weight).__name__ == "DTensor"
found = []
for work in json.loads(sys.argv[2])[rank]:
    ids = torch.tensor(work.pop("ids"), dtype=torch.long).view(-1, 3)
    answer = diverse_beam_search(model, ids, None, synced_gpus=True, **work)
    found.append([answer.sequences.tolist(), answer.scores.tolist()])
with open(f"{sys.argv[3]}/{rank}.json", "w") as file:
    json.dump(found, file)
print(f"process {rank} has written its results")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_model_on_two_processes_that_end_at_different_lengths(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "sharded.py").write_text(SHARDED)
    longer = SEARCH | {"max_new_tokens": 20}
    # The first calls end after 3 and 20 tokens; in the second one, a process has no prompt at all.
    work = [
        [SEARCH | {"ids": [[5, 9, 13]], "max_new_tokens": 3}, longer | {"ids": [[7, 8, 9], [30, 31, 32]]}],
        [longer | {"ids": [[4, 8, 15], [16, 23, 42]]}, SEARCH | {"ids": []}],
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "sharded.py"), str(tmp_path / "model"), json.dumps(work), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for rank, calls in enumerate(work):
        for options, (sequences, scores) in zip(
            calls, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True
        ):
            if not (ids := options.pop("ids")):
                assert sequences == [] and scores == []
                continue
            alone = diverse_beam_search(model, torch.tensor(ids), None, **options)
            assert sequences == alone.sequences.tolist()
            assert scores == pytest.approx(alone.scores.tolist(), abs=1e-5)
