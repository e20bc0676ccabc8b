"""Drawing plans, each with its own prompt, negative prompt, model and arguments.

A table of calls (`rollouts.calls_table`) has one instruction for all candidates of a prompt, and a clip skip for none;
here every request stands for itself. All of them, of all methods, are one plan of work: a checkpoint that several
methods chose is loaded once, and equal requests are drawn once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from align.agents.plans import plan_call
from rewards.checkpoints import CheckpointError
from rewards.commandline import ConfigError
from rewards.registry import UnknownScorerError
from rollouts.api import APICallError
from rollouts.catalog import Catalog
from rollouts.costs import CostModel
from rollouts.model_sizes import model_sizes
from rollouts.picture_writer import picture_metadata, request_to_dict
from rollouts.planning import Planner, make_batches
from rollouts.requests import RenderError, RenderFailure, RenderJob, RenderRequest, RenderSettings, resolve
from rollouts.run import RunConfig
from rollouts.store import ImageStore
from rollouts.store_index import IndexRow
from rollouts.workers import Pool

logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """What became of a plan's pictures.

    Attributes:
        keys: Of the store, one per seed; empty if there is a failure.
        images: Where each lies.
        failure: Why there are none. A single picture that failed fails all of them.
    """

    keys: list[str]
    images: list[str]
    failure: RenderFailure | None = None


Asked = list[RenderRequest] | RenderFailure
"""A plan's pictures, or why they can't even be asked for."""


def ask_plan(plan: Mapping[str, Any], catalog: Catalog, seeds: Sequence[int]) -> Asked:
    """The pictures of a plan (`Plan.to_dict`, or a row of ChatGenBench), one per seed."""
    try:
        call = plan_call(plan["model"], plan["arguments"], catalog)
    except APICallError as error:
        reason = "unknown_model" if error.reason == "unknown_model" else "invalid_call"
        return RenderFailure(reason, str(error))
    clip_skip = plan["arguments"].get("clip_skip") or 1
    return [RenderRequest(call, plan["prompt"], plan["negative_prompt"] or "", s, clip_skip) for s in seeds]


def can_not_be_asked(asked: Sequence[Asked], config: RunConfig) -> list[int]:
    """Numbers of the plans that fail before any weights are looked at, such as for a sampler that nobody has."""
    catalog, settings = Catalog.load(config.catalog), config.settings(config.device_type())
    resolved = (_resolved(requests, catalog, settings) for requests in asked)
    return [number for number, jobs in enumerate(resolved) if isinstance(jobs, RenderFailure)]


def draw(asked: Sequence[Asked], config: RunConfig) -> list[Drawn]:
    """Draw what the store lacks.

    Args:
        asked: Pictures of each plan.
        config: How, with which workers, and where pictures go; its table of calls is not read and nothing is scored.

    Returns:
        One for each plan, in order.

    Raises:
        PoolError, StoreError: The work can't go on; what was drawn is kept.
        ConfigError: A package that is not installed.
    """
    catalog, settings = Catalog.load(config.catalog), config.settings(config.device_type())
    found: list[list[RenderJob] | RenderFailure] = []
    work: dict[str, tuple[RenderJob, RenderRequest]] = {}
    for requests in asked:
        jobs = _resolved(requests, catalog, settings)
        found.append(jobs)
        if not isinstance(jobs, RenderFailure) and not isinstance(requests, RenderFailure):
            work |= {job.key: (job, request) for job, request in zip(jobs, requests, strict=True)}
    with ImageStore(config.store_path(), index=config.store_index) as store:
        missing = store.missing(work, retry_failed=config.retry_failed, need_images=True)
        logger.info("%d pictures asked for, %d to draw", len(work), len(missing))
        if missing:
            with make_pool(replace(config, scorers={})) as pool:
                _draw_missing([work[key] for key in missing], pool, store, catalog, config)
        rows = store.get_many(work, metadata=False)
    return [_drawn(jobs, rows) for jobs in found]


def make_pool(config: RunConfig) -> Pool:
    """The workers of a configuration.

    Raises:
        ConfigError: A package that is not installed, or scorers that can't be loaded.
    """
    try:
        return config.make_pool()
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    except (CheckpointError, UnknownScorerError) as error:
        raise ConfigError(f"`rollout.scorers`: {error}") from error


def _resolved(asked: Asked, catalog: Catalog, settings: RenderSettings) -> list[RenderJob] | RenderFailure:
    if isinstance(asked, RenderFailure):
        return asked
    try:
        return [resolve(request, catalog, settings) for request in asked]
    except RenderError as error:
        return error.failure


def _draw_missing(
    work: Sequence[tuple[RenderJob, RenderRequest]], pool: Pool, store: ImageStore, catalog: Catalog, config: RunConfig
) -> None:
    jobs, requests = [job for job, _ in work], [request for _, request in work]
    batches = make_batches([job.batch_key for job in jobs], config.batch_size)
    names = [name for batch in batches for name in (batch.key.checkpoint, batch.key.lora) if name]
    sizes, costs = model_sizes(catalog, names, config.weights), CostModel()
    failed = 0
    with tqdm(total=len(jobs), desc="render", unit="image", smoothing=0.05, disable=None) as bar:
        for finished in pool.run(Planner(batches, sizes, costs, workers=pool.num_workers), jobs, requests):
            costs.observe(finished.batch, finished.report.spent, sizes.get(finished.batch.key.checkpoint, 0))
            rows = []
            for index, result in zip(finished.batch.jobs, finished.report.results, strict=True):
                failed += result.failure is not None
                metadata = picture_metadata(jobs[index], request_to_dict(requests[index]))
                written = (result.file_bytes, result.pixels or None)
                rows.append(IndexRow(result.key, result.failure, *written, result.seconds, metadata, {}))
            store.put_rows(rows)
            bar.update(len(rows))
            bar.set_postfix(failed=failed, refresh=False)


def _drawn(jobs: list[RenderJob] | RenderFailure, rows: Mapping[str, Any]) -> Drawn:
    if isinstance(jobs, RenderFailure):
        return Drawn([], [], jobs)
    images = []
    for job in jobs:
        row = rows.get(job.key)
        if row is None or row.failure is not None or row.uri is None:
            failure = row.failure if row is not None and row.failure else RenderFailure("error", "It was not stored.")
            return Drawn([], [], failure)
        images.append(row.uri)
    return Drawn([job.key for job in jobs], images)
