"""Training on cached hidden states beside the plain loop, and after kills."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from align.run_directory import read_metrics
from align.trainers.model_token_cache import ModelTokenExamples
from align.trainers.model_token_config import ModelTokenConfig, ModelTokenError
from align.trainers.model_token_fit import FitScores, epoch_batches, memory_source, score_rows
from align.trainers.model_token_initial import class_mean_rows
from align.trainers.model_token_loss import loss_and_gradient
from align.trainers.model_token_rows import ModelTokens
from align.trainers.model_token_trainer import ModelTokenTrainer

REPOSITORY = Path(__file__).parents[3]
NAMES = ["Dream - v1", "Shaper", "Fox"]
NAME_IDS = [[4, 5], [6], [7, 8, 9]]


def examples_of(count, seed=0):
    """Prefixes of 6 to 9 tokens; their end tells the model, so that it can be learned."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (count,), generator=generator).tolist()
    prefixes = [
        [*torch.randint(0, 96, (n,), generator=generator).tolist(), *[i % 3] * 5] for i, n in enumerate(lengths)
    ]
    return ModelTokenExamples(prefixes, [number % 3 for number in range(count)])


def config_of(folder, **options):
    plain = {"num_epochs": 3, "batch_size": 4, "init": "names", "validation_fraction": 0.0, "part_rows": 5}
    return ModelTokenConfig(str(folder), **(plain | options))


def trainer_of(model, folder, examples=None, eval_examples=None, **options):
    return ModelTokenTrainer(
        model, config_of(folder, **options), NAMES, examples or examples_of(18), eval_examples, name_ids=NAME_IDS
    )


def plain_loop(model, rows, config, examples):
    """What ToolkenGPT and ChatGen do: a resized output layer, the whole model at every step, autograd, old rows reset.

    Returns the resized model's output layer.
    """
    model = copy.deepcopy(model)
    size = len(model.get_output_embeddings().weight)
    model.resize_token_embeddings(size + len(rows), mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[size:] = rows
        if head.bias is not None:
            head.bias[size:] = 0
    old = head.weight[:size].detach().clone()
    model.requires_grad_(False)
    head.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([head.weight], lr=config.learning_rate, weight_decay=config.weight_decay)
    steps, taken = -(-len(examples) // config.batch_size) * config.num_epochs, 0
    for epoch in range(config.num_epochs):
        for index in epoch_batches(torch.arange(len(examples)), config.batch_size, seed=config.seed, epoch=epoch):
            prefixes = [torch.tensor(examples.prefixes[number]) for number in index.tolist()]
            ids = nn.utils.rnn.pad_sequence(prefixes, batch_first=True)
            lengths = torch.tensor([len(prefix) for prefix in prefixes])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(ids)), lengths - 1]
            labels = torch.tensor([examples.labels[number] for number in index.tolist()]) + size
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            # Old rows must not see a gradient; where they are the input embedding, they have one from there as well.
            head.weight.grad[:size] = 0
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - taken / steps)
            optimizer.step()
            head.weight.data[:size] = old
            taken += 1
    return head


def model_of(build, kind, tied, bias, dtype=torch.float64):
    model = build(kind, "eager" if kind == "gemma2" else "sdpa", dtype=dtype, tie_word_embeddings=tied)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(96, generator=torch.Generator().manual_seed(3)).to(dtype))
    return model


