"""What a rollout would take on a cluster: loads, GPU-hours, makespan, disk traffic and busy share, by simulation.

    python -m rollouts.plan --config configs/rollouts/plan.yaml
    python -m rollouts.plan --calls candidates.jsonl --catalog catalog.jsonl --costs runs/rollout/costs.json \
        --workers 8 64 --output runs/plan

The planner that drives `rollouts.run` is run in virtual time (`rollouts.simulation`) beside two that keep the table's
order. Writes plan.md, plan.json, plan.svg and the resolved config.yaml.
"""

import difflib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.baseline_planners import LruPlanner, NaivePlanner, batches_in_order
from rollouts.calls_table import CallsError, ask, read_calls, unique_jobs
from rollouts.catalog import Catalog, CatalogError
from rollouts.costs import GB, PRIORS, CostError, CostModel
from rollouts.model_sizes import model_sizes
from rollouts.planning import Planner, make_batches
from rollouts.requests import Batch, RenderSettings
from rollouts.simulation import Cluster, PlannerLike, simulate
from rollouts.workload import Synthetic, Workload

logger = logging.getLogger(__name__)

PLANNERS = ("planned", "lru", "naive")
_FIXED = ("output", "variants", "plot")  # what a variant can't change


@dataclass
class PlanConfig:
    """Options of `python -m rollouts.plan`; GB are 10^9 bytes."""

    output: str = field(metadata={"help": "Folder for plan.md, plan.json, plan.svg and config.yaml."})
    calls: str | None = field(default=None, metadata={"help": "Table of calls (.jsonl, .parquet)."})
    catalog: str | None = field(default=None, metadata={"help": "Catalogue of the models that `calls` names."})
    weights: str | None = field(default=None, metadata={"help": "Folder of weights, for sizes; none: the catalogue's."})
    num_images: int = field(default=10, metadata={"help": "Pictures per call of `calls`."})
    synthetic: dict[str, Any] | None = field(
        default=None, metadata={"help": "In a YAML file, instead of `calls`: fields of rollouts.workload.Synthetic."}
    )
    size_scale: float = field(default=1.0, metadata={"help": "All models are taken to be so many times their size."})
    costs: str | None = field(default=None, metadata={"help": "costs.json of a rollout; none: assumptions."})
    prior: str = field(default="a100", metadata={"help": "The assumptions: a100 or cpu (rollouts.costs)."})
    batch_size: int = field(default=4, metadata={"help": "Pictures drawn at once."})
    planners: list[str] = field(
        default_factory=lambda: list(PLANNERS), metadata={"help": "Of planned, lru and naive; in this order."}
    )
    workers: list[int] = field(
        default_factory=lambda: [8, 64, 512], metadata={"help": "Sizes of the cluster, in GPUs."}
    )
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs that share a node's memory and link."})
    device_gb: float = field(default=30.0, metadata={"help": "GB of pipelines kept on a GPU."})
    cpu_gb: float = field(default=400.0, metadata={"help": "GB of checkpoint files kept in a node's memory."})
    read_gb_per_s: float | None = field(default=2.0, metadata={"help": "GB/s a node reads; none: no limit."})
    storage_gb_per_s: float | None = field(default=None, metadata={"help": "GB/s all nodes read; none: no limit."})
    prefetch: bool = field(default=True, metadata={"help": "Read the next checkpoint while one draws with."})
    jitter: float = field(
        default=0.0, metadata={"help": "Standard deviation of the logarithm of drawing times around the estimates."}
    )
    variants: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "In a YAML file: further tables, with some of these options changed."},
    )
    plot: bool = field(default=True, metadata={"help": "Draw plan.svg; needs matplotlib."})

    def __post_init__(self) -> None:
        if (self.calls is None) == (self.synthetic is None):
            raise ValueError("Give either `calls` (a table) or `synthetic` (in the YAML file), and not both.")
        if self.calls is not None and self.catalog is None:
            raise ValueError("`calls` needs `catalog`, which says what its models are.")
        if self.prior not in PRIORS:
            raise ValueError(f"`prior` must be one of {', '.join(PRIORS)}, but is {self.prior!r}.")
        if not self.planners or not set(self.planners) <= set(PLANNERS):
            raise ValueError(f"`planners` must be some of {', '.join(PLANNERS)}, but is {self.planners}.")
        if not self.workers or min(self.workers) < 1:
            raise ValueError(f"`workers` must be numbers of at least 1, but is {self.workers}.")
        if min(self.num_images, self.batch_size) < 1 or not self.size_scale > 0 or self.jitter < 0:
            raise ValueError(
                f"`num_images` ({self.num_images}) and `batch_size` ({self.batch_size}) must be at least 1, "
                f"`size_scale` ({self.size_scale}) above 0 and `jitter` ({self.jitter}) not below 0."
            )
        self.cluster(1)  # checks itself
        if self.synthetic is not None:
            self.synthetic_table()
        for variant in self.variants:
            self.varied(variant)

    def cluster(self, workers: int) -> Cluster:
        """A cluster of so many GPUs."""
        return Cluster(
            workers, self.gpus_per_node, self.device_gb, self.cpu_gb, self.read_gb_per_s, self.storage_gb_per_s,
            self.prefetch,
        )  # fmt: skip

    def synthetic_table(self) -> Synthetic:
        """The invented table's description."""
        _check_keys("synthetic", self.synthetic or {}, [f.name for f in fields(Synthetic)])
        try:
            return TypeAdapter(Synthetic).validate_python(self.synthetic)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"`synthetic`: {where} {first['msg']}") from error

    def varied(self, variant: Mapping[str, Any]) -> "PlanConfig":
        """These options with some changed; what `synthetic` does not name of a variant's stays as it is."""
        _check_keys("variants", variant, [f.name for f in fields(self) if f.name not in _FIXED])
        changes = dict(variant)
        if self.synthetic is not None and isinstance(changes.get("synthetic"), dict):
            changes["synthetic"] = self.synthetic | changes["synthetic"]
        return replace(self, variants=[], **changes)


