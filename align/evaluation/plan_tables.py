"""ChatGen's Tables 4 to 7, how models were chosen, and regret, counted from rows of `plan_results`.

Table 4: step-wise and final evaluation by setting. Table 5: what agents cost. Table 6: what each step is worth, the
ground truth of the others being given. Table 7: by input type. Final scores are of the chats on which every method of
the stage has pictures with all scores (its own, or the default call's that stand in). See `picture_sets` for FID and
the unified metric. Values of several runs are means of the runs; n counts the rows of all of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from align.chats import SHOT_GROUPS, shot_group
from align.evaluation.metrics import bootstrap_runs
from align.evaluation.picture_features import read_features
from align.evaluation.picture_sets import FID, PAPER, UNIFIED, PictureSet, run_values, set_estimates
from align.evaluation.plan_metrics import METRICS
from align.evaluation.plan_regret import ANY_MODEL, DEFAULT
from align.evaluation.plan_results import BASELINE, GROUND_TRUTH, NOBODY, PlanResults
from align.evaluation.plan_table_files import write_table
from rewards.commandline import ConfigError
from rewards.unified import UnifiedMetric

METRIC_FILE = "unified.json"
ALL = "all"
STEP_SCORE = {"prompt": "prompt", "model": "version", "arguments": "arguments"}
"""Steps of Table 6 -> what they are measured by."""
_SETTINGS = ("supervised", "few_shot")
_INPUT_TYPES = ("single", "multimodal", "history")
_CHOICE = ("version", "version_top5", "model")

Row = Mapping[str, Any]


class Group(NamedTuple):
    """Some of the chats: those whose `key` has this value; an empty key: all."""

    key: str
    value: str

    def holds(self, row: Row) -> bool:
        """Whether a row is of the group."""
        found = shot_group(row["shots"]) if self.key == "shots" else row.get(self.key)
        return not self.key or found == self.value


class Drawn(NamedTuple):
    """A method's pictures at a stage, in one run."""

    rows: Sequence[Row]
    pictures: PictureSet


class Cell(NamedTuple):
    """A line of a table."""

    stage: str
    method: str
    group: Group


