"""Packed, padded and every sequence alone give the same numbers and gradients; what isn't exact is not used."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from align.losses import rrhf_loss, sequence_logps
from align.trainers.layouts import PackedLayout, PaddedLayout
from align.trainers.token_logps import Way, choose_way, token_logps

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens"
WAYS = {
    "packed": Way(packed=True, fused_head=True),
    "packed, all logits": Way(packed=True, fused_head=False),
    "padded": Way(packed=False, fused_head=True),
    "padded, all logits": Way(packed=False, fused_head=False),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def scored(model, rows, way, **options):
    layout = PackedLayout if way.packed else PaddedLayout
    batch = layout(0, max(len(row["responses"]) for row in rows))(rows)
    return token_logps(model, batch, way, **options), batch


def as_lists(logps, rows):
    """Of a batch, in the form of the `naive` fixture."""
    return [[logps[i, j, : len(r)] for j, r in enumerate(row["responses"])] for i, row in enumerate(rows)]


def gradients(model, by_prompt):
    """Of a sum with a weight of its own for each token, so that no two can be mistaken for each other."""
    values = torch.cat([logps for row in by_prompt for logps in row])
    weights = torch.arange(1.0, len(values) + 1).cos() / len(values) ** 0.5
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad((values * weights).sum(), list(learning.values()), allow_unused=True)
    return dict(zip(learning, found, strict=True))


def assert_equal(model, rows, way, naive, tolerance=1e-5):
    expected = naive(model, rows)
    logps, _ = scored(model, rows, way)
    found = as_lists(logps, rows)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    # Gradients that are far from 0, or the comparison would show nothing.
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert max(float(gradient.abs().max()) for gradient in theirs.values() if gradient is not None) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"gradients: {text}")


@every_way
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_equals_every_sequence_alone(build, naive, rows, kind, attention, way):
    assert_equal(build(kind, attention), rows, way, naive)


@pytest.mark.parametrize("way", [WAYS["packed"], WAYS["padded"]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_every_sequence_alone_in_float64(build, naive, rows, kind, attention, way):
    # Llama's norms, rotations and eager softmax are float32 whatever the weights are.
    tolerance = 1e-10 if kind == "gpt2" else 1e-6
    assert_equal(build(kind, attention, torch.float64), rows, way, naive, tolerance)


@every_way
@pytest.mark.parametrize("tied", [True, False])
def test_tied_output_layer(build, naive, rows, tied, way):
    assert_equal(build("llama", tie_word_embeddings=tied), rows, way, naive)


@every_way
@pytest.mark.parametrize(("kind", "modules"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_lora(build, naive, rows, kind, modules, way):
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    torch.manual_seed(0)
    model = get_peft_model(build(kind), config).eval()
    assert_equal(model, rows, way, naive)


@pytest.mark.parametrize("way", [WAYS["packed"], WAYS["padded"]])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing(build, naive, rows, kind, use_reentrant, way):
    plain = build(kind)
    expected = gradients(plain, naive(plain, rows))
    model = build(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    inside = next(module for name, module in model.named_modules() if name.endswith((".layers.1.mlp", ".h.1.mlp")))
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    logps, _ = scored(model, rows, way)
    values = torch.cat([part for row in as_lists(logps, rows) for part in row])
    (values * (torch.arange(1.0, len(values) + 1).cos() / len(values) ** 0.5)).sum().backward()
    assert len(calls) == 2, "the layer was not computed again, so nothing was checkpointed"
    found = {name: weight.grad for name, weight in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


token = st.integers(3, 6)  # few tokens: many shared prefixes
random_row = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(token, min_size=1, max_size=5),
        "responses": st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=6),
        "rewards": st.just([]),
    }
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(random_row, min_size=1, max_size=3))
@pytest.mark.parametrize("way", [WAYS["packed"], WAYS["padded"]])
def test_random_candidates(build, naive, way, rows):
    model = build("llama")
    found, expected = as_lists(scored(model, rows, way)[0], rows), naive(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"the oracle's answers are not at {GOLDENS}")
@pytest.mark.parametrize("way", [WAYS["packed"], WAYS["padded"], WAYS["padded, all logits"]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_oracle(attention, way):
    """Three prompts with five candidates each, scored one by one elsewhere, with gradients of every parameter."""
    golden = json.loads((GOLDENS / "rrhf" / "tiny_llama_end_to_end.json").read_text())
    examples = golden["examples"]
    model = AutoModelForCausalLM.from_pretrained(
        GOLDENS / "tiny_llama", dtype=torch.float64, attn_implementation=attention
    )
    rows = [{"prompt_ids": e["prompt_ids"], "responses": e["responses_ids"], "rewards": e["rewards"]} for e in examples]
    logps, batch = scored(model, rows, way)
    # Norms are float32 inside, and so is the softmax of eager attention (the oracle's was sdpa).
    loose = 1 if attention == "sdpa" else 10
    near = {"rtol": 1e-7 * loose, "atol": 1e-6 * loose}
    for found, example in zip(as_lists(logps, rows), examples, strict=True):
        expected = [torch.tensor(values, dtype=torch.float64) for values in example["token_logps"]]
        torch.testing.assert_close(found, expected, **near)
    p = sequence_logps(logps, batch["mask"])
    torch.testing.assert_close(p, torch.tensor([e["p"] for e in examples], dtype=torch.float64), **near)
    rewards = torch.tensor([e["rewards"] for e in examples], dtype=torch.float64)
    for number, example in enumerate(examples):
        one = slice(number, number + 1)
        out = rrhf_loss(logps[one], batch["mask"][one], rewards[one])
        found = torch.stack([out.rank, out.ce, out.loss])
        expected = torch.tensor([example[name] for name in ("L_rank", "L_ce", "L")], dtype=torch.float64)
        torch.testing.assert_close(found, expected, **near)
    total = rrhf_loss(logps, batch["mask"], rewards).loss * len(rows)
    assert float(total.detach()) == pytest.approx(golden["total_loss_sum_over_prompts"], rel=near["rtol"])
    total.backward()
    assert golden["grad_of_total"].keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        expected = golden["grad_of_total"][name]
        assert float(weight.grad.norm()) == pytest.approx(expected["norm"], rel=1e-6 * loose), name
        first = weight.grad.flatten()[:5].tolist()
        assert first == pytest.approx(expected["first5"], rel=1e-5 * loose, abs=1e-5 * loose), name


# What is chosen, and why


def way_of(model, caplog, **options):
    with caplog.at_level(logging.WARNING, logger="align.trainers.token_logps"):
        way = choose_way(model, **options)
    assert way.reason in caplog.text
    assert bool(way.reason) == bool(caplog.records)
    return way


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_ordinary_models_take_the_cheapest_way(build, caplog, kind, attention):
    assert way_of(build(kind, attention), caplog, longest=1000) == Way(packed=True, fused_head=True, reason="")


CHOICES = {
    "bloom": ("bloom", {"attention": "eager"}, False, True, "packed with the head in chunks fails"),
    "mamba": ("mamba", {"attention": None}, False, True, "packed with the head in chunks fails"),
    "short window": ("mistral", {"sliding_window": 6}, False, True,
                     "17 tokens are longer than the attention window of 6"),
    "long window": ("mistral", {"sliding_window": 17}, True, True, ""),
    "gemma2": ("gemma2", {"attention": "eager", "sliding_window": 17}, True, False, "head in chunks is off by"),
    "gemma2, short window": ("gemma2", {"attention": "eager", "sliding_window": 8}, False, False,
                             "longer than the attention window of 8; padded with the head in chunks is off by"),
    "cohere": ("cohere", {}, True, False, "packed with the head in chunks is off by"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "packed", "fused", "reason"), CHOICES.values(), ids=CHOICES)
def test_the_chosen_way_is_exact(build, naive, rows, caplog, kind, options, packed, fused, reason):
    model = build(kind, **options)
    longest = max(len(row["prompt_ids"]) + len(r) for row in rows for r in row["responses"])
    rows[0]["responses"][2] += [8, 9, 10, 11, 2]  # now 17, and the trie longer than any window
    assert longest == 15
    way = way_of(model, caplog, longest=17)
    assert (way.packed, way.fused_head) == (packed, fused), way
    assert reason in way.reason
    assert bool(way.reason) == bool(reason)
    assert_equal(model, rows, way, naive)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
@pytest.mark.parametrize("spread", [True, False])
def test_positions_and_masks_that_a_model_ignores_are_noticed(build, ignored, spread):
    """Measured, and also with freshly initialized weights, which hardly tell positions apart."""
    model = build("llama")
    if not spread:
        model = AutoModelForCausalLM.from_config(model.config)
    plain = model.forward
    model.forward = lambda **inputs: plain(**{name: value for name, value in inputs.items() if name != ignored})
    way = choose_way(model)
    assert (way.packed, way.fused_head) == (False, True)
    assert "packed with the head in chunks is off by" in way.reason


def test_coarse_rounding_is_no_reason_against_packing(build):
    """TF32 makes the same sequence differ by some 1e-3 between batches."""
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    model.model.norm.register_forward_hook(
        lambda _module, _inputs, output: output * (1 + 1e-3 * torch.randn(output.shape, generator=generator))
    )
    assert choose_way(model) == Way(True, True)


def test_attention_that_takes_no_tree_mask(build, caplog):
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"  # by name only: there is no GPU here
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    plain = copy.deepcopy(model.config)
    plain._attn_implementation = "sdpa"
    for module in model.modules():
        if module is not model and hasattr(module, "config"):
            module.config = plain
    way = way_of(model, caplog)
    assert (way.packed, way.fused_head) == (False, True)
    assert "flash_attention_2 takes no tree mask (set attn_implementation: sdpa)" in way.reason


def test_packing_off(build, caplog):
    assert way_of(build("llama"), caplog, packing=False) == Way(False, True, "`packing` is off")


def test_an_output_layer_that_is_not_linear(build, naive, rows, caplog):
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    way = way_of(model, caplog)
    assert (way.packed, way.fused_head) == (True, False)
    assert "the output layer is a Sequential, not a plain linear layer" in way.reason
    found = as_lists(scored(model, rows, way)[0], rows)
    torch.testing.assert_close(found, naive(model, rows), rtol=1e-5, atol=1e-5)


def test_choosing_leaves_the_model_as_it_was(build):
    model = build("gpt2").train()  # has dropout, which must not disturb the comparison
    before = copy.deepcopy(model.state_dict())
    assert choose_way(model) == Way(True, True)
    assert model.training
    assert model.lm_head.training
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_head_is_restored_after_an_exception(build, rows, wrapped):
    model = build("llama")
    plain = (lambda hidden: hidden) if wrapped else None
    if wrapped:
        model.lm_head.forward = plain
    rows[0]["responses"][0][0] = 10_000  # no such token
    with pytest.raises(IndexError):
        scored(model, rows, WAYS["packed"])
    assert vars(model.lm_head).get("forward") is plain


SHARDED = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from align.trainers.layouts import PackedLayout
from align.trainers.token_logps import Way, choose_way, token_logps

folder = Path(sys.argv[1])
mesh = init_device_mesh("cpu", (2,))
batch = PackedLayout(0, 5)(json.loads((folder / "rows.json").read_text()))

def run(model):
    logps = token_logps(model, batch, Way(True, True)).masked_fill(~batch["mask"], 0.0)
    (logps * torch.arange(1.0, logps.numel() + 1).cos().view_as(logps)).sum().backward()
    whole = lambda gradient: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return logps.detach(), {name: whole(weight.grad) for name, weight in model.named_parameters()}

def compare(path):
    plain, model = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    expected = run(plain)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    way = choose_way(model)
    found = run(model)
    return {
        "size": dist.get_world_size(),
        "kinds": sorted({type(weight).__name__ for weight in model.parameters()}),
        "share": sum(w.to_local().numel() for w in model.parameters()) / sum(w.numel() for w in plain.parameters()),
        "way": way,
        "logps": float((found[0] - expected[0]).abs().max()),
        "gradients": max(float((found[1][name] - g).abs().max()) for name, g in expected[1].items()),
        "largest": max(float(g.abs().max()) for g in expected[1].values()),
    }

reports = [compare(folder / name) for name in ("tied", "untied")]
if dist.get_rank() == 0:
    (folder / "reports.json").write_text(json.dumps(reports))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fully_sharded_weights(build, rows, tmp_path):
    """accelerate ignores FSDP on CPU, so torch's own `fully_shard`: the head is gathered inside its own call."""
    for name in ("tied", "untied"):
        build("llama", tie_word_embeddings=name == "tied").save_pretrained(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, tmp_path / "run.py", tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert len(reports) == 2
    for report in reports:
        assert (report["size"], report["kinds"]) == (2, ["DTensor"])
        assert report["share"] == pytest.approx(0.5, abs=0.01)
        assert report["way"] == [True, True, ""]
        assert report["logps"] < 1e-5
        # Both processes have the same batch, so the mean of their gradients is the gradient.
        assert report["gradients"] < 1e-5 * report["largest"]
