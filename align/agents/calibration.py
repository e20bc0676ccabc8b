"""When an agent should rather not choose, and how much retrieval counts beside the policy."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rewards.files import write_atomically

FILE_NAME = "calibration.json"


class CalibrationError(ValueError):
    """A calibration that can't be used; the message names the file and the field."""


@dataclass(frozen=True)
class Calibration:
    """What `python -m align.agents.calibrate` finds out about a policy.

    Attributes:
        threshold: Confidence below which an agent abstains; 0: it never does.
        retrieval_weight: Nats that a similarity of 1 is worth beside the policy's log-probability; 0: no retrieval.
        temperature: With retrieval, what scores are divided by before they are taken as log-probabilities (temperature
            scaling, https://arxiv.org/abs/1706.04599).
        measured: How it was found: numbers, for people.
    """

    threshold: float = 0.0
    retrieval_weight: float = 0.0
    temperature: float = 1.0
    measured: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("threshold", "retrieval_weight", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise CalibrationError(f"`{name}` must be a number of at least 0, but is {value!r}.")
        if self.threshold > 1:
            raise CalibrationError(f"`threshold` must be 0 to 1, but is {self.threshold!r}.")
        if not self.temperature:
            raise CalibrationError("`temperature` must be above 0.")

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json` into a policy's folder."""
        write_atomically(Path(folder) / FILE_NAME, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """That of a policy's folder; the default, which never abstains, if there is none.

        Raises:
            CalibrationError: The file is there and can't be used.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error
        except (ValueError, TypeError) as error:
            raise CalibrationError(f"{path} is no calibration: {error}") from error


def threshold_for(confidences: Sequence[float], right: Sequence[bool], target: float) -> float:
    """The lowest confidence from which on answers are right often enough.

    Args:
        confidences: Of answers.
        right: Whether each was.
        target: Share of right ones, at least, among the answers that are given.

    Returns:
        The threshold under which most answers are given; more than 1 would be needed if the target is never reached,
        which is returned as 1.
    """
    order = sorted(range(len(confidences)), key=lambda i: -confidences[i])
    best, count = 1.0, 0
    for rank, index in enumerate(order, start=1):
        count += right[index]
        is_last_of_equals = rank == len(order) or confidences[order[rank]] < confidences[index]
        if is_last_of_equals and count / rank >= target:
            best = confidences[index]
    return best