@pytest.mark.parametrize("block_rows", [2, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere"])
def test_equals_the_plain_loop(build, tmp_path, kind, tied, bias, block_rows):
    model = model_of(build, kind, tied, bias)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = trainer_of(
        model,
        tmp_path,
        dtype="float64",
        learning_rate=0.05,
        weight_decay=0.1,
        block_rows=block_rows,
        tokens_per_batch=20,
    )
    first = trainer.initial_rows(memory_source(trainer.build_cache(), dtype=torch.float64, device="cpu", memory_mb=1))
    found = trainer.train()
    assert float((found.rows - first).abs().max()) > 0.1, "something must have been learned"
    head = plain_loop(model, first, trainer.config, trainer.examples)
    torch.testing.assert_close(found.rows, head.weight[96:].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)  # every old weight, bit by bit


@pytest.mark.parametrize("memory_mb", [0, 1])
def test_reading_from_files_changes_nothing(build, tmp_path, memory_mb):
    model = build("llama")
    found = trainer_of(model, tmp_path / str(memory_mb), memory_mb=memory_mb).train()
    expected = trainer_of(model, tmp_path / "other").train()
    assert torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize("init", ["names", "descriptions", "class_means", "normal", "zeros"])
@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_learns(build, tmp_path, optimizer, init):
    config = config_of(tmp_path, init=init, optimizer=optimizer, num_epochs=40, learning_rate=0.05, patience=None)
    train, unseen = examples_of(240), examples_of(60, seed=1)
    trainer = ModelTokenTrainer(
        build("llama"), config, NAMES, train, unseen, name_ids=NAME_IDS, description_ids=NAME_IDS[::-1]
    )
    trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] < 0.35 and max(line["eval_accuracy/top1"] for line in lines) >= 0.9
    assert lines[-1]["eval_accuracy/top5"] == 1.0 and lines[-1]["eval_probability/models"] > 0.9


def test_lbfgs_is_at_the_minimum(build, tmp_path):
    """Where the gradient of the loss is that of the penalty, but for the sign."""
    trainer = trainer_of(build("gpt2", dtype=torch.float64), tmp_path, optimizer="lbfgs", l2=0.01, dtype="float64")
    rows = trainer.train().rows
    source = memory_source(trainer.build_cache(), dtype=torch.float64, device=torch.device("cpu"), memory_mb=1)
    batch = source(trainer.train_index)
    loss, gradient = loss_and_gradient(rows, batch.hidden, batch.labels, batch.word_lse)
    assert loss < 1 and float(gradient.norm()) > 1e-3
    torch.testing.assert_close(gradient, 0.01 * (trainer.initial_rows(source) - rows), rtol=0, atol=1e-6)


def test_scores_by_hand(build, tmp_path):
    trainer = trainer_of(build("llama"), tmp_path, validation_fraction=0.5)
    assert len(trainer.eval_index) == 9 and not set(trainer.eval_index.tolist()) & set(trainer.train_index.tolist())
    source = memory_source(trainer.build_cache(), dtype=torch.float32, device=torch.device("cpu"), memory_mb=1)
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = trainer.evaluate(rows, source)
    logits = []
    for number in trainer.eval_index.tolist():
        hidden = trainer.backbone([trainer.examples.prefixes[number]]).hidden[0]
        logits.append(torch.cat([trainer.backbone.head.weight, rows]) @ hidden)
    logits = torch.stack(logits).detach()
    labels = torch.tensor([trainer.examples.labels[number] for number in trainer.eval_index.tolist()])
    expected = FitScores(
        loss=F.cross_entropy(logits, labels + 96).item(),
        top1=(logits[:, 96:].argmax(1) == labels).float().mean().item(),
        top5=1.0,
        ahead_of_words=(logits.argmax(1) == labels + 96).float().mean().item(),
        probability_of_models=logits.softmax(1)[:, 96:].sum(1).mean().item(),
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_class_means(build, tmp_path):
    """They find models before any training, compete with words, and leave models without examples level with them."""
    trainer = trainer_of(build("llama"), tmp_path, examples_of(240))
    source = memory_source(trainer.build_cache(), dtype=torch.float32, device=torch.device("cpu"), memory_mb=1)
    rows = class_mean_rows(source, trainer.train_index, 4)
    scores = score_rows(rows, source, trainer.train_index)
    assert scores.top1 > 0.7 and scores.ahead_of_words > 0.6
    batch = source(trainer.train_index)
    assert float((batch.hidden @ rows[3]).mean()) == pytest.approx(float(batch.word_lse.mean()), rel=1e-4)
    assert class_mean_rows(source, torch.tensor([0]), 3).isfinite().all(), "a single example"


@pytest.mark.parametrize("init", ["class_means", "names"])
@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_one_model(build, tmp_path, optimizer, init):
    examples = ModelTokenExamples([[1, 2], [3], [4, 5]], [0, 0, 0])
    config = config_of(tmp_path, optimizer=optimizer, init=init, num_epochs=50, learning_rate=0.1)
    tokens = ModelTokenTrainer(build("llama"), config, ["only"], examples, name_ids=[[4]]).train()
    assert tokens.rows.shape == (1, 32)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] < 0.1


def test_early_stopping_keeps_the_best(build, tmp_path):
    """Labels by chance can't be learned: the validation loss soon rises."""
    examples = examples_of(40)
    chance = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    options = {"num_epochs": 60, "learning_rate": 0.1, "patience": 3, "validation_fraction": 0.25, "batch_size": 8}
    tokens = trainer_of(build("llama"), tmp_path, ModelTokenExamples(examples.prefixes, chance), **options).train()
    losses = [line["eval_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) < 60 and len(losses) - 1 - losses.index(min(losses)) == 3
    trainer = trainer_of(build("llama"), tmp_path, ModelTokenExamples(examples.prefixes, chance), **options)
    source = memory_source(trainer.build_cache(), dtype=torch.float32, device=torch.device("cpu"), memory_mb=1)
    assert trainer.evaluate(tokens.rows, source).loss == pytest.approx(min(losses))
    assert torch.equal(trainer.train().rows, tokens.rows), "a run that has ended ends at once, with the same"


def without_seconds(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path)]


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_resumes_to_the_same(build, tmp_path, optimizer, monkeypatch):
    """Stopped after two epochs by a full disk; the line of a third one is there, its checkpoint is not."""
    options = {"optimizer": optimizer, "num_epochs": 5, "validation_fraction": 0.2, "patience": None}
    expected = trainer_of(build("llama"), tmp_path / "whole", **options).train()
    stopped = trainer_of(build("llama"), tmp_path / "run", **options)
    save, saved = stopped._save_checkpoint, []

    def failing(*arguments):
        if len(saved) == 2:
            raise OSError("No space left on device")
        saved.append(save(*arguments))

    monkeypatch.setattr(stopped, "_save_checkpoint", failing)
    with pytest.raises(OSError, match="No space"):
        stopped.train()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    found = trainer_of(build("llama"), tmp_path / "run", **options).train()
    assert torch.equal(found.rows, expected.rows)
    assert without_seconds(tmp_path / "run" / "metrics.jsonl") == without_seconds(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.5}, "`learning_rate`"),
        ({"validation_fraction": 0.4}, "examples to train on"),
        ({"init": "zeros"}, "first rows"),
    ],
)
def test_checkpoint_of_another_run(build, tmp_path, change, named):
    trainer_of(build("llama"), tmp_path).train()
    with pytest.raises(ModelTokenError, match=rf"checkpoint\.safetensors is of another run: {named}.*resume: false"):
        trainer_of(build("llama"), tmp_path, **change).train()
    trainer_of(build("llama"), tmp_path, resume=False, **change).train()


