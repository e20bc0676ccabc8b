"""The steps of the ChatGenBench builder (ChatGen Sec. 3.1)."""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align.bench.chatgen.agreement import apply_decisions
from align.bench.chatgen.config import ChatGenBenchConfig
from align.bench.chatgen.demonstrations import (
    NeighbourReferences,
    read_demonstrations,
    settings_by_model,
    unlike_others,
)
from align.bench.chatgen.distinct import most_distinct
from align.bench.chatgen.llm_player import LLMPlayer
from align.bench.chatgen.planning import plan_chats, retry_task
from align.bench.chatgen.prompt_wording import PromptWording
from align.bench.chatgen.references import download, from_folder, picture_path
from align.bench.chatgen.review_store import load_decisions
from align.bench.chatgen.role_play import RolePlayReport, write_chats
from align.bench.chatgen.rows import chat_row, read_jsonl, save_rows, write_jsonl
from align.bench.chatgen.schema import Demonstration, RolePlayer, chat_text
from align.bench.chatgen.screening import ColloquialismCheck, Judge, length_problem
from align.bench.chatgen.template_player import TemplatePlayer, Wording
from align.bench.collect import collect
from align.bench.datacard import draw_distributions
from align.bench.funnel import Funnel
from align.evaluation.bert_score import BertScorer
from rewards.commandline import ConfigError, save_config
from rewards.files import write_atomically
from rollouts.catalog import Catalog
from rollouts.requests import RenderSettings

logger = logging.getLogger(__name__)

# Demonstrations whose chats are written together, and what a kill can lose: enough to keep the players busy.
BLOCK = 500
MAX_BASELINE_TEXTS = 4000
IMAGE_HOSTS = ("image.civitai.com", "imagecache.civitai.com")
_CHAT_OPTIONS = (
    "chats_per_demonstration",
    "shares",
    "generators",
    "max_attempts",
    "duplicate_f1",
    "references",
    "seed",
)
_CHAT_OPTIONS += ("encoder", "encoder_layer", "rescale")


@dataclass
class Summary:
    """What was built; `funnel.json` holds it.

    Attributes:
        demonstrations: By split.
        models: By setting.
        chats: What became of the role-play.
        rows: By split (`test_init` before screening) and input type; of the test split also by setting.
        generators: Rows by who wrote them.
        screened: Test rows that each screen removed.
        reviewed: What the reviewers' decisions did.
        costs: Of each language model.
        pictures: Why pictures are missing.
    """

    demonstrations: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    chats: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    generators: dict[str, int] = field(default_factory=dict)
    screened: dict[str, int] = field(default_factory=dict)
    reviewed: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)


def build(
    config: ChatGenBenchConfig, *, wording: Wording | None = None, image_hosts: Sequence[str] = IMAGE_HOSTS
) -> Summary:
    """Build the data set; see `align.bench.chatgen`.

    Args:
        config: Options.
        wording: How prompts are put into everyday words, for chats by template and for what histories ask first.
        image_hosts: Hosts that pictures may be downloaded from.

    Raises:
        SourceError, ConfigError, RequestError: See `align.bench.collect.collect`.
        LLMEndpointError: A language model can't be asked.
        BudgetError: The language models would cost more than `budget`.
    """
    output, summary = Path(config.output), Summary()
    found = collect(config)
    funnel, scratch = found.funnel, found.scratch
    demonstrations = read_demonstrations(found.rows, found.catalog)
    demonstrations = _with_pictures(demonstrations, config, image_hosts, summary)
    scorer = load_scorer(config, [item.prompt for item in demonstrations])
    work = output / ".work" / "role_play"
    work.mkdir(parents=True, exist_ok=True)
    splits, nearest = split_demonstrations(demonstrations, config, scorer, work)
    write_jsonl(
        output / "demonstrations.jsonl",
        (asdict(item) | {"split": splits[item.id], "nearest_f1": nearest[item.id]} for item in demonstrations),
    )

    wording = wording or PromptWording()
    files = _write_chats(demonstrations, splits, config, wording, scorer, work, summary)
    rows = {split: list(read_jsonl(path)) for split, path in files.items()}
    if config.references == "render":
        rows = _with_drawn_references(rows, demonstrations, found.catalog, config, summary)
    summary.rows["test_init"] = _by_type(rows["test"])
    rows["test"] = screen(rows["test"], config, output / ".work", funnel, summary)
    write_jsonl(output / "review" / "queue.jsonl", rows["test"])
    rows["test"] = _reviewed(rows["test"], config, funnel, summary)
    _divide(rows, demonstrations, splits, config, summary)

    for split, path in files.items():
        write_jsonl(path, rows[split])
    save_rows(files, output / "chats", scratch)
    _report(output, config, rows, found.distributions, funnel, summary)
    shutil.rmtree(scratch)
    return summary


