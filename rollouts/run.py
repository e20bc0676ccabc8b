"""Draw the pictures of a table of calls, and score them (DiffAgent Sec. 3.2.2, "we actually call APIs").

    python -m rollouts.run --config configs/rollouts/run.yaml
    python -m rollouts.run --calls candidates.jsonl --catalog catalog.jsonl --weights models/ --output runs/rollout

Writes scored.parquet (see `rollouts.scored_table`), summary.json, costs.json (what loading and drawing took here, for
`python -m rollouts.plan`), unified.json and config.yaml. Pictures and scores go to the store as they are made: after a
kill the same command goes on, another reward uses the same pictures, and what could not be drawn is listed with its
reason.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rewards.commandline import ConfigError, run_command, save_config
from rewards.tracking import wandb_run
from rewards.unified import UnifiedMetric, UnifiedMetricError
from rollouts.calls_table import CallsError
from rollouts.catalog import CatalogError
from rollouts.requests import RenderSettings
from rollouts.rollout import Rollout
from rollouts.store_errors import StoreError
from rollouts.workers import InProcessPool, Pool, PoolError, WorkerSpec

logger = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """Options of `python -m rollouts.run`."""

    calls: str = field(metadata={"help": "Table of calls (.jsonl, .parquet), e.g. of rollouts.candidates."})
    catalog: str = field(metadata={"help": "Catalogue of the models."})
    weights: str = field(metadata={"help": "Folder of the weights."})
    output: str = field(metadata={"help": "Folder for scored.parquet, summary.json and so on."})
    store: str | None = field(
        default=None,
        metadata={"help": "Folder or URL (s3://…) of the pictures, for all workers; none: `store` in `output`."},
    )
    store_index: str | None = field(default=None, metadata={"help": "Local SQLite file, if `store` is a URL."})
    num_images: int = field(default=10, metadata={"help": "Pictures per call, each with a seed of its own."})
    seed: int = field(default=0, metadata={"help": "The pictures' seeds are derived from it and the prompt's id."})
    scorers: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "In a YAML file: column -> arguments of load_scorer (`name` if other)."}
    )
    unified: str | None = field(
        default=None, metadata={"help": "Saved unified metric for the reward; none: fitted on this rollout."}
    )
    keep_images: str = field(
        default="all", metadata={"help": "all, best (of each prompt's candidates) or none; they can be drawn again."}
    )
    retry_failed: bool = field(default=True, metadata={"help": "Try again what failed for reasons that may be gone."})
    pool: str = field(default="in_process", metadata={"help": "in_process, or ray: many workers."})
    num_workers: int = field(default=1, metadata={"help": "Workers of the Ray pool."})
    gpus_per_worker: float = field(default=0.0, metadata={"help": "GPUs of each."})
    cpus_per_worker: float = field(default=1.0, metadata={"help": "CPUs of each."})
    num_scoring_workers: int = field(
        default=0, metadata={"help": "Workers of the Ray pool that only score; 0: each scores what it draws."}
    )
    gpus_per_scoring_worker: float = field(default=0.0, metadata={"help": "GPUs of each."})
    ray_address: str | None = field(default=None, metadata={"help": "Of a running cluster, or auto; none: start one."})
    max_worker_gb: float | None = field(
        default=None, metadata={"help": "A worker that grows beyond this many GB is started anew."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, …; none: the GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on a GPU."})
    batch_size: int = field(default=4, metadata={"help": "Pictures drawn at once."})
    pad_batches: bool = field(
        default=False, metadata={"help": "Always draw so many at once: pictures are reproducible to the last bit."}
    )
    resolution_scale: float = field(default=1.0, metadata={"help": "Draw at this fraction of the called size."})
    native_side: int | None = field(
        default=None, metadata={"help": "Or: pixels drawn for an architecture's own side, such as 64 for toy models."}
    )
    vae_tiling: bool = field(default=False, metadata={"help": "Decode large pictures in tiles."})
    compile_unet: bool = field(default=False, metadata={"help": "torch.compile the denoiser."})
    trigger_words: str = field(default="first", metadata={"help": "What prompts lack of them: first, all or none."})
    configs: dict[str, str] = field(
        default_factory=dict, metadata={"help": "In a YAML file: base model -> config folder of single files."}
    )
    verify_weights: bool = field(default=True, metadata={"help": "Compare weights with the catalogue's SHA-256."})
    device_gb: float | None = field(default=None, metadata={"help": "GB of checkpoints kept on the device."})
    cpu_gb: float | None = field(default=None, metadata={"help": "GB of checkpoints kept in CPU memory beside it."})
    num_threads: int | None = field(default=None, metadata={"help": "Of torch, per worker."})
    max_failed_share: float = field(
        default=1.0, metadata={"help": "End with exit code 1 if more than this share of the pictures failed."}
    )
    report_to: str = field(default="none", metadata={"help": "wandb or none."})
    run_name: str | None = field(default=None, metadata={"help": "Of the W&B run."})

    def __post_init__(self) -> None:
        _one_of("keep_images", self.keep_images, ("all", "best", "none"))
        _one_of("pool", self.pool, ("in_process", "ray"))
        _one_of("report_to", self.report_to, ("none", "wandb"))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.keep_images != "all" and not self.scorers:
            raise ValueError(f"`keep_images: {self.keep_images}` needs `scorers`; nothing would be left otherwise.")
        if self.num_images < 1:
            raise ValueError(f"`num_images` must be at least 1, but is {self.num_images}.")
        if self.pool == "in_process" and self.num_workers != 1:
            raise ValueError(f"`num_workers: {self.num_workers}` needs `pool: ray`.")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"`max_failed_share` must lie in [0, 1], but is {self.max_failed_share}.")
        for column, options in self.scorers.items():
            if not isinstance(options, Mapping):
                raise ValueError(f"`scorers`: {column} must be a mapping of options, but is {options!r}.")
        self.settings("cpu")  # checks itself

    def settings(self, device_type: str) -> RenderSettings:
        """How to draw, on a kind of device."""
        dtype: Any = self.dtype
        if dtype == "auto":
            dtype = "float32" if device_type == "cpu" else "bfloat16"
        return RenderSettings(
            dtype=dtype, device_type=device_type, batch_size=self.batch_size, pad_batches=self.pad_batches,
            resolution_scale=self.resolution_scale, native_side=self.native_side, vae_tiling=self.vae_tiling,
            compile_unet=self.compile_unet, trigger_words=self.trigger_words,  # ty: ignore[invalid-argument-type]
        )  # fmt: skip

    def worker_spec(self) -> WorkerSpec:
        """What every worker is told."""
        return WorkerSpec(
            catalog=str(Path(self.catalog).resolve()), weights=str(Path(self.weights).resolve()),
            settings=self.settings(self.device_type()), configs=self.configs, verify=self.verify_weights,
            device=self.device, device_gb=self.device_gb, cpu_gb=self.cpu_gb, scorers=self.scorers,
            store=self.store_path(), keep_images=self.keep_images != "none", num_threads=self.num_threads,
        )  # fmt: skip

    def store_path(self) -> str:
        """Folder or URL of the store."""
        path = self.store or str(Path(self.output) / "store")
        return path if "://" in path else str(Path(path).resolve())

    def device_type(self) -> str:
        """`cpu`, `cuda`, …: of the workers, which may have a GPU where this process has none."""
        if self.device is not None:
            return self.device.partition(":")[0]
        if self.pool == "ray":
            return "cuda" if self.gpus_per_worker > 0 else "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def make_pool(self) -> Pool:
        """Start the workers."""
        if self.pool == "in_process":
            return InProcessPool(self.worker_spec(), max_memory_gb=self.max_worker_gb)
        from rollouts.ray_pool import RayOptions, RayPool

        options = RayOptions(
            num_workers=self.num_workers, num_gpus=self.gpus_per_worker, num_cpus=self.cpus_per_worker,
            address=self.ray_address, max_memory_gb=self.max_worker_gb,
            num_scoring_workers=self.num_scoring_workers, scoring_gpus=self.gpus_per_scoring_worker,
        )  # fmt: skip
        return RayPool(self.worker_spec(), options)


def main(config: RunConfig) -> dict[str, Any]:
    """Draw and score what the store lacks, write the tables, and return the summary."""
    output = Path(config.output)
    metric = UnifiedMetric.load(config.unified) if config.unified else None
    rollout = Rollout(
        config.calls, config.catalog, config.settings(config.device_type()),
        store=config.store_path(), store_index=config.store_index, num_images=config.num_images,
        seed=config.seed, keep_images=config.keep_images, retry_failed=config.retry_failed,
        weights=config.weights,
    )  # fmt: skip
    save_config(output / "config.yaml", config)
    with rollout:
        if not rollout.finished or config.scorers:
            about = {"name": config.run_name, "config": asdict(config), "job_type": "rollout"}
            with wandb_run(config.report_to, **about) as tracked, _make_pool(config) as pool:
                rollout.run(pool, log=tracked.log if tracked else None)
        summary = rollout.write(output, metric=metric)
    logger.info("%s", rollout.text(summary))
    if summary["failed_share"] > config.max_failed_share:
        logger.error("%.1f%% of the pictures failed, see %s.", 100 * summary["failed_share"], output / "summary.json")
        sys.exit(1)
    return summary


def _make_pool(config: RunConfig) -> Pool:
    from rewards.checkpoints import CheckpointError
    from rewards.registry import UnknownScorerError

    try:
        return config.make_pool()
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    except (CheckpointError, UnknownScorerError) as error:
        raise ConfigError(f"`scorers`: {error}") from error


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {value!r}.")


if __name__ == "__main__":
    run_command(main, RunConfig, errors=(CallsError, CatalogError, PoolError, StoreError, UnifiedMetricError))