def main(config: PlanConfig) -> dict[str, Any]:
    """Simulate, write the tables and return what plan.json holds."""
    tables, workloads = [], {}
    for variant in [{}, *config.variants]:
        varied = config.varied(variant)
        key = json.dumps([varied.synthetic, varied.calls, varied.catalog, varied.num_images], sort_keys=True)
        workloads[key] = workload = workloads.get(key) or read_workload(varied)
        tables.append({"variant": dict(variant)} | predict(varied, workload))
    result = {"tables": tables, "costs": _costs(config).to_dict()["seconds"]}
    output = Path(config.output)
    text = plan_text(result)
    if config.plot:
        write_atomically(output / "plan.svg", plot(tables[0]["rows"]))
    save_config(output / "config.yaml", config)
    write_atomically(output / "plan.json", json.dumps(result, indent=2).encode())
    write_atomically(output / "plan.md", text.encode())
    logger.info("%s", text)
    return result


def read_workload(config: PlanConfig) -> Workload:
    """What is to be drawn, and how large its models are.

    Raises:
        ConfigError: None of the calls can be drawn.
    """
    if config.calls is None:
        return config.synthetic_table().workload()
    catalog = Catalog.load(str(config.catalog))
    settings = RenderSettings(batch_size=config.batch_size)
    asked = ask(read_calls(config.calls), catalog, settings, num_images=config.num_images)
    keys = [job.batch_key for job in unique_jobs(asked)[0]]
    failures = Counter(entry.failure.reason for entry in asked if entry.failure is not None)
    if not keys:
        raise ConfigError(f"`calls`: none of the calls in {config.calls} can be drawn: {dict(failures)}.")
    names = {key.checkpoint for key in keys} | {key.lora for key in keys if key.lora}
    return Workload(keys, model_sizes(catalog, sorted(names), config.weights), failures)


