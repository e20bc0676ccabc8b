"""The image half of ChatGen's tables, for plans that were made before, on this machine or another.

    python -m align.evaluation.chatgen_draw --config configs/chatgen/drawing.yaml --output_dir runs/chatgen-tables \\
        --catalog data/chatgenbench/catalog.jsonl --weights models/

`output_dir` is what `python -m align.evaluation.chatgen` left, with per_plan.parquet in it. Neither policies nor chats
are needed. Every plan is drawn with its own prompt, negative prompt, model and arguments; all plans of a chat have the
same seeds, whatever the method, and equal requests are drawn once. Where a plan can't be drawn, the default call draws
its prompt instead, which is counted by reason. Pictures are scored for the human-validated prompt (ChatGen Sec. 4.1). A
run that was killed goes on where it was. That command does the same by itself if it is given `weights`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.agents.plans import call_arguments, plan_call
from align.evaluation.picture_features import FeatureOptions, load_features
from align.evaluation.picture_scores import score_pairs
from align.evaluation.plan_pictures import Asked, Drawn, ask_plan, can_not_be_asked, draw
from align.evaluation.plan_references import folder_references, with_references
from align.evaluation.plan_regret import ScoredPrompts, with_regrets
from align.evaluation.plan_results import (
    BASELINE,
    GROUND_TRUTH,
    NOT_DRAWN,
    OWN,
    About,
    PlanResults,
    PlanResultsError,
    load_results,
    save_results,
)
from align.evaluation.plan_tables import write_tables
from rewards.checkpoints import CheckpointError
from rewards.commandline import ConfigError, check_nested, from_json, run_command, save_config
from rewards.feature_statistics import FIDError
from rewards.unified import UnifiedMetricError
from rollouts.api import APICall
from rollouts.calls_table import seeds_of
from rollouts.catalog import Catalog, CatalogError
from rollouts.run import RunConfig
from rollouts.store_errors import StoreError
from rollouts.workers import PoolError

ERRORS = (PlanResultsError, CatalogError, PoolError, StoreError, UnifiedMetricError, FIDError, CheckpointError)
_SET_HERE = (
    "calls", "catalog", "weights", "output", "num_images", "seed", "unified", "keep_images", "max_failed_share",
    "report_to", "run_name",
)  # fmt: skip


@dataclass
class DrawingConfig:
    """Options of everything that has to do with pictures."""

    weights: str | None = field(
        default=None, metadata={"help": "Folder of the text-to-image models' weights; none: no pictures."}
    )
    rollout: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of rollouts.run (scorers, pool, native_side, batch_size, store, ...) as a mapping; those "
            f"that are set here or mean nothing here are refused: {', '.join(_SET_HERE)}."
        },
    )
    num_images: int = field(default=1, metadata={"help": "Pictures per plan; the paper does not say how many."})
    seed: int = field(default=0, metadata={"help": "Of the pictures and of the choice of rows."})
    max_drawn: int | None = field(default=None, metadata={"help": "Draw so many rows only, a fixed choice; none: all."})
    fid: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Whose features FID compares: {checkpoint: file of Inception}, or {kind: transformers, checkpoint: "
            "folder of a vision model, side, mean, std}; none: no FID."
        },
    )
    references: str | None = field(
        default=None,
        metadata={
            "help": "Folder with the demonstrations' pictures, `<image id>.png` and so on, for FID; none: the ground "
            "truth is drawn, with other seeds."
        },
    )
    unified: str = field(
        default="fitted",
        metadata={"help": "Norms of Eq. 6: fitted (on all that is compared), paper (its ranges), or a saved metric."},
    )
    fid_resamples: int = field(default=200, metadata={"help": "Bootstrap resamples for FID and the unified metric."})
    candidates: str | None = field(
        default=None, metadata={"help": "Scored candidates of the rows' prompts (rollouts.run), for regret; or none."}
    )

    def __post_init__(self) -> None:
        for name in ("num_images", "max_drawn", "fid_resamples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        self.rollout, self.fid = from_json("rollout", self.rollout or {}, dict), from_json("fid", self.fid or {}, dict)
        check_nested("rollout", self.rollout, RunConfig, _SET_HERE)
        check_nested("fid", self.fid, FeatureOptions)
        if self.fid and "checkpoint" not in self.fid:
            raise ValueError("`fid` needs `checkpoint`: a file of Inception, or a folder of a vision model.")
        if self.references is not None and not self.fid:
            raise ValueError("`references` are for FID, which needs `fid`.")
        if self.weights is not None and not self.rollout.get("scorers"):
            raise ValueError("`rollout.scorers` must name at least one scorer; see configs/pocket/chatgen_tables.yaml.")
        if self.fid:
            FeatureOptions(**self.fid)  # checks itself

    def run_config(self, output: Path, catalog: str, device: str | None = None) -> RunConfig:
        """How pictures are drawn and scored, and where they go.

        Raises:
            ValueError: An option in `rollout` that is wrong.
        """
        everything: dict[str, Any] = {"device": device} | from_json("rollout", self.rollout, dict)
        rollout = output / "rollout"
        return RunConfig(
            **everything,
            calls=str(rollout / "calls.jsonl"), catalog=catalog, weights=str(self.weights), output=str(rollout),
            num_images=self.num_images, seed=self.seed,
        )  # fmt: skip


@dataclass
class ChatGenDrawConfig:
    """Options of `python -m align.evaluation.chatgen_draw` beside those of the pictures."""

    output_dir: str = field(metadata={"help": "Folder of the plans (per_plan.parquet); pictures and tables go there."})
    catalog: str = field(metadata={"help": "Catalogue that the plans were made with."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; none: a GPU if there is one."})


def main(config: ChatGenDrawConfig, drawing: DrawingConfig) -> dict[str, Any]:
    """Draw, score and write the tables; returns what their JSON files hold."""
    if drawing.weights is None and drawing.candidates is None:
        raise ConfigError("Give `weights` to draw pictures, or `candidates` for regret; there is nothing else to do.")
    output = Path(config.output_dir)
    results = load_results(output)
    if len(results.about.runs) > 1:
        raise PlanResultsError(f"{output} is pooled already; draw the plans of its runs.")
    save_config(output / "config_draw.yaml", config, drawing)
    return finish(results, drawing, output, config.catalog, config.device)


def finish(
    results: PlanResults, drawing: DrawingConfig, output: Path, catalog: str, device: str | None = None
) -> dict[str, Any]:
    """Pictures and regrets as far as they are asked for, then the tables of `output`.

    Args:
        results: Of one run.
        drawing: What to do.
        output: Folder of the run.
        catalog: File of the catalogue.
        device: None: a GPU if there is one.
    """
    if drawing.weights is not None:
        results = draw_and_score(results, drawing, output, catalog, device)
    if drawing.candidates is not None:
        results = with_regrets(results, ScoredPrompts(drawing.candidates), Catalog.load(catalog))
    save_results(output, results)
    return write_tables(output, results, [output], unified=drawing.unified, resamples=drawing.fid_resamples)


def draw_and_score(
    results: PlanResults, drawing: DrawingConfig, output: Path, catalog: str, device: str | None = None
) -> PlanResults:
    """The same rows with pictures, scores and references of FID.

    Raises:
        PoolError, StoreError, ConfigError, FIDError: The work can't go on; what was done is kept.
    """
    config, models = drawing.run_config(output, catalog, device), Catalog.load(catalog)
    chats = chosen_chats([row["row_id"] for row in results.rows], drawing.max_drawn, drawing.seed)
    methods = {*results.about.agents, GROUND_TRUTH}
    numbers = [i for i, row in enumerate(results.rows) if row["row_id"] in chats and row["method"] in methods]
    rows = [results.rows[i] for i in numbers]
    truths = {row["row_id"]: row for row in rows if row["method"] == GROUND_TRUTH}
    to_draw = truths if drawing.fid and drawing.references is None else {}
    own, used, rendered = _draw_plans(rows, to_draw, results.about, config, models)

    pairs = [(key, row["prompt"]) for row, drawn in zip(rows, used, strict=True) for key in drawn.keys]
    scores = score_pairs(pairs, config, output / "scores.jsonl")
    changed = {}
    for number, row, mine, drawn in zip(numbers, rows, own, used, strict=True):
        found = [scores[key, row["prompt"]] for key in drawn.keys]
        complete = bool(found) and all(value is not None for of in found for value in of.values())
        call = _plan_call(json.loads(row["plan"]), models) if mine.failure is None else results.about.default_call
        changed[number] = {
            "drawn_from": OWN if mine.failure is None else BASELINE,
            "not_drawn": mine.failure.reason if mine.failure else None,
            "drawn_call": json.dumps(call, ensure_ascii=False), "pictures": drawn.keys, "images": drawn.images,
            "scores": {name: [of[name] for of in found] for name in config.scorers} if complete else None,
        }  # fmt: skip
    about = replace(results.about, scorers=list(config.scorers), num_images=config.num_images)
    new = [{**row, **NOT_DRAWN, **changed.get(i, {})} for i, row in enumerate(results.rows)]
    drawn_results = PlanResults(replace(about, references="", features={}), new)
    if not drawing.fid:
        return drawn_results
    references = rendered if drawing.references is None else folder_references(Path(drawing.references), truths)
    extractor = load_features(FeatureOptions(**from_json("fid", drawing.fid, dict)), device)
    kind = "render" if drawing.references is None else "folder"
    return with_references(drawn_results, references, kind, extractor, output, config)


def chosen_chats(row_ids: Sequence[str], count: int | None, seed: int = 0) -> set[str]:
    """`count` of the chats (None: all): those whose hashes come first, so that the choice depends on nothing else."""

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    return set(sorted(set(row_ids), key=rank)[:count])


def _draw_plans(
    rows: Sequence[Mapping[str, Any]], truths: Mapping[str, Mapping[str, Any]], about: About, config: RunConfig,
    catalog: Catalog,
) -> tuple[list[Drawn], list[Drawn], dict[str, list[str]]]:  # fmt: skip
    """Own pictures of every plan; the same with the default call's where these could not be drawn; and, by chat, keys
    of the pictures that `truths` draw with other seeds."""

    def seeds(name: str) -> list[int]:
        return seeds_of(name, config.num_images, config.seed)

    plans = [json.loads(row["plan"]) for row in rows]
    asked = [ask_plan(plan, catalog, seeds(row["row_id"])) for row, plan in zip(rows, plans, strict=True)]
    again = [ask_plan(json.loads(row["plan"]), catalog, seeds(f"{name}/reference")) for name, row in truths.items()]
    assert about.default_call is not None  # the command that makes plans sets it
    call = APICall.from_dict(about.default_call)
    default = {"model": call.model, "arguments": call_arguments(call)}

    def stand_ins(numbers: Sequence[int]) -> list[Asked]:
        return [ask_plan(plans[i] | default, catalog, seeds(rows[i]["row_id"])) for i in numbers]

    # As much as possible at once, so that each checkpoint is loaded once; some plans fail only when they are drawn.
    foreseen = can_not_be_asked(asked, config)
    drawn = draw([*asked, *again, *stand_ins(foreseen)], config)
    own, references = drawn[: len(rows)], drawn[len(rows) : len(rows) + len(again)]
    failed = sorted({i for i, found in enumerate(own) if found.failure is not None} - set(foreseen))
    instead = [*drawn[len(rows) + len(again) :], *(draw(stand_ins(failed), config) if failed else [])]
    used = list(own)
    for i, found in zip([*foreseen, *failed], instead, strict=True):
        used[i] = found
    if all(found.failure is not None for found in used):
        reason = ": ".join(used[0].failure or ())
        raise PlanResultsError(
            f"No plan can be drawn, and the default call of {call.model!r} neither ({reason}). Mend `weights` "
            f"{config.weights} and run the command again, or plan with another `baseline_model`."
        )
    return own, used, {name: found.keys for name, found in zip(truths, references, strict=True) if found.keys}


def _plan_call(plan: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    return plan_call(plan["model"], plan["arguments"], catalog).to_dict()


if __name__ == "__main__":
    run_command(main, ChatGenDrawConfig, DrawingConfig, errors=ERRORS)