def test_options_without_effect_may_change(build, tmp_path):
    expected = trainer_of(build("llama"), tmp_path).train()
    again = trainer_of(build("llama"), tmp_path, memory_mb=0, tokens_per_batch=7).train()
    assert torch.equal(again.rows, expected.rows)


def test_damaged_checkpoint(build, tmp_path):
    trainer_of(build("llama"), tmp_path).train()
    (tmp_path / "checkpoint.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelTokenError, match=r"checkpoint\.safetensors can't be used.*delete it"):
        trainer_of(build("llama"), tmp_path).train()


def test_divergence_is_an_error(build, tmp_path):
    with pytest.raises(ModelTokenError, match="not finite; lower `learning_rate`"):
        trainer_of(build("llama"), tmp_path, learning_rate=1e38).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["a", "b", "a"]}, "Models 0 and 2 have the same name, 'a'"),
        ({"names": ["a", "", "c"]}, "Model 1 must have a name"),
        ({"names": []}, "at least one model"),
        ({"names": ["a", "b"]}, "index of one of 2 models, is 2"),
        ({"name_ids": None}, "needs `name_ids`"),
        ({"name_ids": [[4], [5]]}, "token ids for each of 3 models, but got 2"),
        ({"name_ids": [[4], [], [5]]}, "text of model 'Shaper' must have tokens"),
        ({"name_ids": [[4], [96], [5]]}, "text of model 'Shaper' .*from 0 to 95"),
        ({"examples": ModelTokenExamples([[]], [0])}, "prefix is empty"),
        ({"eval_examples": ModelTokenExamples([[5]], [9])}, "`label`.*is 9"),
    ],
)
def test_what_cannot_be_trained_on(build, tmp_path, options, message):
    given = {"names": NAMES, "name_ids": NAME_IDS, "examples": examples_of(9), "eval_examples": None} | options
    with pytest.raises(ModelTokenError, match=message):
        ModelTokenTrainer(
            build("llama"),
            config_of(tmp_path),
            given["names"],
            given["examples"],
            given["eval_examples"],
            name_ids=given["name_ids"],
        ).train()


