"""What RRHF learns from, made on the way: candidates of a policy, drawn and scored (DiffAgent Sec. 3.2.2).

Every step leaves its result in a folder, and a file that says from what it was made; a killed run goes on, and a
finished step is not done again.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.distributed import on_first_process, without_deepspeed
from rewards.commandline import ConfigError, check_nested
from rewards.files import write_atomically
from rollouts.candidates import CandidatesConfig
from rollouts.candidates import main as propose
from rollouts.run import RunConfig
from rollouts.run import main as roll_out

logger = logging.getLogger(__name__)

_OWN_CANDIDATE_OPTIONS = {"model_name_or_path", "catalog", "output", "dataset", "architecture"}
_OWN_RENDER_OPTIONS = {"calls", "catalog", "weights", "output"}
CANDIDATES_FILE = "candidates.jsonl"
SCORED_FILE = "scored.parquet"

# Sec. 3.2.2: one response by multinomial sampling, m by diverse beams, model information only, the default call added.
PAPER_CANDIDATES: dict[str, Any] = {
    "greedy": False, "num_samples": 1, "num_beams": 6, "reconstruct": True, "default_call": True,
}  # fmt: skip


@dataclass(frozen=True)
class RolloutStage:
    """How candidates are made and scored; checked before anything is done.

    Attributes:
        dataset: DatasetDict of the prompts, or the folder of DABench.
        architecture: Base model architecture.
        catalog: Catalogue file.
        weights: Folder of the models.
        candidates: Options of `rollouts.candidates`, over `PAPER_CANDIDATES`.
        render: Options of `rollouts.run`.

    Raises:
        ConfigError: An unknown option, one that is set by the command itself, or a bad value.
    """

    dataset: str
    architecture: str
    catalog: str
    weights: str
    candidates: Mapping[str, Any]
    render: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            check_nested("rollout.candidates", self.candidates, CandidatesConfig, _OWN_CANDIDATE_OPTIONS)
            check_nested("rollout.render", self.render, RunConfig, _OWN_RENDER_OPTIONS)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._candidates("policy", Path("folder"))
        self._render(Path("folder"))

    def run(self, policy: str, folder: Path) -> Path:
        """Propose, draw and score; every process must call this.

        Args:
            policy: Folder or Hub id of the policy.
            folder: For everything that is made.

        Returns:
            The scored table.
        """
        with without_deepspeed():
            propose(self._candidates(policy, folder))
        table = folder / "rollout" / SCORED_FILE
        source = json.dumps({"candidates": _digest(folder / CANDIDATES_FILE), "render": dict(self.render)}, indent=1)
        # Its name says from what: a table of other candidates, or drawn in another way, is not taken for this one.
        done = table.with_name(f"done-{hashlib.sha256(source.encode()).hexdigest()[:16]}.json")

        def draw() -> None:
            if done.is_file():
                return
            for other in done.parent.glob("done-*.json"):
                other.unlink()
            roll_out(self._render(folder))
            write_atomically(done, source.encode())

        on_first_process(draw)
        return table

    def _candidates(self, policy: str, folder: Path) -> CandidatesConfig:
        own = {
            "model_name_or_path": policy,
            "catalog": self.catalog,
            "output": str(folder / CANDIDATES_FILE),
            "dataset": self.dataset,
            "architecture": self.architecture,
        }
        return _build("rollout.candidates", CandidatesConfig, PAPER_CANDIDATES | dict(self.candidates) | own)

    def _render(self, folder: Path) -> RunConfig:
        own = {
            "calls": str(folder / CANDIDATES_FILE),
            "catalog": self.catalog,
            "weights": self.weights,
            "output": str(folder / "rollout"),
        }
        return _build("rollout.render", RunConfig, dict(self.render) | own)


def _build(where: str, config: type[Any], options: dict[str, Any]) -> Any:
    try:
        return config(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{where}`: {error}") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