def load_scorer(config: ChatGenBenchConfig, prompts: Sequence[str]) -> BertScorer:
    """BERTScore with the configured encoder; its baseline is that of unrelated prompts of this source."""
    scorer = BertScorer.from_pretrained(config.encoder, layer=config.encoder_layer)
    if config.rescale and len(distinct := list(dict.fromkeys(prompts))) >= 2:
        # A fixed choice that does not depend on the order of the records.
        some = sorted(distinct, key=lambda text: hashlib.sha256(text.encode(errors="replace")).digest())
        scorer.baseline = scorer.fit_baseline(some[:MAX_BASELINE_TEXTS], seed=0)
    return scorer


def split_demonstrations(
    demonstrations: Sequence[Demonstration], config: ChatGenBenchConfig, scorer: BertScorer, work: Path
) -> tuple[dict[str, str], dict[str, float | None]]:
    """`train` or `test` for each demonstration's id, and its BERTScore F1 to the nearest other one of its model.

    Whole demonstrations are divided, so that no target is on both sides.
    """
    prompts = [item.prompt for item in demonstrations]
    models = [item.model for item in demonstrations]
    ids = [item.id for item in demonstrations]
    options = [config.encoder, config.encoder_layer, config.rescale, config.test_share, config.near_duplicate]
    path = work / f"split-{_key(options, ids, prompts, models)}.json"
    if not path.is_file():
        selected, nearest = [False] * len(ids), [None] * len(ids)
        if config.test_share > 0:
            eligible = unlike_others(prompts, config.near_duplicate)
            selected, nearest, _ = most_distinct(prompts, models, config.test_share, scorer, eligible=eligible)
        sides = ["test" if chosen else "train" for chosen in selected]
        write_atomically(path, json.dumps([sides, nearest]).encode())
    sides, nearest = json.loads(path.read_bytes())
    return dict(zip(ids, sides, strict=True)), dict(zip(ids, nearest, strict=True))


def screen(
    rows: list[dict[str, Any]], config: ChatGenBenchConfig, work: Path, funnel: Funnel, summary: Summary
) -> list[dict[str, Any]]:
    """The test rows that pass the screens; what the others broke is counted."""
    funnel.enter("test chats", len(rows))
    problems: dict[str, str] = {}
    for row in rows:
        if problem := length_problem(row["messages"], config.max_words, config.max_turns):
            problems[row["id"]] = problem
    if config.spacy_pipeline is not None:
        left = [row for row in rows if row["id"] not in problems]
        texts = [
            (row["id"], chat_text([entry])) for row in left for entry in row["messages"] if entry["role"] == "user"
        ]
        check = ColloquialismCheck(config.spacy_pipeline)
        for (name, _), problem in zip(texts, check.problems(text for _, text in texts), strict=True):
            if problem is not None:
                problems.setdefault(name, problem)
    judge = config.parsed_judge()
    if judge is not None:
        left = [row for row in rows if row["id"] not in problems]
        judgements = Judge(judge, work / "answers.sqlite").judge(left)
        for row, judgement in zip(left, judgements, strict=True):
            worst = judgement.worst()
            if worst is None:
                summary.screened["not_judged"] = summary.screened.get("not_judged", 0) + 1
            elif worst < config.judge_min:
                problems[row["id"]] = "judged"
    for row in rows:
        if problem := problems.get(row["id"]):
            funnel.remove("test chats", problem, f"{row['id']}: {chat_text(row['messages'])[:80]!r}")
            summary.screened[problem] = summary.screened.get(problem, 0) + 1
    return [row for row in rows if row["id"] not in problems]


