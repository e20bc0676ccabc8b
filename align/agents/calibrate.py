"""Find out how much retrieval should count beside a policy, and below which confidence the agent should not choose.

    python -m align.agents.calibrate --model_name_or_path runs/sft --dataset data/dabench --target 0.5

Asks the policy for prompts of DABench's `rrhf` split, which SFT has not seen and retrieval does not know, and compares
its choice with the model that made the picture. The weight is the one with which most models are right; the temperature
the one under which the right ones are likeliest; the threshold the lowest confidence from which on `target` of them are
right. All are written to `calibration.json` in the policy's folder, where `DiffAgent.from_pretrained` finds them, with
the curve of accuracy over coverage.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from align.agents.calibration import Calibration, threshold_for
from align.agents.config import AGENT_ERRORS, AgentConfig
from align.agents.diffagent import Alternative, Answer, confidence
from align.pairs import DataError, load_pairs
from rewards.commandline import ConfigError, run_command

logger = logging.getLogger(__name__)

WEIGHTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Nats that a similarity of 1 can be worth; the last ones leave the choice to retrieval."""
TEMPERATURES = tuple(float(value) for value in np.geomspace(0.1, 1000, 81))
_COVERAGES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass
class CalibrateConfig(AgentConfig):
    """Options of `python -m align.agents.calibrate`."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for calibration.json; none: the policy's, which must be one."}
    )
    split: str = field(default="rrhf", metadata={"help": "Split of the prompts; not the one that was trained on."})
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many; none: all."})
    target: float | None = field(
        default=None, metadata={"help": "Share of right models among the calls that are made; none: never abstain."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None:
            raise ValueError("`dataset` is needed: prompts whose model is known.")
        if self.split not in ("rrhf", "eval"):
            raise ValueError(f"`split` must be rrhf or eval, but is {self.split!r}.")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"`target` must be above 0 and at most 1, but is {self.target}.")
        for name in ("num_prompts", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")


def main(config: CalibrateConfig) -> Calibration:
    """Calibrate, and write the file."""
    agent = config.load_agent(calibration=Calibration())
    rows = load_pairs(str(config.dataset), config.architecture)[config.split]
    rows = rows.select(range(min(len(rows), config.num_prompts or len(rows))))
    if not len(rows):
        raise DataError(f"`dataset` {config.dataset}: the split {config.split} has no rows.")
    asked: list[tuple[Answer, list[Alternative]]] = []
    for start in tqdm(range(0, len(rows), config.batch_size), desc="asking", unit="batch"):
        batch = rows[start : start + config.batch_size]["instruction"]
        asked += agent.candidates(batch, retrieval_weight=1.0)
    own = [(answer.call.model, answer.confidence) for answer, _ in asked]
    right = [row["api"]["model"] for row in rows]
    found = calibrate(own, [alternatives for _, alternatives in asked], right, config.target)
    folder = config.output_dir or config.model_name_or_path
    try:
        found.save(folder)
    except OSError as error:
        raise ConfigError(f"`output_dir`: can't write to {folder}: {error.strerror}.") from error
    logger.info("%s/calibration.json: %s", folder, found)
    return found


def calibrate(
    own: Sequence[tuple[str, float]],
    ranked: Sequence[Sequence[Alternative]],
    right: Sequence[str],
    target: float | None,
) -> Calibration:
    """The calibration for which most models are right.

    Args:
        own: For each prompt, the model that the policy chooses by itself, and its confidence.
        ranked: Models that come into question, with log-probability and similarity.
        right: The model that is right.
        target: Share of right models among the calls that are made; None: make all.
    """
    weighted = {weight: [_weighted(alternatives, weight) for alternatives in ranked] for weight in WEIGHTS}
    hits = {weight: [a[0].model == name for a, name in zip(weighted[weight], right, strict=True)] for weight in WEIGHTS}
    hits[0.0] = [model == name for (model, _), name in zip(own, right, strict=True)]
    accuracy = {weight: sum(of_weight) / len(right) for weight, of_weight in hits.items()}
    best = max(accuracy, key=lambda weight: (accuracy[weight], -weight))
    temperature, confidences = 1.0, [value for _, value in own]
    if best:
        temperature = min(TEMPERATURES, key=lambda value: _surprise(weighted[best], right, value))
        confidences = [confidence(alternatives, temperature) for alternatives in weighted[best]]
    threshold = 0.0 if target is None else threshold_for(confidences, hits[best], target)
    ordered = [hit for _, hit in sorted(zip(confidences, hits[best], strict=True), key=lambda pair: -pair[0])]
    counts = [max(1, round(coverage * len(right))) for coverage in _COVERAGES]
    measured = {
        "prompts": len(right),
        "accuracy_by_weight": {f"{weight:g}": accuracy[weight] for weight in sorted(accuracy)},
        "accuracy_by_coverage": {f"{n / len(right):.2f}": sum(ordered[:n]) / n for n in counts},
        "target": target,
        "coverage": sum(value >= threshold for value in confidences) / len(right),
    }
    return Calibration(threshold, best, temperature, measured)


def _surprise(ranked: Sequence[Sequence[Alternative]], right: Sequence[str], temperature: float) -> float:
    """Mean negative log-probability of the right model, where it is among the candidates."""
    found = []
    for alternatives, name in zip(ranked, right, strict=True):
        scores = np.array([item.score for item in alternatives]) / temperature
        index = next((i for i, item in enumerate(alternatives) if item.model == name), None)
        if index is not None:
            found.append(np.logaddexp.reduce(scores) - scores[index])
    return float(np.mean(found)) if found else 0.0


def _weighted(alternatives: Sequence[Alternative], weight: float) -> list[Alternative]:
    scored = [replace(item, score=item.logp + weight * (item.similarity or 0.0)) for item in alternatives]
    return sorted(scored, key=lambda item: -item.score)


if __name__ == "__main__":
    run_command(main, CalibrateConfig, errors=AGENT_ERRORS)
