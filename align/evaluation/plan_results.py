"""What became of every plan: `per_plan.parquet`, from which ChatGen's Tables 4 to 7 are counted.

A row per chat, stage and method: `run`, `stage` (empty: everything is the method's own; else the step of Table 6 whose
ground truth is *not* given), `method`, the chat's `row_id`, `demonstration`, `setting`, `input_type` and `shots`
(demonstrations of its model in the training split), its ground truth (`prompt`, `negative_prompt`, `model`,
`arguments` as JSON, `base_model`, `image_id`), `plan` (JSON; just {"model": ...} of methods that only choose one),
`steps` ({metric: value}), `seconds`, `regret` and `equal_call` (see `align.evaluation.plan_regret`).

Once pictures are there: `drawn_from` (`own`; `baseline`: the default call's stand in; `nobody`: not asked for),
`not_drawn` (why a plan has no pictures of its own), `drawn_call`, `pictures` (keys of the store), `images` (where they
lie), `references` (keys of the features of the row's reference pictures) and `scores` ({scorer: [one per picture]}).
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rewards.files import write_atomically

RESULTS_FILE = "per_plan.parquet"
GROUND_TRUTH = "ground truth"
OWN, BASELINE, NOBODY = "own", "baseline", "nobody"
_KEY, _FORMAT, _VERSION = b"t2i-align", "t2i-align plans", 1


class PlanResultsError(ValueError):
    """A file of plans that can't be used; the message names the file and the field."""


@dataclass(frozen=True)
class About:
    """What holds for all rows.

    Attributes:
        runs: Names of the runs; more than one if they were pooled.
        agents: Name -> what is known of it: `policy`, `tokens`, `parameters`, `training_seconds`, `devices`,
            `batch_size`; of pooled runs a list of these.
        choosers: Methods that choose a model without a language model.
        stages: The first one is empty; others are those of Table 6.
        steps: Metrics of steps.
        scorers: Columns of scores; empty: nothing was drawn.
        num_images: Pictures per plan.
        references: Where FID's reference comes from: `render`, `folder`, or empty: there is no FID.
        features: What FID compares: name and digest of the network, and the folder of the features.
        default_call: Whose pictures stand in where a plan's can't be drawn.
    """

    runs: list[str]
    agents: dict[str, Any]
    choosers: list[str]
    stages: list[str]
    steps: list[str]
    scorers: list[str] = field(default_factory=list)
    num_images: int = 0
    references: str = ""
    features: dict[str, str] = field(default_factory=dict)
    default_call: dict[str, Any] | None = None

    @property
    def drawn(self) -> list[str]:
        """Methods that have pictures, in the order of the tables."""
        return [*self.agents, GROUND_TRUTH] if self.scorers else []


@dataclass(frozen=True)
class PlanResults:
    """Rows, and what they are of."""

    about: About
    rows: list[dict[str, Any]]

    def of(self, stage: str, method: str) -> list[dict[str, Any]]:
        """The rows of a method at a stage, in the order of runs and chats."""
        return self._by_method.get((stage, method), [])

    @cached_property
    def _by_method(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["stage"], row["method"]), []).append(row)
        return found


def result_row(
    row: Mapping[str, Any],
    shots: int,
    *,
    stage: str,
    method: str,
    plan: Mapping[str, Any] | None,
    steps: Mapping[str, float] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """A row of the file that has no pictures yet.

    Args:
        row: Of ChatGenBench.
        shots: Demonstrations of its model.
        stage, method: Whose plan this is.
        plan: `Plan.to_dict`.
        steps: Values of the step-wise metrics; NaN: not known of this row.
        seconds: It took to plan.
    """
    source = row["source"]
    return {
        "run": "", "stage": stage, "method": method, "row_id": row["id"], "demonstration": source["demonstration"],
        "setting": row["setting"], "input_type": row["input_type"], "shots": shots, "prompt": row["prompt"],
        "negative_prompt": row["negative_prompt"], "model": row["model"], "arguments": _json(row["arguments"]),
        "base_model": row["base_model"], "image_id": str(source["image_id"] or ""),
        "plan": None if plan is None else _json(plan),
        "steps": {name: value for name, value in (steps or {}).items() if value == value}, "seconds": seconds,
        "regret": None, "equal_call": None, **NOT_DRAWN,
    }  # fmt: skip


NOT_DRAWN: dict[str, Any] = {
    "drawn_from": NOBODY, "not_drawn": None, "drawn_call": None, "pictures": [], "images": [], "references": [],
    "scores": None,
}  # fmt: skip
"""Of a plan whose pictures nobody has asked for."""


def save_results(folder: str | Path, results: PlanResults) -> None:
    """Write `per_plan.parquet`, atomically; `About` is in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"format": _FORMAT, "version": _VERSION, **asdict(results.about)}
    schema = _schema(results.about).with_metadata({_KEY: _json(about).encode()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(results.rows, schema=schema), buffer)
    write_atomically(Path(folder) / RESULTS_FILE, buffer.getvalue())


def load_results(folder: str | Path) -> PlanResults:
    """Read what `save_results` wrote into a folder.

    Raises:
        PlanResultsError: No such file, another format or version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise PlanResultsError(f"There is no {path}; write it with python -m align.evaluation.chatgen.")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_KEY])
        if about.pop("format") != _FORMAT or (version := about.pop("version")) != _VERSION:
            raise PlanResultsError(f"{path} has version {version}, but this program reads {_VERSION}; write it again.")
        found = About(**about)
    except (pa.ArrowException, OSError) as error:
        raise PlanResultsError(f"{path} is not a Parquet file: {error}.") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise PlanResultsError(f"{path} was not written by align.evaluation.chatgen or .chatgen_pool.") from error
    rows = table.to_pylist()
    for row in rows:
        row["steps"] = {name: value for name, value in (row["steps"] or {}).items() if value is not None}
        row["scores"] = row.get("scores")
    return PlanResults(found, rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _schema(about: About) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    texts: Sequence[str] = (
        "run", "stage", "method", "row_id", "demonstration", "setting", "input_type", "prompt", "negative_prompt",
        "model", "arguments", "base_model", "image_id", "plan", "drawn_from", "not_drawn", "drawn_call",
    )  # fmt: skip
    # Parquet has no objects without fields.
    scores = [("scores", pa.struct([(name, pa.list_(number)) for name in about.scorers]))] if about.scorers else []
    return pa.schema(
        [(name, text) for name in texts]
        + [(name, pa.list_(text)) for name in ("pictures", "images", "references")]
        + [("shots", pa.int64()), ("seconds", number), ("regret", number), ("equal_call", pa.bool_())]
        + [("steps", pa.struct([(name, number) for name in about.steps])), *scores]
    )