def _with_pictures(
    demonstrations: list[Demonstration], config: ChatGenBenchConfig, hosts: Sequence[str], summary: Summary
) -> list[Demonstration]:
    if config.references == "folder":
        assert config.images is not None  # the configuration saw to it
        return from_folder(demonstrations, Path(config.images), Path(config.output) / "images")
    if config.references == "download":
        demonstrations, problems = download(demonstrations, Path(config.output) / "images", hosts)
        summary.pictures = dict(problems)
        return demonstrations
    if config.references == "render":
        folder = Path(config.output) / "images"
        return [replace(item, image=str(picture_path(item, folder))) for item in demonstrations]
    if config.references == "none":
        return [replace(item, image=None) for item in demonstrations]
    return demonstrations


def _with_drawn_references(
    rows: dict[str, list[dict[str, Any]]],
    demonstrations: Sequence[Demonstration],
    catalog: Catalog,
    config: ChatGenBenchConfig,
    summary: Summary,
) -> dict[str, list[dict[str, Any]]]:
    """The rows whose reference could be drawn, and those without one."""
    from align.bench.chatgen.rendered_references import draw

    assert config.weights is not None  # the configuration saw to it
    output = Path(config.output)
    pointed_to = {row["source"]["reference"]["image"] for part in rows.values() for row in part if _reference(row)}
    wanted = [item for item in demonstrations if f"images/{picture_path(item, output).name}" in pointed_to]
    on_gpu = torch.cuda.is_available()
    settings = RenderSettings(
        dtype="float16" if on_gpu else "float32", device_type="cuda" if on_gpu else "cpu",
        native_side=config.native_side,
    )  # fmt: skip
    problems = draw(wanted, catalog, Path(config.weights), output / "images", settings)
    summary.pictures = dict(Counter(problems.values()))
    missing = {f"images/{picture_path(item, output).name}" for item in wanted if item.id in problems}
    return {
        split: [row for row in part if not _reference(row) or row["source"]["reference"]["image"] not in missing]
        for split, part in rows.items()
    }


def _reference(row: dict[str, Any]) -> Any:
    return row["source"]["reference"]


def _write_chats(
    demonstrations: Sequence[Demonstration],
    splits: dict[str, str],
    config: ChatGenBenchConfig,
    wording: Wording,
    scorer: BertScorer,
    work: Path,
    summary: Summary,
) -> dict[str, Path]:
    """Chats of each split as JSON lines, block by block.

    Blocks stay when the build is done: the next one, which applies what reviewers decided, need not write them again.
    """
    output = Path(config.output)
    player = _player(config, wording, output)
    references = NeighbourReferences(demonstrations, splits)
    options = {name: value for name, value in asdict(config).items() if name in _CHAT_OPTIONS}
    report, parts = RolePlayReport(), []
    for start in tqdm(range(0, len(demonstrations), BLOCK), desc="role-play", unit="block", disable=None):
        block = demonstrations[start : start + BLOCK]
        own = [asdict(item) | {"split": splits[item.id]} for item in block]
        # What references a block gets depends on the other demonstrations of its models.
        path = work / f"chats-{_key(options, own, references.fingerprint(block))}.json"
        if not path.is_file():
            tasks = plan_chats(
                block,
                seed=config.seed,
                per_demonstration=config.chats_per_demonstration,
                shares=config.input_shares(),
                wording=wording,
                references=references,
            )
            chats, own_report = write_chats(
                list(tasks), player, scorer, partial(retry_task, seed=config.seed, wording=wording),
                duplicate_f1=config.duplicate_f1, max_attempts=config.max_attempts,
            )  # fmt: skip
            rows = [chat_row(chat, splits[chat.task.demonstration.id], output) for chat in chats]
            write_atomically(path, json.dumps({"rows": rows, "report": own_report.to_dict()}).encode())
        part = json.loads(path.read_bytes())
        report.add(part["report"])
        parts.append(path)
    summary.chats = report.to_dict()
    for stale in set(work.glob("chats-*.json")) - set(parts):  # of other options
        stale.unlink()
    if isinstance(player, LLMPlayer):
        summary.costs = {name: asdict(usage) for name, usage in player.usage.items()}
    files = {split: work / f"{split}.jsonl" for split in ("train", "test")}
    for split, path in files.items():
        write_jsonl(path, (r for part in parts for r in json.loads(part.read_bytes())["rows"] if r["split"] == split))
    return files


