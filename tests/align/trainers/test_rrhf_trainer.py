"""The trainer on toy models: what is learned and logged, and that micro-batches, processes and kills change nothing."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM

from align.losses import rrhf_loss
from align.scratch import build_from_scratch
from align.trainers import RRHFConfig, RRHFTrainer
from align.trainers.ranked_data import RankedDataError, prepare_ranked

pytestmark = pytest.mark.slow  # everything here trains, if only for a second

REPOSITORY = Path(__file__).parents[3]
NAMES = ["dream", "shaper", "fox", "8k", "red", "water"]
COMMON = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 2,
    "max_grad_norm": 1e9,
    # So large that rounding of tiny gradients is not blown up to whole steps.
    "adam_epsilon": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def ranked(count, seed=0):
    """Lists of two to four calls; rewards are random, some missing, some equal."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        chosen = generator.sample(NAMES, generator.randint(2, 4))
        rewards = [generator.choice([None, 0.2, 0.4, 0.6, 0.8, 1.0]) for _ in chosen]
        rewards[0] = 0.5
        rows.append(
            {
                "prompt": f"a fox {number}",
                "responses": [f'{{"model": "{name}", "width": 512}}'[: generator.randint(14, 40)] for name in chosen],
                "rewards": rewards,
                "choices": chosen,
            }
        )
    return rows


@pytest.fixture
def policy(tokenizer, tiny):
    return lambda: build_from_scratch(tiny, tokenizer)


@pytest.fixture
def trainer_of(policy, tokenizer, tmp_path):
    def make(rows, eval_rows=None, model=None, folder="run", **options):
        keywords = {
            name: options.pop(name) for name in ("peft_config", "compute_metrics", "callbacks") if name in options
        }
        args = RRHFConfig(output_dir=str(tmp_path / folder), **(COMMON | options))
        return RRHFTrainer(policy() if model is None else model, args, rows, eval_rows, tokenizer, **keywords)

    return make


def logs(trainer, key="loss"):
    return [line for line in trainer.state.log_history if key in line]


def numbers(lines):
    """Of a log, without those that say how long it took."""
    return [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second", "epoch"))} for line in lines]


def assert_same_run(found, expected, tolerance=1e-5):
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def assert_same_weights(found, expected, tolerance=1e-5):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=tolerance)


# Batches


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_gradient_accumulation_changes_nothing(trainer_of, size, accumulation, packing):
    """20 prompts make steps of 8, 8 and 4: the last one must not count for more or less."""
    rows = ranked(20)
    at_once = trainer_of(rows, per_device_train_batch_size=8)
    at_once.train()
    bit_by_bit = trainer_of(
        rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, packing=packing
    )
    bit_by_bit.train()
    assert len(logs(at_once)) == 6
    assert all({"loss", "grad_norm", "loss/rank", "rank/accuracy"} <= line.keys() for line in logs(bit_by_bit))
    assert_same_run(logs(bit_by_bit), logs(at_once))
    assert_same_weights(bit_by_bit.model.state_dict(), at_once.model.state_dict())


