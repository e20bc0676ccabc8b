"""A rollout: what a table of calls asks for, what of it the store has, and the rest, drawn by a pool."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from rewards.files import write_atomically
from rewards.unified import UnifiedMetric
from rollouts.calls_table import Asked, ask, read_calls, unique_jobs
from rollouts.catalog import Catalog
from rollouts.costs import CostModel
from rollouts.model_sizes import model_sizes
from rollouts.picture_writer import picture_metadata, request_to_dict
from rollouts.planning import Planner, make_batches
from rollouts.requests import RenderFailure, RenderSettings, Spent
from rollouts.scored_table import fit_on, scored_rows, write_scored
from rollouts.store import ImageStore
from rollouts.store_errors import StoreError
from rollouts.store_index import IndexRow
from rollouts.workers import Finished, Pool

logger = logging.getLogger(__name__)

SCORED_FILE = "scored.parquet"
SUMMARY_FILE = "summary.json"
LOG_SECONDS = 10.0
SCORED_AT_ONCE = 32


@dataclass
class Progress:
    """What has been done since the start of this process."""

    drawn: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    not_stored: int = 0
    """Pictures there was no room for; their scores are kept."""
    rescored: int = 0
    spent: Spent = Spent()
    score_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, finished: Finished) -> None:
        """Count a batch."""
        report = finished.report
        failures = [result.failure.reason for result in report.results if result.failure is not None]
        self.failed.update(failures)
        self.drawn += len(report.results) - len(failures)
        self.spent = self.spent.plus(report.spent)
        self.score_seconds += report.score_seconds

    def numbers(self) -> dict[str, float]:
        """For a progress bar, a log or a summary. A cache hit is a batch that found its checkpoint in memory."""
        seconds = time.perf_counter() - self.started
        return {
            "images": self.drawn,
            "failures": self.failed.total(),
            "images_per_second": self.drawn / seconds,
            "checkpoint_loads": self.spent.loads,
            "cache_hits": max(0, self.spent.batches - self.spent.loads),
            "lora_loads": self.spent.lora_loads,
            "loaded_gb": self.spent.loaded_bytes / 1e9,
            "load_seconds": self.spent.load_seconds,
            "draw_seconds": self.spent.draw_seconds,
            "score_seconds": self.score_seconds,
            "rescored": self.rescored,
            "seconds": seconds,
        }


class Rollout:
    """All pictures of a table of calls. Use it in a `with` statement."""

    def __init__(
        self,
        calls: str | Path,
        catalog: str | Path,
        settings: RenderSettings,
        *,
        store: str | Path,
        store_index: str | Path | None = None,
        num_images: int = 10,
        seed: int = 0,
        keep_images: str = "all",
        retry_failed: bool = True,
        weights: str | Path | None = None,
    ):
        """Read the table, resolve it and look into the store.

        Args:
            calls: Table of calls.
            catalog: Catalogue file.
            settings: How to draw.
            store, store_index: See `ImageStore`.
            num_images: Pictures per call.
            seed: Theirs are derived from it.
            keep_images: `all`, `best` (the candidate of each prompt whose scores are best) or `none`.
            retry_failed: Draw again what failed for reasons that may be gone.
            weights: Where the weights are, for estimates of loading times.

        Raises:
            CallsError, CatalogError, StoreError: What can't be read.
        """
        self.prompts = read_calls(calls)
        self.catalog = Catalog.load(catalog)
        self.settings, self.keep_images, self.weights = settings, keep_images, weights
        self.asked = ask(self.prompts, self.catalog, settings, num_images=num_images, seed=seed)
        self.jobs, self.requests = unique_jobs(self.asked)
        self.keys = [job.key for job in self.jobs]
        self.costs = CostModel()
        self.progress = Progress()
        self.scorer_ids: dict[str, str] = {}
        self.events: Counter[str] = Counter()
        self._index = {key: index for index, key in enumerate(self.keys)}
        self.store = ImageStore(store, index=store_index)
        self._missing = self.store.missing(self.keys, retry_failed=retry_failed, need_images=keep_images == "all")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()

    @property
    def finished(self) -> bool:
        """Whether the store has every picture; scores may be missing."""
        return not self._missing

    def run(self, pool: Pool, *, log: Callable[[dict[str, float]], None] | None = None) -> None:
        """Draw and score what is missing.

        Args:
            pool: Its workers.
            log: Called with `Progress.numbers` every few seconds and at the end.

        Raises:
            StoreError: Not even scores can be stored any more.
        """
        self.scorer_ids = {name: f"{name}:{_digest(about)}" for name, about in pool.describe_scorers().items()}
        to_draw, to_score = self._left_over()
        logger.info("%d pictures asked for, %d to draw, %d to score again", len(self.keys), len(to_draw), len(to_score))
        chosen = [self._index[key] for key in to_draw]
        batches = make_batches([self.jobs[i].batch_key for i in chosen], self.settings.batch_size)
        batches = [batch._replace(jobs=tuple(chosen[i] for i in batch.jobs)) for batch in batches]
        models = [name for batch in batches for name in (batch.key.checkpoint, batch.key.lora) if name]
        sizes = model_sizes(self.catalog, models, self.weights)
        planner = Planner(batches, sizes, self.costs, workers=pool.num_workers)
        self.progress.started = last = time.perf_counter()
        best = _BestOf(self, {*to_draw, *to_score}) if self.keep_images == "best" else None
        with tqdm(total=len(to_draw), desc="render", unit="image", smoothing=0.05) as bar:
            for finished in pool.run(planner, self.jobs, self.requests):
                self.costs.observe(finished.batch, finished.report.spent, sizes.get(finished.batch.key.checkpoint, 0))
                self.progress.add(finished)
                self._put(finished)
                if best is not None:
                    best.done(result.key for result in finished.report.results)
                bar.update(len(finished.batch.jobs))
                bar.set_postfix(_short(self.progress.numbers()), refresh=False)
                if log is not None and time.perf_counter() - last > LOG_SECONDS:
                    log(self.progress.numbers())
                    last = time.perf_counter()
        self._score_again(pool, to_score)
        if best is not None:
            best.done(to_score)
        self.events.update(pool.events)
        if log is not None:
            log(self.progress.numbers())

    def write(self, output: str | Path, *, metric: UnifiedMetric | None = None) -> dict[str, Any]:
        """Write the tables into a folder and return the summary.

        Args:
            output: Folder.
            metric: For the reward; None: fitted on this rollout. It is saved beside the table.
        """
        output = Path(output)
        scores = {
            name: {key: v for key, v in self.store.scores(self.keys, of).items() if v is not None}
            for name, of in self.scorer_ids.items()
        }
        stored = self.store.get_many(self.keys, metadata=False)
        failures = {key: row.failure for key, row in stored.items() if row.failure is not None}
        metric = metric or fit_on(self.asked, scores, f"rollout {output}")
        if metric is not None:
            metric.save(output / "unified.json")
        images = {key: row.uri for key, row in stored.items() if row.uri is not None}
        rows = scored_rows(self.prompts, self.asked, scores=scores, images=images, failures=failures, metric=metric)
        write_scored(output / SCORED_FILE, rows, list(scores))
        if self.costs.observed:  # else those of an earlier process are better
            self.costs.save(output / "costs.json")
        summary = self._summary(rows, stored, failures)
        write_atomically(output / SUMMARY_FILE, json.dumps(summary, indent=2).encode())
        return summary

    def text(self, summary: Mapping[str, Any]) -> str:
        """The summary for people."""
        lines = [
            f"{summary['pictures']} pictures of {summary['candidates']} calls: {summary['drawn_now']} drawn now "
            f"({summary['now']['images_per_second']:.2f} a second, {summary['now']['checkpoint_loads']} loads), "
            f"{summary['failed']} failed, {summary['candidates_without_picture']} calls that can't be drawn"
        ]
        lines += [f"  {reason}: {count}" for reason, count in summary["reasons"].items()]
        return "\n".join(lines)

    def _summary(
        self, rows: Sequence[Mapping[str, Any]], stored: Mapping[str, Any], failures: Mapping[str, RenderFailure]
    ) -> dict[str, Any]:
        reasons = Counter(failure.reason for failure in failures.values())
        refused = Counter(entry.failure.reason for entry in self.asked if entry.failure is not None)
        rewards = [c["reward"] for row in rows for c in row["candidates"] if c["reward"] is not None]
        # A refused call would have had as many pictures as any other.
        asked = len(self.keys) + refused.total() * (len(self.asked[0].seeds) if self.asked else 0)
        lacking = len(self.keys) - len(stored) + len(failures)
        return {
            "prompts": len(self.prompts),
            "candidates": len(self.asked),
            "candidates_without_picture": refused.total(),
            "pictures": len(self.keys),
            "drawn_now": self.progress.drawn,
            "failed": lacking,
            "failed_share": (asked - len(self.keys) + lacking) / asked if asked else 0.0,
            "reasons": dict((reasons + refused).most_common()),
            "pictures_not_stored": self.progress.not_stored,
            "mean_reward": sum(rewards) / len(rewards) if rewards else None,
            "scorers": self.scorer_ids,
            "events": dict(self.events),
            "now": self.progress.numbers(),
        }

    def _left_over(self) -> tuple[list[str], list[str]]:
        """Keys to draw, and keys whose picture is there but lacks a score."""
        lacking: dict[str, None] = {}
        for scorer_id in self.scorer_ids.values():
            have = self.store.scores(self.keys, scorer_id)
            lacking |= dict.fromkeys(key for key in self.keys if key not in have)
        rows = self.store.get_many(lacking, metadata=False)
        drawn = {key for key, row in rows.items() if row.failure is None}
        with_picture = {key for key in drawn if rows[key].uri is not None}
        to_draw = dict.fromkeys([*self._missing, *(key for key in lacking if key in drawn - with_picture)])
        return list(to_draw), [key for key in lacking if key in with_picture and key not in to_draw]

    def _put(self, finished: Finished) -> None:
        """Store what became of a batch; its worker has written the pictures."""
        rows = []
        for index, result in zip(finished.batch.jobs, finished.report.results, strict=True):
            scores: dict[str, float | None] = {}
            if result.failure is None:
                scores = {scorer_id: result.scores.get(name) for name, scorer_id in self.scorer_ids.items()}
            metadata = picture_metadata(self.jobs[index], request_to_dict(self.requests[index]))
            written = (result.file_bytes, result.pixels or None)
            rows.append(IndexRow(result.key, result.failure, *written, result.seconds, metadata, scores))
            if result.failure is None and result.file_bytes is None and self.keep_images != "none":
                self.progress.not_stored += 1
        self.store.put_rows(rows)

    def _score_again(self, pool: Pool, keys: Sequence[str]) -> None:
        """Scores of pictures that are stored already."""
        if not keys:
            return
        left = iter(keys)
        chunks = iter(lambda: list(islice(left, SCORED_AT_ONCE)), [])
        waiting: list[list[str]] = []

        def pictures() -> Iterator[tuple[list[Any], list[str]]]:
            for chunk in chunks:
                loaded = {key: image for key in chunk if (image := self._load(key)) is not None}
                waiting.append(list(loaded))
                yield list(loaded.values()), [self.requests[self._index[key]].prompt for key in loaded]

        with tqdm(total=len(keys), desc="score", unit="image") as bar:
            for scores in pool.score(pictures()):
                chunk = waiting.pop(0)
                self.store.put_scores(
                    (key, scorer_id, of_picture.get(name))
                    for key, of_picture in zip(chunk, scores, strict=True)
                    for name, scorer_id in self.scorer_ids.items()
                )
                self.progress.rescored += len(chunk)
                bar.update(len(chunk))

    def _load(self, key: str) -> Any:
        """A stored picture; one whose file is broken is forgotten, so that it is drawn again."""
        try:
            return self.store.load(key)
        except StoreError as error:
            if error.reason not in ("missing_file", "corrupt_file"):
                raise
            logger.error("%s Run the same command again to draw it anew.", error)
            self.store.forget([key])
            return None


class _BestOf:
    """Drops the pictures of all but the best candidate of a prompt, as soon as all of them are scored."""

    def __init__(self, rollout: Rollout, missing: set[str]):
        self.rollout = rollout
        self.entries: dict[int, list[Asked]] = {}
        self.rows_of: dict[str, set[int]] = {}
        self.waiting: dict[int, set[str]] = {}
        for entry in rollout.asked:
            if entry.jobs:
                self.entries.setdefault(entry.row, []).append(entry)
            for job in entry.jobs:
                self.rows_of.setdefault(job.key, set()).add(entry.row)
                if job.key in missing:
                    self.waiting.setdefault(entry.row, set()).add(job.key)
        for row in self.entries.keys() - self.waiting.keys():  # a kill may have come before this
            self._drop(row)

    def done(self, keys: Iterable[str]) -> None:
        """Pictures that are drawn and scored."""
        for key in keys:
            for row in self.rows_of.get(key, ()):
                waiting = self.waiting.get(row)
                if waiting is None:
                    continue
                waiting.discard(key)
                if not waiting:
                    del self.waiting[row]
                    self._drop(row)

    def _drop(self, row: int) -> None:
        entries = self.entries[row]
        keys = [job.key for entry in entries for job in entry.jobs]
        value = dict.fromkeys(keys, 0.0)
        for scorer_id in self.rollout.scorer_ids.values():
            scores = {k: v for k, v in self.rollout.store.scores(keys, scorer_id).items() if v is not None}
            low, high = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
            # On the range of this prompt's pictures: those of the others may not be there yet.
            for key, score in scores.items():
                value[key] += (score - low) / (high - low) if high > low else 0.5
        best = max(entries, key=lambda entry: sum(value[job.key] for job in entry.jobs) / len(entry.jobs))
        kept = {job.key for job in best.jobs}
        self.rollout.store.drop_images(key for key in keys if key not in kept)


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _short(numbers: Mapping[str, float]) -> dict[str, str]:
    return {
        "loads": f"{numbers['checkpoint_loads']:g}",
        "hits": f"{numbers['cache_hits']:g}",
        "failed": f"{numbers['failures']:g}",
    }