def _player(config: ChatGenBenchConfig, wording: Wording, output: Path) -> RolePlayer:
    generators = config.parsed_generators()
    if not generators:
        return TemplatePlayer(wording, config.seed)
    try:
        cache = output / ".work" / "answers.sqlite"
        return LLMPlayer(generators, cache, seed=config.seed, budget=config.budget, image_root=output)
    except ValueError as error:
        raise ConfigError(f"`generators`: {error}") from error


def _reviewed(
    rows: list[dict[str, Any]], config: ChatGenBenchConfig, funnel: Funnel, summary: Summary
) -> list[dict[str, Any]]:
    if config.decisions is None:
        return rows
    decisions = load_decisions(config.decisions)
    kept, counts = apply_decisions(rows, decisions, reviews=config.reviews, unreviewed=config.unreviewed)
    summary.reviewed = counts
    left = {row["id"] for row in kept}
    for row in rows:
        if row["id"] not in left:
            funnel.remove("test chats", "review", f"{row['id']}: {chat_text(row['messages'])[:80]!r}")
    return kept


def _divide(
    rows: dict[str, list[dict[str, Any]]],
    demonstrations: Sequence[Demonstration],
    splits: dict[str, str],
    config: ChatGenBenchConfig,
    summary: Summary,
) -> None:
    """Give every row its setting, and count (ChatGen Table 3)."""
    trained = {row["source"]["demonstration"] for row in rows["train"]}
    models = {item.model for item in demonstrations}
    settings = settings_by_model(models, (i for i in demonstrations if i.id in trained), config.few_shot_below)
    for row in (*rows["train"], *rows["test"]):
        row["setting"] = settings[row["model"]]
    summary.demonstrations = dict(Counter(splits.values()))
    summary.models = dict(Counter(settings.values()))
    summary.rows |= {split: _by_type(rows[split]) for split in rows}
    for setting in ("supervised", "few_shot"):
        summary.rows[setting] = _by_type([row for row in rows["test"] if row["setting"] == setting])
    summary.generators = dict(Counter(row["generator"] for row in (*rows["train"], *rows["test"])))


def _by_type(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["input_type"] for row in rows))


def _report(
    output: Path,
    config: ChatGenBenchConfig,
    rows: dict[str, list[dict[str, Any]]],
    distributions: dict[str, Counter[str]],
    funnel: Funnel,
    summary: Summary,
) -> None:
    from align.bench.chatgen.card import PLOTS, row_distributions, write_card

    counts = distributions | row_distributions([*rows["train"], *rows["test"]])
    if config.plots:
        draw_distributions(counts, output / "figures" / "distributions.png", PLOTS)
    report = {"summary": asdict(summary), "funnel": funnel.to_dict(), "distributions": counts}
    write_atomically(output / "funnel.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    save_config(output / "config.yaml", config)
    write_card(output, config, funnel, summary)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