def test_first_loss_and_gradient_are_the_papers(trainer_of, policy, tokenizer, naive):
    """Of a whole epoch as one step, with every sequence alone and the gradient of the mean over prompts."""
    rows = ranked(6)
    trainer = trainer_of(rows, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1)
    trainer.train()
    model = policy()
    losses = []
    for row in prepare_ranked(rows, tokenizer).rows:
        (logps,) = naive(model, [row])
        padded = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)[None]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in logps], True)[None]
        losses.append(rrhf_loss(padded, mask, torch.tensor([row["rewards"]])))
    mean = torch.stack([out.loss for out in losses]).mean()
    mean.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    (line,) = logs(trainer)
    assert line["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert line["loss/rank"] == pytest.approx(sum(out.rank.item() for out in losses) / 6, rel=1e-5)
    assert line["loss/ce"] == pytest.approx(sum(out.ce.item() for out in losses) / 6, rel=1e-5)


def test_logs_are_means_over_all_prompts(trainer_of):
    """One log of six prompts, in batches of 4 and 2, beside the logs of the prompts one by one; no step in between."""
    rows = ranked(6)
    together = trainer_of(rows, per_device_train_batch_size=4, learning_rate=0.0, logging_steps=2, num_train_epochs=1)
    together.train()
    single = trainer_of(rows, per_device_train_batch_size=1, learning_rate=0.0, num_train_epochs=1)
    single.train()
    (line,), lines = logs(together), logs(single)
    assert len(lines) == 6
    names = [name for name in line if name.startswith(("loss/", "rank/"))]
    assert len(names) == 10
    for name in names:
        known = [one[name] for one in lines if name in one]
        assert line[name] == pytest.approx(sum(known) / len(known), rel=1e-5, abs=1e-6), name
    # A prompt whose rewards are all equal has no accuracy.
    assert sum("rank/accuracy" in one for one in lines) < 6 or all(len(set(r["rewards"]) - {None}) > 1 for r in rows)


# Learning


def toy(count=24):
    """A learnable ranking: "8k" is best for a fox and "red" for a cat, whatever the number."""
    return [
        {
            "prompt": f"a {'fox' if number % 2 else 'cat'} {number // 2}:",
            "responses": ["8k", "red", "water"],
            "rewards": [0.9, 0.1, 0.5] if number % 2 else [0.1, 0.9, 0.5],
            "choices": ["8k", "red", "water"],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("options", [{}, {"loss_type": "simpo"}, {"loss_type": "bradley_terry"}, {"loss_type": "dpo"}])
def test_a_toy_ranking_is_learned(trainer_of, options):
    rows = toy()
    trainer = trainer_of(
        rows[8:], rows[:8], per_device_train_batch_size=4, num_train_epochs=12, adam_epsilon=1e-8, **options
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert before["eval_rank/accuracy"] < 0.7
    assert after["eval_rank/accuracy"] > 0.95
    assert after["eval_rank/kendall_tau"] > 0.9
    assert after["eval_rank/regret"] < 0.05
    # Four prompts each: two choices, equally frequent.
    assert after["eval_rank/effective_choices"] == pytest.approx(2)


def test_dpo_starts_at_the_reference(trainer_of):
    """Every pair has a loss of log 2 and every margin is 0, whatever batches the reference was scored in."""
    rows = [row | {"rewards": [0.1, 0.3, 0.5, 0.7][: len(row["rewards"])]} for row in ranked(7)]
    trainer = trainer_of(
        rows, rows, loss_type="dpo", kl_weight=0.5, learning_rate=0.0, per_device_train_batch_size=3,
        per_device_eval_batch_size=2, num_train_epochs=1,
    )  # fmt: skip
    evaluated = trainer.evaluate()
    trainer.train()
    assert evaluated["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluated["eval_rank/margin"] == pytest.approx(0, abs=1e-4)
    for line in logs(trainer):
        assert line["loss/rank"] == pytest.approx(math.log(2), abs=1e-5)
        assert line["loss/kl"] == pytest.approx(0, abs=1e-6)
        assert line["rank/margin"] == pytest.approx(0, abs=1e-4)


def test_dpo_starts_at_the_reference_in_mixed_precision(trainer_of):
    """The reference is scored in bfloat16 as the policy is, or it would seem to differ from it."""
    trainer = trainer_of(toy(8), loss_type="dpo", learning_rate=0.0, per_device_train_batch_size=1, bf16=True)
    trainer.train()
    exact = [abs(line["rank/margin"]) for line in logs(trainer)]
    assert max(exact) < 1e-6


def test_kl_moves_away_from_0_and_holds_back(trainer_of):
    found = {}
    for weight in (1e-6, 30.0):
        trainer = trainer_of(toy(8), per_device_train_batch_size=8, kl_weight=weight, num_train_epochs=6)
        trainer.train()
        kl = [line["loss/kl"] for line in logs(trainer)]
        assert kl[0] == pytest.approx(0, abs=1e-6)
        assert kl[-1] > 1e-5
        first = logs(trainer)[0]
        assert first["loss"] == pytest.approx(first["loss/rank"] + first["loss/ce"], rel=1e-5)
        last = logs(trainer)[-1]
        assert last["loss"] == pytest.approx(last["loss/rank"] + last["loss/ce"] + weight * kl[-1], rel=1e-4)
        found[weight] = kl[-1]
    assert found[30.0] < found[1e-6] / 2


def test_options_reach_the_loss(trainer_of, policy, tokenizer, naive):
    rows = ranked(3)
    for row in rows:
        row["standard_errors"] = [0.1] * len(row["rewards"])
    options = {
        "rank_weight": 3.0, "ce_weight": 0.5, "ce_per_token": True, "length_exponent": 0.5, "margin": 0.2,
        "pair_reduction": "mean",
    }  # fmt: skip
    trainer = trainer_of(
        rows, per_device_train_batch_size=3, num_train_epochs=1, tie_standard_errors=2.0, learning_rate=0.0, **options
    )
    trainer.train()
    expected = []
    for row in prepare_ranked(rows, tokenizer).rows:
        (logps,) = naive(policy(), [row])
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in logps], True)[None]
        padded = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)[None]
        # Two standard errors of a difference of rewards that have 0.1 each.
        gap = 2 * math.hypot(0.1, 0.1)
        expected.append(rrhf_loss(padded, mask, torch.tensor([row["rewards"]]), min_gap=gap, **options).loss.item())
    assert logs(trainer)[0]["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


# Evaluation


def test_evaluation_by_hand(trainer_of, policy, tokenizer, naive):
    """Beside every sequence alone, scipy's tau and a count of what is chosen; the last batch is smaller."""
    rows = ranked(7, seed=3)
    trainer = trainer_of(rows, rows, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    model, accuracies, taus, chosen, losses, regrets = policy(), [], [], [], [], []
    for row in prepare_ranked(rows, tokenizer).rows:
        (logps,) = naive(model, [row])
        p, rewards = [float(x.detach().mean()) for x in logps], row["rewards"]
        pairs = [(i, j) for i, a in enumerate(rewards) for j, b in enumerate(rewards) if a < b]
        if pairs:
            accuracies.append(sum(p[j] > p[i] for i, j in pairs) / len(pairs))
            taus.append(kendalltau(p, rewards).statistic)
        best = max(range(len(rewards)), key=lambda i: (rewards[i], -i))
        losses.append(sum(max(0.0, p[i] - p[j]) for i, j in pairs) - float(logps[best].detach().sum()))
        likeliest = int(np.argmax(p))
        chosen.append(row["choices"][likeliest])
        regrets.append(max(rewards) - rewards[likeliest])
    shares = [chosen.count(name) / 7 for name in set(chosen)]
    entropy = -sum(share * math.log(share) for share in shares)
    assert 1 < len(set(chosen)) < 7
    assert found["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["eval_rank/accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-5)
    assert found["eval_rank/kendall_tau"] == pytest.approx(np.mean(taus), rel=1e-5)
    assert found["eval_rank/regret"] == pytest.approx(np.mean(regrets), rel=1e-5)
    assert found["eval_rank/selection_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["eval_rank/effective_choices"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_evaluation_knows_ties_by_standard_errors(trainer_of):
    rows = [row | {"standard_errors": [0.0, 0.0, 0.3]} for row in toy(4)]
    plain = trainer_of(rows, rows).evaluate()
    # "water" ties with both others now, so that one pair of three is left.
    tied = trainer_of(rows, rows, tie_standard_errors=2.0)
    found = tied.evaluate()
    assert found["eval_rank/violations"] in (0, 0.25, 0.5, 0.75, 1)
    assert found["eval_rank/accuracy"] + found["eval_rank/violations"] == 1
    assert plain["eval_rank/accuracy"] * 3 + plain["eval_rank/violations"] == pytest.approx(3)
    assert found["eval_rank/effective_choices"] == pytest.approx(plain["eval_rank/effective_choices"])


def test_metrics_of_ones_own(trainer_of):
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"first": float(prediction.predictions[0, 0])}

    rows = toy(4)
    trainer = trainer_of(rows, rows, compute_metrics=compute, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (4, 3)
    rewards, choices = prediction.label_ids
    assert rewards.tolist() == [pytest.approx(row["rewards"]) for row in rows]
    assert choices.tolist() == [[0, 1, 2]] * 4  # in alphabetical order
    assert found["eval_first"] == prediction.predictions[0, 0]
    assert not any(name.startswith("eval_rank/") for name in found)


def test_choices_are_used_only_if_every_row_has_them(trainer_of):
    rows = toy(4)
    del rows[2]["choices"]
    found = trainer_of(rows, rows).evaluate()
    assert "eval_rank/accuracy" in found
    assert "eval_rank/selection_entropy" not in found


# Data


def test_texts_ids_messages_and_datasets_are_the_same(trainer_of, tokenizer):
    texts = ranked(6)
    prepared = prepare_ranked(texts, tokenizer).rows
    ids = [{name: row[name] for name in ("prompt_ids", "responses", "rewards", "choices")} for row in prepared]
    template = "{{ messages[0]['content'] }}"
    expected = None
    for rows in (texts, ids, Dataset.from_list(texts), (dict(row) for row in texts)):
        trainer = trainer_of(rows, per_device_train_batch_size=2, num_train_epochs=1)
        trainer.train()
        expected = expected or logs(trainer)
        assert_same_run(logs(trainer), expected, tolerance=1e-9)
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        trainer = trainer_of(messages, per_device_train_batch_size=2, num_train_epochs=1)
    finally:
        tokenizer.chat_template = original
    trainer.train()
    assert_same_run(logs(trainer), expected, tolerance=1e-9)


def test_what_can_not_be_learned_from_is_left_out_and_counted(trainer_of):
    rows = [*toy(2), {"prompt": "x", "responses": ["8k" * 40, ""], "rewards": [1.0, 2.0]}]
    trainer = trainer_of(rows, toy(2), per_device_train_batch_size=3, num_train_epochs=1, max_length=30)
    assert len(trainer.train_dataset) == 2
    assert trainer.train_data.skipped == {
        "response_too_long": 1, "empty_response": 1, "prompt_without_candidate": 1
    }  # fmt: skip
    assert trainer.eval_data.skipped == {}
    trainer.train()
    assert math.isfinite(logs(trainer)[0]["loss"])


@pytest.mark.parametrize("rewards", [[0.5, 0.5], [0.5, None]])
def test_prompts_that_rank_nothing_have_the_cross_entropy_only(trainer_of, rewards):
    rows = [{"prompt": "a fox", "responses": ["8k", "red"], "rewards": rewards}]
    trainer = trainer_of(rows, rows, num_train_epochs=1)
    trainer.train()
    (line,) = logs(trainer)
    assert line["loss/rank"] == 0
    assert line["loss"] == pytest.approx(line["loss/ce"])
    assert "rank/accuracy" not in line
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_bad_rows_and_missing_tokenizers_are_named(policy, tokenizer, tmp_path):
    args = RRHFConfig(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(RankedDataError, match="eval_dataset, row 1: `rewards` has 1 entries, but there are 3"):
        RRHFTrainer(policy(), args, toy(2), [toy()[0], toy()[1] | {"rewards": [1.0]}], tokenizer)
    with pytest.raises(RankedDataError, match="train_dataset has no candidate to learn from"):
        RRHFTrainer(policy(), args, [], None, tokenizer)
    with pytest.raises(ValueError, match="`processing_class` must be a tokenizer with an end token"):
        RRHFTrainer(policy(), args, toy(2))


def test_several_gpus_in_one_process_are_refused(policy, tokenizer, tmp_path):
    args = RRHFConfig(output_dir=str(tmp_path), **COMMON)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(ValueError, match="One process can't train on 2 GPUs; start it with accelerate launch"):
        RRHFTrainer(policy(), args, toy(2), None, tokenizer)


# Kinds of training


def test_packing_off_is_the_same_run(trainer_of):
    runs = []
    for packing in (True, False):
        trainer = trainer_of(ranked(8), per_device_train_batch_size=4, packing=packing)
        assert trainer.way.packed is packing
        trainer.train()
        runs.append(trainer)
    assert_same_run(logs(runs[1]), logs(runs[0]))
    assert_same_weights(runs[1].model.state_dict(), runs[0].model.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_is_the_same_run(trainer_of, use_reentrant, lora):
    runs = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        if lora:
            options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        torch.manual_seed(0)
        trainer = trainer_of(ranked(8), per_device_train_batch_size=4, **options)
        trainer.train()
        runs.append(trainer)
    assert runs[1].model.is_gradient_checkpointing
    assert_same_run(logs(runs[1]), logs(runs[0]))
    assert_same_weights(runs[1].model.state_dict(), runs[0].model.state_dict())


@pytest.mark.parametrize("wrapped_before", [False, True])
def test_lora_moves_the_adapter_only_and_it_loads(trainer_of, policy, tmp_path, wrapped_before):
    from peft import get_peft_model

    rows, config = toy(8), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    before = policy().state_dict()
    given = {"model": get_peft_model(policy(), config)} if wrapped_before else {"peft_config": config}
    trainer = trainer_of(
        rows, rows, per_device_train_batch_size=4, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True}, loss_type="dpo", kl_weight=0.1, **given,
    )  # fmt: skip
    trainer.train()
    assert logs(trainer)[0]["loss/rank"] == pytest.approx(math.log(2), abs=1e-5)
    after = trainer.model.get_base_model().state_dict()
    for name, weight in before.items():
        found = after.get(name, after.get(name.replace("_proj.weight", "_proj.base_layer.weight")))
        assert torch.equal(found, weight), name
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(policy(), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = trainer.model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert (loaded(ids).logits - policy()(ids).logits).abs().max() > 1e-4


def test_dropout_is_off(trainer_of, tokenizer):
    from transformers import GPT2Config, LlamaConfig

    sizes = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5, **sizes)
    llama = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.5, **sizes)
    for config in (gpt2, llama):
        model = AutoModelForCausalLM.from_config(config)
        trainer = trainer_of(toy(4), model=model, learning_rate=0.0, per_device_train_batch_size=4)
        trainer.train()
        first, second = logs(trainer)
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
        # And it is back on request, which shows that the above could have failed.
        model = AutoModelForCausalLM.from_config(config)
        trainer = trainer_of(
            toy(4), model=model, learning_rate=0.0, per_device_train_batch_size=4, disable_dropout=False
        )
        trainer.train()
        first, second = logs(trainer)
        assert abs(first["loss"] - second["loss"]) > 1e-4


def test_a_model_that_can_not_be_packed(trainer_of, tokenizer, caplog):
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=3)
    trainer = trainer_of(toy(4), model=AutoModelForCausalLM.from_config(config), per_device_train_batch_size=2)
    assert (trainer.way.packed, trainer.way.fused_head) == (False, True)
    assert "log-probabilities are computed padded" in caplog.text
    trainer.train()
    assert logs(trainer)[-1]["loss"] < logs(trainer)[0]["loss"]


def test_model_and_tokenizer_from_a_folder(policy, tokenizer, tmp_path):
    policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    args = RRHFConfig(output_dir=str(tmp_path / "run"), **COMMON)
    trainer = RRHFTrainer(str(tmp_path / "policy"), args, toy(4))
    trainer.train()
    trainer.save_model()
    again, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(notes.values()), notes
    assert_same_weights(again.state_dict(), trainer.model.state_dict(), tolerance=0)
    assert (tmp_path / "run/tokenizer.json").is_file()


@pytest.mark.parametrize("options", [{}, {"loss_type": "dpo"}])
def test_a_resumed_run_is_the_uninterrupted_one(trainer_of, options):
    rows = ranked(20)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = trainer_of(rows, folder="whole", **options)
    whole.train()
    first = trainer_of(rows, folder="cut", save_strategy="steps", save_steps=3, **options)
    first.train()
    second = trainer_of(rows, folder="cut", **options)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-3"))
    assert len(logs(whole)) == len(logs(second)) == 10
    assert_same_run(logs(second), logs(whole), tolerance=1e-6)
    assert_same_weights(second.model.state_dict(), whole.model.state_dict(), tolerance=1e-6)


# Processes

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from align.distributed import leave_process_group, prepare_cpu_deepspeed
from align.trainers import RRHFConfig, RRHFTrainer

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
args = RRHFConfig(output_dir=sys.argv[2], **given["options"])
prepare_cpu_deepspeed(args)
trainer = RRHFTrainer(str(folder / "policy"), args, given["rows"], given["eval_rows"])
trainer.train()
even = trainer.evaluate(trainer.eval_dataset.select(range(4)))
evaluated = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    report = {
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.name,
        "stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "way": trainer.way,
        "logs": trainer.state.log_history,
        "evaluated": [even, evaluated],
    }
    (Path(sys.argv[2]) / "report.json").write_text(json.dumps(report))
leave_process_group()
assert not torch.distributed.is_initialized()
"""


@pytest.fixture(scope="module")
def one_process(tokenizer, tmp_path_factory):
    """A script with all it needs, and what it gives on one process: steps of 8, 8 and 4 prompts."""
    from align.scratch import ScratchConfig

    folder = tmp_path_factory.mktemp("processes")
    size = ScratchConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    build_from_scratch(size, tokenizer).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows, eval_rows = ranked(20), ranked(7, seed=3)
    options = COMMON | {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    given = {"rows": rows, "eval_rows": eval_rows, "options": options}
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "run.py").write_text(SCRIPT)
    args = RRHFConfig(output_dir=str(folder / "one"), **(options | {"per_device_train_batch_size": 4}))
    trainer = RRHFTrainer(str(folder / "policy"), args, rows, eval_rows)
    trainer.train()
    evaluated = [trainer.evaluate(trainer.eval_dataset.select(range(4))), trainer.evaluate()]
    return folder, trainer, evaluated


@pytest.mark.parametrize(
    ("config", "kind", "stage"),
    [("cpu_ddp", "MULTI_CPU", None), ("cpu_zero2", "DEEPSPEED", 2), ("cpu_zero3", "DEEPSPEED", 3)],
)
def test_two_processes_are_the_run_of_one(one_process, tmp_path, config, kind, stage):
    if stage:
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    folder, expected, evaluated = one_process
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [REPOSITORY / f"configs/accelerate/{config}.yaml", folder / "run.py", folder, tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["processes"], report["kind"], report["stage"]) == (2, kind, stage)
    assert report["way"] == [True, True, ""]
    found = [line for line in report["logs"] if "loss" in line]
    assert len(found) == 3
    assert_same_run(found, logs(expected))
    # Seven rows are 2 + 2 + 2 + 1: a row is repeated so that both processes have two batches. Numbers of single prompts
    # leave it out again; the mean of the last batch's losses, which `Trainer` sees, does not.
    even, uneven = report["evaluated"]
    assert uneven.pop("eval_loss") == pytest.approx(evaluated[1]["eval_loss"], rel=1e-3)
    assert_same_run([even, uneven], [evaluated[0], {k: v for k, v in evaluated[1].items() if k != "eval_loss"}])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_same_weights(saved, expected.model.state_dict())
