"""Build DABench: instruction-call pairs and a catalogue of callable models from Civitai records (DiffAgent Sec. 3.1).

    python -m align.bench.dabench --source models.jsonl.gz --output data/dabench
    python -m align.bench.dabench --source https://civitai.com/api/v1 --output data/dabench --api_max_models 1000

Writes `catalog.jsonl`, one `datasets.DatasetDict` per architecture (`sd15/`, `sdxl/`; splits sft, rrhf, eval),
`funnel.json`, `config.yaml` and a data card. A build that was killed goes on where it was when started again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.bench import assemble
from align.bench.base_lookup import look_up_bases
from align.bench.cached_http import RequestError
from align.bench.civitai_api import CivitaiClient
from align.bench.config import DABenchConfig
from align.bench.datacard import draw_distributions, row_distributions, write_data_card
from align.bench.descriptions import Description, ExtractiveDescriber
from align.bench.extract import extract, read_parts
from align.bench.funnel import Funnel
from align.bench.llm_descriptions import LLMDescriber, LLMEndpointError
from align.bench.sources import Opener, SourceError, open_source, source_fingerprint
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.api import ARCHITECTURES
from rollouts.catalog import Catalog

logger = logging.getLogger(__name__)

SPLITS = ("sft", "rrhf", "eval")
# Options of the stages that read records; a change of any other leaves the parts of an earlier run usable.
_EXTRACT_OPTIONS = (
    "types",
    "base_models",
    "exclude_real_persons",
    "keep_attention",
    "allow_image_to_image",
    "max_prompt_chars",
    "records_per_part",
    "api_max_models",
    "api_images_per_version",
)


def build(config: DABenchConfig) -> dict[str, Any]:
    """Run all steps; returns the summary that is also in `funnel.json`.

    Raises:
        SourceError: If the source can't be read, or nothing in it can become a row.
        ConfigError: If an option can't be used: `output` is a file, a token holds characters no token has, ...
        RequestError: If the live API fails for good. What it answered is kept; a restart goes on there.
        LLMEndpointError: Likewise for the endpoint of the descriptions.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`output` {output} is a file; name a folder, which may not exist yet.")
    work = output / ".work"
    parts_folder = _parts_folder(work, config)
    paths = extract(_opener(config, work), config, parts_folder)
    if config.lookup_url is not None:
        with _client(config.lookup_url, config, work) as client:
            paths.append(look_up_bases(paths, client, config, parts_folder / "bases.json"))

    funnel, distributions = _merge_counts(paths)
    floor = assemble.download_floor(read_parts(paths), config.min_downloads_quantile)
    index = assemble.index_versions(read_parts(paths), config, floor, funnel)
    spool = parts_folder / "rows.jsonl"
    rows = assemble.demonstrations(read_parts(paths), index, config, funnel)
    usage = assemble.write_rows(rows, spool, config)
    if not usage:
        raise SourceError(_nothing_left(config, funnel))

    catalog, described = _build_catalog(paths, usage, config, work)
    catalog.save(output / "catalog.jsonl")
    summary = _write_data_sets(spool, catalog, config, output, parts_folder)
    summary |= {"catalog": len(catalog), "descriptions": dict(described)}

    distributions |= row_distributions(assemble.read_rows(spool))
    if config.plots:
        draw_distributions(distributions, output / "figures" / "distributions.png")
    report = {"summary": summary, "funnel": funnel.to_dict(), "distributions": distributions}
    write_atomically(output / "funnel.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    save_config(output / "config.yaml", config)
    write_data_card(output, config, funnel, summary, config.plots)
    shutil.rmtree(parts_folder)
    return summary


def _parts_folder(work: Path, config: DABenchConfig) -> Path:
    """The folder for the parts of this source and these options; parts of others are removed."""
    options = {key: value for key, value in asdict(config).items() if key in _EXTRACT_OPTIONS}
    key = json.dumps([source_fingerprint(config.source), options], sort_keys=True)
    folder = work / f"parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    for stale in work.glob("parts-*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _client(base_url: str, config: DABenchConfig, work: Path) -> CivitaiClient:
    try:
        return CivitaiClient(base_url, cache_dir=work / "api-pages", token=os.environ.get(config.api_token_env))
    except ValueError as error:
        raise ConfigError(
            f"`source` or `lookup_url` {base_url} with the token in {config.api_token_env}: {error}"
        ) from error


def _opener(config: DABenchConfig, work: Path) -> Opener:
    def api(base_url: str) -> Iterator[dict[str, Any]]:
        with _client(base_url, config, work) as client:
            yield from client.iter_models(
                base_models=config.base_models,
                types=["LORA" if name == "LoRA" else name for name in config.types],
                max_models=config.api_max_models,
                with_images=True,
                images_per_version=config.api_images_per_version,
            )

    return open_source(config.source, api)


def _merge_counts(paths: list[Path]) -> tuple[Funnel, dict[str, Counter[str]]]:
    funnel = Funnel()
    distributions: dict[str, Counter[str]] = {}
    for part in read_parts(paths):
        funnel.merge(Funnel.from_dict(part["funnel"]))
        for name, counts in part["distributions"].items():
            distributions.setdefault(name, Counter()).update(counts)
    return funnel, distributions


def _nothing_left(config: DABenchConfig, funnel: Funnel) -> str:
    if not funnel.stages:
        return f"`source` {config.source} holds no records."
    # The first kind of thing of which none is left; the stages are in this order.
    for stage in ("models", "versions", "images"):
        if stage not in funnel.stages:
            return f"Nothing in {config.source} can become a row: its models have no {stage}."
        if not funnel.stages[stage].left:
            break
    removed = funnel.stages[stage].removed
    worst = max(removed, key=lambda rule: removed[rule])
    example = next(iter(funnel.stages[stage].examples.get(worst, [])), "")
    return (
        f"Nothing in {config.source} can become a row: of {funnel.stages[stage].entered} {stage} all were removed, "
        f"most by `{worst}` ({removed[worst]}), e.g. {example}"
    )


def _build_catalog(
    paths: list[Path], usage: dict[int, assemble.Usage], config: DABenchConfig, work: Path
) -> tuple[Catalog, Counter[str]]:
    drafts = list(assemble.catalogue_drafts(read_parts(paths), assemble.catalogue_versions(usage)))
    names = assemble.unique_names(drafts)
    cards = (assemble.model_card(d, names[d["version_id"]], usage.get(d["version_id"])) for d in drafts)
    entries, sources = [], Counter[str]()
    for draft, description in zip(drafts, _describe(cards, config, work), strict=True):
        entries.append(assemble.catalogue_entry(draft, names, usage.get(draft["version_id"]), description))
        sources[description.source] += 1
    return Catalog(sorted(entries, key=lambda entry: entry.version_id)), sources


def _describe(cards: Iterator[Any], config: DABenchConfig, work: Path) -> Iterator[Description]:
    if config.llm_base_url is None or config.llm_model is None:
        return iter(ExtractiveDescriber(max_chars=config.description_max_chars).describe(cards))
    try:
        describer = LLMDescriber(
            config.llm_base_url,
            config.llm_model,
            api_key=os.environ.get(config.llm_api_key_env),
            cache_path=work / "descriptions.sqlite",
            concurrency=config.llm_concurrency,
            max_chars=config.description_max_chars,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return iter(describer.describe(cards))


def _write_data_sets(
    spool: Path, catalog: Catalog, config: DABenchConfig, output: Path, scratch: Path
) -> dict[str, Any]:
    """One DatasetDict per architecture, each put in place by a rename."""
    splits = assemble.split_rows(spool, catalog, config)
    # Left by a build that was killed, perhaps one with other options: `datasets` would take it for this one's.
    shutil.rmtree(scratch / "datasets-cache", ignore_errors=True)
    architectures = {}
    for name in ARCHITECTURES:  # also those out of scope: an earlier build may have left theirs
        folder = output / ARCHITECTURES[name].slug
        counts = _write_architecture(name, spool, catalog, splits, folder, scratch)
        if counts is not None:
            architectures[name] = counts
    return {"architectures": architectures}


def _write_architecture(
    base_model: str, spool: Path, catalog: Catalog, splits: dict[str, str], folder: Path, scratch: Path
) -> dict[str, Any] | None:
    import datasets

    counts: Counter[str] = Counter()
    files = {name: scratch / f"{folder.name}-{name}.jsonl" for name in SPLITS}
    handles = {name: path.open("w", encoding="utf-8") for name, path in files.items()}
    for row in assemble.read_rows(spool):
        entry = catalog.by_version(row["version_id"])
        if entry is None or entry.base_model != base_model:
            continue
        split = splits[assemble.row_id(row)]
        counts[split] += 1
        handles[split].write(json.dumps(assemble.dabench_row(row, entry, split), ensure_ascii=False) + "\n")
    for handle in handles.values():
        handle.close()
    if not counts:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    cache = str(scratch / "datasets-cache")
    data = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_generator(
                assemble.read_rows,
                features=row_features(),
                gen_kwargs={"path": path},
                cache_dir=cache,
                split=datasets.NamedSplit(name),
            )
            for name, path in files.items()
        }
    )
    temporary = scratch / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    data.save_to_disk(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    versions = {row["api"]["model"] for name in SPLITS for row in assemble.read_rows(files[name])}
    return {"rows": counts.total(), "splits": {n: counts[n] for n in SPLITS}, "versions": len(versions)}


def row_features() -> Any:
    """The Arrow schema of a DABench row."""
    from datasets import Features, Value

    text, integer, number = Value("string"), Value("int64"), Value("float64")
    return Features(
        {
            "id": text,
            "instruction": {"prompt": text, "negative prompt": text},
            "api": {
                "model": text,
                "type": text,
                "base Model": text,
                "width": integer,
                "height": integer,
                "sampling method": text,
                "sampling steps": integer,
                "cfg scale": number,
                "model description": text,
            },
            "base_model": text,
            "split": text,
            "source": {
                "model_id": integer,
                "version_id": integer,
                "image_id": text,
                "gallery_version_id": integer,
                "base_version_id": integer,
                "lora_weight": number,
                "description": text,
            },
        }
    )


def main(config: DABenchConfig) -> None:
    """Build and say what came out."""
    try:
        summary = build(config)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"`output` {config.output} can't be written: {error}") from error
    for name, values in summary["architectures"].items():
        logger.info("%s: %s rows %s, %d versions", name, f"{values['rows']:,}", values["splits"], values["versions"])
    logger.info("%s callable versions; see %s", f"{summary['catalog']:,}", Path(config.output) / "README.md")


if __name__ == "__main__":
    run_command(main, DABenchConfig, errors=(SourceError, RequestError, LLMEndpointError))
