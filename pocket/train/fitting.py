"""One training loop for all weights of the pocket world: seeded by step, logged, resumable after a kill."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rewards.files import write_atomically

logger = logging.getLogger(__name__)

StepLoss = Callable[[int, torch.Generator], Tensor]
"""Step number and that step's own random numbers -> scalar loss. If anything else is random, a resumed run differs."""


def fit(
    modules: Sequence[nn.Module], step_loss: StepLoss, *, steps: int, folder: Path, learning_rate: float,
    warmup: int = 100, decay_share: float = 0.5, weight_decay: float = 0.01, ema: float = 0.0, seed: int = 0,
    save_every: int = 500, probe: Callable[[], dict[str, float]] | None = None, probe_every: int = 0,
) -> None:  # fmt: skip
    """Train the parameters that require gradients with AdamW, from the last saved step on.

    The learning rate rises linearly over `warmup` steps, is constant, and falls to nothing on a cosine over the last
    `decay_share` of the steps. At the end the modules hold the averaged weights if `ema` is given.

    Args:
        modules: Left in evaluation mode.
        step_loss: See `StepLoss`.
        steps: In all.
        folder: `state.pt` (for resuming) and `metrics.jsonl` go here.
        learning_rate: Peak.
        warmup, decay_share, weight_decay: See above.
        ema: Decay of the moving average of the weights; 0 for none.
        seed: Of the random numbers of all steps.
        save_every: Steps between states.
        probe: Measured on the averaged weights every `probe_every` steps and logged.
        probe_every: 0 for never.

    Raises:
        RuntimeError: A loss that is not finite.
        ValueError: The folder holds the state of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    average = [p.detach().clone() for p in parameters] if ema else []
    done, seconds = _resume(folder / "state.pt", parameters, average, optimizer)
    for module in modules:
        module.train()
    recent: list[float] = []
    since = time.monotonic()
    for step in tqdm(range(done, steps), initial=done, total=steps, desc=folder.name, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps, warmup, decay_share)
        loss = step_loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            # the average of few steps would mostly be the random start
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(ema, (1 + step) / (10 + step)))
        recent.append(float(loss.detach()))
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"{folder.name}: the loss is {recent[-1]} at step {step}; lower the learning rate.")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = seconds + time.monotonic() - since
            _log(folder, {"step": step + 1, "seconds": round(spent, 1), "loss": sum(recent) / len(recent)})
            recent = []
        if probe and probe_every and (step + 1) % probe_every == 0:
            _swap(parameters, average)
            _log(folder, {"step": step + 1, **_in_evaluation_mode(modules, probe)})
            _swap(parameters, average)
        if (step + 1) % save_every == 0:
            state = {"step": step + 1, "seconds": seconds + time.monotonic() - since, "average": average}
            state |= {"parameters": [p.data for p in parameters], "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "state.part")
            (folder / "state.part").replace(folder / "state.pt")
    _swap(parameters, average)
    for module in modules:
        module.eval()


def schedule(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Factor of the learning rate at a step, in (0, 1]."""
    left = (steps - step) / steps
    falling = 0.5 - 0.5 * math.cos(math.pi * left / decay_share) if left < decay_share else 1.0
    return min(1.0, (step + 1) / max(1, warmup)) * falling


def finished(folder: Path) -> bool:
    """Whether `finish` was called for a stage."""
    return (folder / "done.json").is_file()


def finish(folder: Path, measured: dict[str, float]) -> None:
    """Write what a stage reached and drop its state: it is done."""
    write_atomically(folder / "done.json", json.dumps(measured, indent=1).encode())
    (folder / "state.pt").unlink(missing_ok=True)
    logger.info("%s: %s", folder.name, measured)


def _resume(path: Path, parameters: list, average: list, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    mine, saved = [*parameters, *average], [*state["parameters"], *state["average"]]
    if [value.shape for value in mine] != [value.shape for value in saved]:
        raise ValueError(f"{path} is of another model, or of training with another `ema`; delete it to start again.")
    with torch.no_grad():
        for value, loaded in zip(mine, saved, strict=True):
            value.copy_(loaded)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _in_evaluation_mode(modules: Sequence[nn.Module], probe: Callable[[], dict[str, float]]) -> dict[str, float]:
    for module in modules:
        module.eval()
    with torch.no_grad():
        measured = probe()
    for module in modules:
        module.train()
    return measured


def _swap(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    """Exchange the weights with their average, if there is one."""
    for parameter, mean in zip(parameters, average, strict=False):
        parameter.data, mean.data = mean.data, parameter.data


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