def test_several_processes_are_refused(build, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelTokenError, match="in one process, but were started in 2"):
        trainer_of(build("llama"), tmp_path)


def test_models_without_examples_are_told(build, tmp_path, caplog):
    trainer_of(build("llama"), tmp_path, ModelTokenExamples([[1, 2], [3]], [0, 2])).train()
    assert "1 of 3 models have no example to learn from ('Shaper' is one)" in caplog.text


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import rewards.files
from test_model_token_trainer import trainer_of
from transformers import AutoModelForCausalLM

left, replace = [{files}], os.replace
def dying(source, target):
    if str(target).endswith("checkpoint.safetensors") or "model_tokens" in str(target):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
rewards.files.os.replace = dying
trainer_of(AutoModelForCausalLM.from_pretrained({model!r}), {folder!r}, validation_fraction=0.2).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 3, 4, 5])
def test_killed_at_any_file(build, tmp_path, files):
    """At the first or third epoch's checkpoint, or between the two files of the result."""
    build("llama").save_pretrained(tmp_path / "model")
    code = KILLED.format(
        tests=str(Path(__file__).parent), files=files, folder=str(tmp_path / "run"), model=str(tmp_path / "model")
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    options = {"validation_fraction": 0.2}
    found = trainer_of(build("llama"), tmp_path / "run", **options).train()
    expected = trainer_of(build("llama"), tmp_path / "whole", **options).train()
    torch.testing.assert_close(found.rows, expected.rows, rtol=0, atol=0)
    assert without_seconds(tmp_path / "run" / "metrics.jsonl") == without_seconds(tmp_path / "whole" / "metrics.jsonl")
    loaded = ModelTokens.load(tmp_path / "run")
    assert torch.equal(loaded.rows, expected.rows) and loaded.backbone == expected.backbone


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer", "sgd"),
        ("init", "random"),
        ("lr_schedule", "cosine"),
        ("cache_dtype", "int8"),
        ("dtype", "bfloat16"),
        ("num_epochs", 0),
        ("batch_size", 0),
        ("block_rows", 0),
        ("weight_decay", -1.0),
        ("l2", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("validation_fraction", 1.0),
        ("patience", 0),
    ],
)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"`{option}` must be .*{value}"):
        config_of(tmp_path, **{option: value})


def test_l2_depends_on_the_optimizer(tmp_path):
    found = [config_of(tmp_path, optimizer=optimizer).l2 for optimizer in ("adamw", "lbfgs")]
    assert found == [0.0, 1e-3] and config_of(tmp_path, optimizer="lbfgs", l2=0.0).l2 == 0.0
    assert json.dumps(vars(config_of(tmp_path)))