def write_tables(
    folder: str | Path, results: PlanResults, run_folders: Sequence[Path], *, unified: str = "fitted",
    resamples: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Write table4, table5, table7, selection, and where there is something to tell table6 and regret (.json, .md,
    .csv), and unified.json.

    Args:
        folder: Where to.
        results: Rows of one run or of several.
        run_folders: Where the features of each run lie, in their order.
        unified: Norms of Eq. 6: `fitted`, `paper`, or the path of a saved metric.
        resamples: For FID and the unified metric.

    Returns:
        What the JSON files hold, by name.

    Raises:
        UnifiedMetricError: Scores without spread, or a saved metric that can't be read.
        ConfigError: A saved metric, or the paper's, of other scores than these.
        FIDError: Features that can't be read.
    """
    folder, about = Path(folder), results.about
    drawn = drawn_pictures(results, run_folders) if about.scorers else {}
    settings = _groups(results, "setting", _SETTINGS)
    types = _groups(results, "input_type", _INPUT_TYPES)
    plain = [*settings, Group("", ALL)] if len(settings) > 1 else settings
    methods = about.drawn or list(about.agents)
    four = [Cell("", method, group) for group in plain for method in methods]
    seven = [Cell("", method, group) for group in types for method in methods]
    six = [Cell(stage, name, group) for group in plain for stage in about.stages[1:] for name in about.agents]

    found: dict[Cell, dict[str, Any]] = {}
    if drawn:
        cells = [*four, *six, *seven]
        sets = {cell: _sets(cell, drawn) for cell in cells}
        metric = _metric(results, drawn, [s for s in sets.values() if s], unified, folder)
        for cell in tqdm(cells, desc="intervals", unit="cell", disable=None):
            found[cell] = _final(sets[cell], results, metric, resamples)
    scores = [*about.scorers, *([FID] if about.references else []), *([UNIFIED] if drawn else [])]
    steps = [name for name in METRICS if name in about.steps]
    tables = {
        "table4": _table(results, "setting", four, found, [*steps, *scores]),
        "table5": table5(results),
        "table7": _table(results, "input_type", seven, found, [*steps, *scores]),
        "selection": selection_table(results),
    }
    if six:
        tables["table6"] = _table(results, "setting", six, found, ["step", *scores])
    if (regret := regret_table(results, plain)) is not None:
        tables["regret"] = regret
    for name, table in sorted(tables.items()):
        write_table(folder, name, table)
    return tables


def drawn_pictures(results: PlanResults, run_folders: Sequence[Path]) -> dict[tuple[str, str], list[Drawn]]:
    """Pictures of every method at every stage, by run: on the chats on which all methods of the stage have some."""
    about, found = results.about, {}
    folder = about.features.get("folder")
    for run, path in zip(about.runs, run_folders, strict=True):
        features = read_features(path / folder) if folder else {}
        for stage in about.stages:
            by_method = {
                name: {row["row_id"]: row for row in results.of(stage, name) if row["run"] == run}
                for name in (about.agents if stage else about.drawn)
            }
            first = next(iter(by_method.values()))
            chats = [name for name in first if all(_has_scores(of.get(name)) for of in by_method.values())]
            compared = {name for name in chats if all(_has_features(of[name], features) for of in by_method.values())}
            for method, of in by_method.items():
                rows = [of[name] for name in chats]
                drawn = Drawn(rows, _picture_set(rows, compared, features, about.scorers))
                found.setdefault((stage, method), []).append(drawn)
    return found


def _has_scores(row: Row | None) -> bool:
    return row is not None and row["scores"] is not None


def _has_features(row: Row, features: Mapping[str, np.ndarray]) -> bool:
    """Whether a chat's pictures and its references can be compared."""
    return bool(row["references"]) and all(key in features for key in (*row["references"], *row["pictures"]))


def table5(results: PlanResults) -> dict[str, Any]:
    """Parameters, training time and planning time of the agents (ChatGen Table 5)."""
    about, rows = results.about, []
    for name, known in about.agents.items():
        of_runs = known if isinstance(known, list) else [known]
        trained = [one["training_seconds"] for one in of_runs]
        rows.append(
            {
                "method": name, "parameters": of_runs[0]["parameters"],
                "training_seconds": None if None in trained else float(np.mean(trained)),
                "seconds": _estimate(results.of("", name), about.runs, lambda row: row["seconds"]),
                "device": ", ".join(sorted({device for one in of_runs for device in one["devices"]})),
                "batch_size": of_runs[0]["batch_size"],
            }
        )  # fmt: skip
    others = ["parameters", "training_seconds", "device", "batch_size"]
    return _about(results) | {"labels": ["method"], "estimates": ["seconds"], "others": others, "rows": rows}


def selection_table(results: PlanResults) -> dict[str, Any]:
    """How often the right model was chosen, by the number of its demonstrations in the training split."""
    about, rows = results.about, []
    groups = [Group("", ALL), *_groups(results, "shots", tuple(SHOT_GROUPS))]
    for method in (*about.agents, *about.choosers):
        of = results.of("", method)
        for group in groups:
            some = [row for row in of if group.holds(row)]
            estimates = {name: _step(some, about.runs, name) for name in _CHOICE}
            rows.append({"method": method, "demonstrations": group.value, **estimates})
    labels = ["method", "demonstrations"]
    return _about(results) | {"labels": labels, "estimates": list(_CHOICE), "others": [], "rows": rows}


def regret_table(results: PlanResults, groups: Sequence[Group]) -> dict[str, Any] | None:
    """Regret by setting and method, and how many of the choices were the very call; None if nothing is known."""
    about, rows = results.about, []
    for group in groups:
        for method in (*about.agents, *about.choosers, GROUND_TRUTH, DEFAULT, ANY_MODEL):
            asked = [row for row in results.of("", method) if group.holds(row)]
            known = [row for row in asked if row["regret"] is not None]
            if asked:
                regret = _estimate(known, about.runs, lambda row: row["regret"])
                equal = _estimate(known, about.runs, lambda row: float(row["equal_call"]))
                line = {"setting": group.value, "method": method, "regret": regret, "equal_call": equal}
                rows.append(line | {"unknown": len(asked) - len(known)})
    if all(row["regret"] is None for row in rows):
        return None
    estimates = ["regret", "equal_call"]
    return _about(results) | {
        "labels": ["setting", "method"], "estimates": estimates, "others": ["unknown"], "rows": rows
    }  # fmt: skip


def _table(
    results: PlanResults, label: str, cells: Sequence[Cell], found: Mapping[Cell, Mapping[str, Any]],
    estimates: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Table 4, 6 or 7: step-wise and final numbers of each cell."""
    about, rows = results.about, []
    for cell in cells:
        of = [row for row in results.of(cell.stage, cell.method) if cell.group.holds(row)]
        asked = [row for row in of if row["drawn_from"] != NOBODY]
        steps: dict[str, Any] = {name: _step(of, about.runs, name) for name in about.steps}
        if cell.stage:
            steps["step"] = steps.get(STEP_SCORE[cell.stage])
        final = dict(found.get(cell, {}))
        line = {label: cell.group.value, "stage": cell.stage, "method": cell.method}
        line |= {name: final.get(name, steps.get(name)) for name in estimates}
        # Arguments one by one are in the JSON file alone.
        line |= {name: value for name, value in steps.items() if name.startswith("arguments/") and value}
        rows.append(line | {
            "chats": len(of), "drawn": len(asked),
            "not_drawn": dict(Counter(row["not_drawn"] for row in asked if row["not_drawn"]).most_common()),
            "stood_in": sum(row["drawn_from"] == BASELINE for row in asked),
            "left_out": len(asked) - final.get("counted", len(asked)),
        })  # fmt: skip
    labels = [label, *(["stage"] if any(cell.stage for cell in cells) else []), "method"]
    others = ["chats", *(["drawn", "not_drawn", "left_out"] if about.scorers else [])]
    return _about(results) | {"labels": labels, "estimates": list(estimates), "others": others, "rows": rows}


def _about(results: PlanResults) -> dict[str, Any]:
    about = results.about
    return {
        "runs": about.runs, "num_images": about.num_images, "references": about.references,
        "features": about.features, "default_call": about.default_call,
    }  # fmt: skip


def _groups(results: PlanResults, key: str, order: Sequence[str]) -> list[Group]:
    """The groups that have rows, known ones first."""
    values = dict.fromkeys(shot_group(row["shots"]) if key == "shots" else row[key] for row in results.rows)
    return [Group(key, value) for value in (*(v for v in order if v in values), *(v for v in values if v not in order))]


def _picture_set(
    rows: Sequence[Row], compared: set[str], features: Mapping[str, np.ndarray], scorers: Sequence[str]
) -> PictureSet:
    means = [[float(np.mean(row["scores"][name])) for name in scorers] for row in rows]
    scores, names = np.array(means).reshape(len(rows), len(scorers)), tuple(row["row_id"] for row in rows)
    some = [row for row in rows if row["row_id"] in compared]
    if not some:
        return PictureSet(scores, names)
    numbers = {row["row_id"]: number for number, row in enumerate(some)}
    return PictureSet(
        scores,
        names,
        np.array([[features[key] for key in row["pictures"]] for row in some]),
        np.array([[features[key] for key in row["references"]] for row in some]),
        np.array([numbers.get(row["row_id"], -1) for row in rows]),
    )


def _sets(cell: Cell, drawn: Mapping[tuple[str, str], Sequence[Drawn]]) -> list[PictureSet]:
    """A cell's pictures by run; runs without any are left out."""
    sets = []
    for of_run in drawn.get((cell.stage, cell.method), []):
        chats = np.array([i for i, row in enumerate(of_run.rows) if cell.group.holds(row)], dtype=int)
        if len(chats):
            sets.append(of_run.pictures.take(chats))
    return sets


def _metric(
    results: PlanResults, drawn: Mapping[tuple[str, str], Sequence[Drawn]], sets: Iterable[Sequence[PictureSet]],
    unified: str, folder: Path,
) -> UnifiedMetric:  # fmt: skip
    """The norms of Eq. 6, saved in the folder."""
    about = results.about
    if unified == "fitted":
        rows = [row for of in drawn.values() for of_run in of for row in of_run.rows]
        scores = {name: [value for row in rows for value in row["scores"][name]] for name in about.scorers}
        fids = [part.fid() for of in sets for part in of if part.num_compared >= 2]
        if fids:
            scores[FID] = [0.0, *fids]
        what = f"pictures of {', '.join(about.drawn)} in {', '.join(about.runs)}" + (
            ", and FIDs of their sets in these tables and of equal sets" if fids else ""
        )
        metric = UnifiedMetric.fit(scores, population=what, lower_is_better=[FID] if fids else [])
    else:
        metric = PAPER if unified == "paper" else UnifiedMetric.load(unified)
        there = {*about.scorers, *([FID] if about.references else [])}
        if there != set(metric.scales):
            raise ConfigError(
                f"`unified: {unified}` is of {', '.join(sorted(metric.scales))}, but there are "
                f"{', '.join(sorted(there))}: set `rollout.scorers` and `fid` to these, or `unified: fitted`."
            )
    metric.save(folder / METRIC_FILE)
    return metric


def _final(sets: Sequence[PictureSet], results: PlanResults, metric: UnifiedMetric, resamples: int) -> dict[str, Any]:
    """Estimates of a cell's pictures, and how many chats they are `counted` from."""
    if not sets:
        return {"counted": 0}
    about = results.about
    estimates = set_estimates(sets, about.scorers, metric, resamples=resamples)
    found: dict[str, Any] = {name: estimate._asdict() for name, estimate in estimates.items()}
    if len(about.runs) > 1 and len(sets) == len(about.runs):
        for run, part in zip(about.runs, sets, strict=True):
            for name, value in run_values(part, about.scorers, metric).items():
                if name in found:
                    found[name].setdefault("runs", {})[run] = value
    return found | {"counted": sum(map(len, sets))}


def _step(rows: Sequence[Row], runs: Sequence[str], name: str) -> dict[str, Any] | None:
    return _estimate([row for row in rows if name in row["steps"]], runs, lambda row: row["steps"][name])


def _estimate(rows: Sequence[Row], runs: Sequence[str], value: Callable[[Row], float]) -> dict[str, Any] | None:
    """Mean, interval and n; of several runs also the mean of each. None without rows."""
    by_run = {run: {row["row_id"]: value(row) for row in rows if row["run"] == run} for run in runs}
    by_run = {run: of_run for run, of_run in by_run.items() if of_run}
    if not by_run:
        return None
    values = {run: list(of_run.values()) for run, of_run in by_run.items()}
    items = [list(of_run) for of_run in by_run.values()]
    estimate: dict[str, Any] = bootstrap_runs(list(values.values()), items=items)._asdict()
    return estimate | ({"runs": {run: float(np.mean(v)) for run, v in values.items()}} if len(runs) > 1 else {})
