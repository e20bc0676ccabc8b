"""The training loop: resuming, its schedule, its moving average, its log."""

import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pocket.train.fitting import finish, finished, fit, schedule


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def regression(model):
    """Learn the sum of four random numbers."""

    def step_loss(step, generator):
        x = torch.randn(16, 4, generator=generator)
        return F.mse_loss(model(x), x.sum(1, keepdim=True))

    return step_loss


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


OPTIONS = {"steps": 60, "learning_rate": 1e-2, "warmup": 10, "save_every": 20, "seed": 3}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_as_if_never_interrupted(tmp_path, ema):
    whole = new_model()
    fit([whole], regression(whole), folder=tmp_path / "whole", ema=ema, **OPTIONS)

    class Stop(Exception):
        pass

    def stopped_at(step, loss):
        def step_loss(now, generator):
            if now == step:
                raise Stop
            return loss(now, generator)

        return step_loss

    for stop in (45, 59):
        model = new_model()
        with pytest.raises(Stop):
            fit([model], stopped_at(stop, regression(model)), folder=tmp_path / "parts", ema=ema, **OPTIONS)
    model = new_model()
    fit([model], regression(model), folder=tmp_path / "parts", ema=ema, **OPTIONS)
    assert torch.equal(weights(model), weights(whole))
    # and once more after the last step: nothing is left to do, and the weights are the same
    again = new_model()
    fit([again], regression(again), folder=tmp_path / "parts", ema=ema, **OPTIONS)
    assert torch.equal(weights(again), weights(whole))


def test_resumed_after_a_kill(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from test_fitting import OPTIONS, fit, new_model, regression

        model = new_model()
        loss = regression(model)
        def killed(step, generator):
            if step == 50:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(step, generator)
        fit([model], killed, folder=Path(sys.argv[2]) / "killed", ema=0.9, **OPTIONS)
        """
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 40
    for name in ("killed", "whole"):
        model = new_model()
        fit([model], regression(model), folder=tmp_path / name, ema=0.9, **OPTIONS)
        torch.save(weights(model), tmp_path / f"{name}.pt")
    assert torch.equal(torch.load(tmp_path / "killed.pt"), torch.load(tmp_path / "whole.pt"))


def naive(model, loss, *, steps, learning_rate, warmup, decay_share, weight_decay, ema, seed):
    """The same training, written down plainly. Returns the averaged weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = weights(model)
    for step in range(steps):
        rate = learning_rate
        if step < warmup:
            rate *= (step + 1) / warmup
        if steps - step < decay_share * steps:
            rate *= (1 - math.cos(math.pi * (steps - step) / (decay_share * steps))) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step)).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1, 1 / norm)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weights(model)
    return average


def test_average_of_the_weights_beside_a_plain_loop(tmp_path):
    options = {"steps": 80, "learning_rate": 2e-2, "warmup": 15, "decay_share": 0.4, "weight_decay": 0.1, "seed": 5}
    model, plain = new_model(), new_model()
    expected = naive(plain, regression(plain), ema=0.8, **options)
    fit([model], regression(model), folder=tmp_path, ema=0.8, **options)
    torch.testing.assert_close(weights(model), expected, atol=1e-5, rtol=1e-4)
    assert (weights(model) - weights(plain)).abs().max() > 1e-3  # it is the average, not the last weights
    last = new_model()
    fit([last], regression(last), folder=tmp_path / "last", **options)
    torch.testing.assert_close(weights(last), weights(plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),  # a tenth of ten steps of warm-up
        (4, 0.5),
        (9, 1.0),
        (30, 1.0),
        (50, 1.0),  # half of the steps are left
        (75, 0.5),
        (60, 0.5 + math.cos(math.pi / 5) / 2),
        (99, (1 - math.cos(math.pi / 50)) / 2),
    ],
)
def test_schedule(step, factor):
    assert schedule(step, 100, warmup=10, decay_share=0.5) == pytest.approx(factor)


def test_schedule_without_warmup_or_decay():
    assert [schedule(step, 10, warmup=0, decay_share=0.0) for step in range(10)] == [1.0] * 10
    assert all(0 < schedule(step, 50, warmup=100, decay_share=1.0) < 0.51 for step in range(50))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = new_model()
    good = regression(model)

    def bad(step, generator):
        return good(step, generator) * (float("nan") if step == 33 else 1)

    with pytest.raises(RuntimeError, match="stage: the loss is nan at step 33; lower the learning rate"):
        fit([model], bad, folder=tmp_path / "stage", **OPTIONS)
    state = torch.load(tmp_path / "stage" / "state.pt", weights_only=True)
    assert state["step"] == 20 and all(value.isfinite().all() for value in state["parameters"])


def test_what_is_logged(tmp_path):
    losses = []
    model = new_model()
    good = regression(model)

    def step_loss(step, generator):
        loss = good(step, generator)
        losses.append(float(loss.detach()))
        return loss

    fit([model], step_loss, folder=tmp_path, **OPTIONS | {"steps": 250})
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [100, 200, 250]
    for row, start in zip(logged, (0, 100, 200), strict=True):
        assert row["loss"] == pytest.approx(sum(losses[start : row["step"]]) / (row["step"] - start))
    assert logged[0]["seconds"] <= logged[1]["seconds"] <= logged[2]["seconds"]
    assert logged[2]["loss"] < logged[0]["loss"] / 2  # it learns


def test_probes_see_the_average_in_evaluation_mode(tmp_path):
    model = nn.Sequential(new_model(), nn.Dropout(0.5))
    seen = []

    def probe():
        seen.append((model.training, torch.is_grad_enabled()))
        return {"probe/first": float(weights(model)[0])}

    options = {"learning_rate": 1e-2, "warmup": 10, "decay_share": 0.0, "ema": 0.9, "seed": 3}
    torch.manual_seed(1)  # of the dropout
    fit([model], regression(model), folder=tmp_path, steps=40, probe=probe, probe_every=40, **options)
    assert seen == [(False, False)]
    measured = [row for row in rows(tmp_path) if "probe/first" in row]
    assert measured == [{"step": 40, "probe/first": float(weights(model)[0])}]  # what training ends with
    assert not model.training


def test_frozen_parameters_stay(tmp_path):
    model = new_model()
    frozen = model[0].requires_grad_(False)
    before, all_before = weights(frozen), weights(model)
    fit([model], regression(model), folder=tmp_path, ema=0.9, **OPTIONS)
    assert torch.equal(weights(frozen), before)
    assert not torch.equal(weights(model), all_before)


def test_another_model_cannot_be_resumed(tmp_path):
    model = new_model()
    fit([model], regression(model), folder=tmp_path, **OPTIONS)
    for other in (nn.Linear(4, 1), new_model()[:1]):
        with pytest.raises(ValueError, match="state.pt is of another model"):
            fit([other], regression(other), folder=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="with another `ema`; delete it"):
        fit([model], regression(model), folder=tmp_path, ema=0.5, **OPTIONS)


def test_a_finished_stage(tmp_path):
    model = new_model()
    fit([model], regression(model), folder=tmp_path, **OPTIONS)
    assert (tmp_path / "state.pt").is_file() and not finished(tmp_path)
    finish(tmp_path, {"held_out/accuracy": 0.5})
    assert finished(tmp_path) and not (tmp_path / "state.pt").exists()
    assert json.loads((tmp_path / "done.json").read_text()) == {"held_out/accuracy": 0.5}
