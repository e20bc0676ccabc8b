"""What every command with an agent needs to know to load one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.agents.calibration import CalibrationError
from align.agents.diffagent import DiffAgent
from align.pairs import DataError, load_pairs
from rewards.commandline import ConfigError
from rollouts.catalog import CatalogError
from rollouts.costs import PRIORS, CostError, CostModel
from rollouts.dialogue import DialogueError
from rollouts.token_bytes import TokenizerError

AGENT_ERRORS = (CatalogError, CalibrationError, CostError, DataError, DialogueError, TokenizerError)
"""What loading an agent raises that is the user's to mend."""


@dataclass
class AgentConfig:
    """Options of a command that loads an agent."""

    model_name_or_path: str = field(metadata={"help": "Policy: a folder of align/sft.py or align/rrhf.py."})
    catalog: str | None = field(default=None, metadata={"help": "Catalogue file; none: that of `dataset`."})
    dataset: str | None = field(
        default=None, metadata={"help": "DABench folder: its training prompts are what retrieval knows models by."}
    )
    architecture: str = field(default="SD 1.5", metadata={"help": "Base model architecture."})
    default_model: str | None = field(
        default=None, metadata={"help": "Model of the default call; none: the most downloaded checkpoint."}
    )
    costs: str = field(
        default="a100", metadata={"help": f"For `max_seconds`: {', '.join(PRIORS)}, or a costs.json of a rollout."}
    )
    max_prompt_tokens: int | None = field(default=512, metadata={"help": "Longer prompts are cut."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; none: cuda if there is one."})

    def __post_init__(self) -> None:
        if self.catalog is None and self.dataset is None:
            raise ValueError("`catalog` or `dataset` is needed: what can be called?")

    @property
    def catalog_path(self) -> Path:
        """The catalogue's file."""
        return Path(self.catalog) if self.catalog else Path(str(self.dataset)) / "catalog.jsonl"

    def load_agent(self, **options: Any) -> DiffAgent:
        """The agent.

        Args:
            options: Of the constructor, e.g. `calibration`.

        Raises:
            ConfigError: The policy can't be loaded; and the errors of AGENT_ERRORS.
        """
        costs = CostModel(PRIORS[self.costs]) if self.costs in PRIORS else CostModel.load(self.costs)
        try:
            return DiffAgent.from_pretrained(
                self.model_name_or_path, self.catalog_path, device=self.device, dtype=self.dtype,
                architecture=self.architecture, examples=self.load_examples(), costs=costs,
                default_model=self.default_model, max_prompt_tokens=self.max_prompt_tokens, **options,
            )  # fmt: skip
        except AGENT_ERRORS:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"`model_name_or_path`: {error}") from error

    def load_examples(self) -> list[tuple[str, str]]:
        """Training prompts with the names of their models."""
        if self.dataset is None:
            return []
        rows = load_pairs(self.dataset, self.architecture)["sft"]
        return [(row["instruction"]["prompt"], row["api"]["model"]) for row in rows]