def predict(config: PlanConfig, workload: Workload) -> dict[str, Any]:
    """The rows of a table, one per cluster and planner, and what it is about."""
    costs = _costs(config)
    sizes = {name: round(size * config.size_scale) for name, size in workload.sizes.items()}
    batches = make_batches(workload.keys, config.batch_size)
    in_order = batches_in_order(workload.keys, config.batch_size)
    rows = []
    for workers in config.workers:
        for name in config.planners:
            started = time.perf_counter()
            planner = _planner(name, batches, in_order, sizes, costs, workers)
            prediction = simulate(planner, config.cluster(workers), costs, sizes, jitter=config.jitter)
            seconds = time.perf_counter() - started
            rows.append({"planner": name} | prediction.summary() | {"seconds_to_simulate": round(seconds, 2)})
            logger.info("%s on %d: %.1f s", name, workers, seconds)
    used = {key.checkpoint for key in workload.keys}
    return {
        "images": len(workload.keys),
        "models": workload.models,
        "checkpoints": len(used),
        "checkpoint_bytes": sum(sizes.get(name, 0) for name in used),
        "seconds_per_image": sum(map(costs.draw_seconds, batches)) / len(workload.keys),
        "failures": dict(workload.failures),
        "rows": rows,
    }


def plan_text(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = []
    for table in result["tables"]:
        changes = {name: value for name, value in table["variant"].items() if name not in ("workers", "planners")}
        changed = ", ".join(f"{name} {json.dumps(value)}" for name, value in changes.items())
        models = f"{table['models']:,} models on {table['checkpoints']:,} checkpoints"
        lines += [
            f"## {changed or 'As configured'}", "",
            f"{table['images']:,} pictures, {table['seconds_per_image']:.2f} s each, with {models} "
            f"({table['checkpoint_bytes'] / GB / 1000:.2f} TB).", "",
            "| GPUs | planner | busy | waiting | LoRA swaps | idle at the end | makespan | GPU-hours | loads | read |",
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        lines += [_line(row) for row in table["rows"]]
        lines += [""]
        lines += [f"Calls that can't be drawn, {why}: {count:,}.\n" for why, count in table["failures"].items()]
    lines += ["## Seconds assumed or learned", "", "```json", json.dumps(result["costs"], indent=2), "```"]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Busy share and makespan over the cluster's size, as SVG.

    Raises:
        ConfigError: matplotlib is missing.
    """
    import io

    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ConfigError('`plot` needs matplotlib: pip install "t2i-align[bench]", or set `plot: false`.') from error
    with matplotlib.rc_context(
        {"svg.hashsalt": "plan", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    ):
        figure, (busy, hours) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for name in dict.fromkeys(row["planner"] for row in rows):
            own = [row for row in rows if row["planner"] == name]
            gpus = [row["workers"] for row in own]
            busy.plot(gpus, [100 * row["busy_share"] for row in own], marker="o", markersize=4, label=name)
            hours.plot(gpus, [row["makespan"] / 3600 for row in own], marker="o", markersize=4, label=name)
        busy.set(xscale="log", ylim=(0, 103), xlabel="GPUs", ylabel="busy, % of all GPU time")
        hours.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="makespan, hours")
        for axes in (busy, hours):
            sizes = sorted({row["workers"] for row in rows})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
        busy.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return buffer.getvalue()


def _costs(config: PlanConfig) -> CostModel:
    return CostModel(PRIORS[config.prior]) if config.costs is None else CostModel.load(config.costs)


def _planner(
    name: str,
    batches: list[Batch],
    in_order: list[Batch],
    sizes: Mapping[str, int],
    costs: CostModel,
    workers: int,
) -> PlannerLike:
    if name == "planned":
        return Planner(batches, sizes, costs, workers=workers)
    return LruPlanner(in_order) if name == "lru" else NaivePlanner(in_order)


def _line(row: Mapping[str, Any]) -> str:
    shares = [f"{100 * row[name]:.1f}%" for name in ("busy_share", "waiting_share", "lora_share", "idle_share")]
    cells = [
        row["workers"], row["planner"], *shares, _duration(row["makespan"]), f"{row['gpu_hours']:.1f}",
        f"{row['loads']:,}", f"{row['bytes_read'] / GB / 1000:.2f} TB",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _check_keys(where: str, mapping: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it can have {', '.join(known)}."
            raise ValueError(f"`{where}`: unknown key `{key}`; {hint}")


if __name__ == "__main__":
    run_command(main, PlanConfig, errors=(CallsError, CatalogError, CostError))
