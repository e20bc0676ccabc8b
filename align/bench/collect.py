"""What the builders have in common: demonstrations and a catalogue of callable models, collected from a community.

Records become parts, parts become rows (one for each image that demonstrates a version), versions become catalogue
entries. A run that was killed goes on where it was when started again.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.bench import assemble
from align.bench.base_lookup import look_up_bases
from align.bench.civitai_api import CivitaiClient
from align.bench.config import CollectionConfig
from align.bench.descriptions import Description, ExtractiveDescriber
from align.bench.extract import extract, read_parts
from align.bench.funnel import Funnel
from align.bench.llm_descriptions import LLMDescriber
from align.bench.sources import Opener, SourceError, open_source, source_fingerprint
from rewards.commandline import ConfigError
from rollouts.catalog import Catalog

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


# Of the parts; another number makes those of an earlier release useless.
_PARTS_VERSION = 2


@dataclass(frozen=True)
class Collection:
    """What was collected.

    Attributes:
        rows: JSON lines of `assemble.write_rows`.
        catalog: The versions that rows demonstrate, and the base checkpoints of the LoRAs among them.
        funnel: What each rule removed.
        distributions: Counts for a data card.
        described: How many descriptions came from where.
        scratch: Folder of this run; the caller removes it at the end.
    """

    rows: Path
    catalog: Catalog
    funnel: Funnel
    distributions: dict[str, Counter[str]]
    described: Counter[str]
    scratch: Path


def collect(config: CollectionConfig) -> Collection:
    """Collect demonstrations and their models; the catalogue is saved as `catalog.jsonl`.

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
    scratch = _parts_folder(work, config)
    paths = extract(_opener(config, work), config, scratch)
    if config.lookup_url is not None:
        with _client(config.lookup_url, config, work) as client:
            paths.append(look_up_bases(paths, client, config, scratch / "bases.json"))

    funnel, distributions = _merge_counts(paths)
    floor = assemble.download_floor(read_parts(paths), config.min_downloads_quantile)
    outdated = assemble.outdated_versions(read_parts(paths), config.newest_versions)
    index = assemble.index_versions(read_parts(paths), config, floor, funnel, outdated)
    spool = scratch / "rows.jsonl"
    rows = assemble.demonstrations(read_parts(paths), index, config, funnel)
    usage = assemble.write_rows(rows, spool, config)
    if not usage:
        raise SourceError(_nothing_left(config, funnel))
    catalog, described = _build_catalog(paths, usage, config, work)
    catalog.save(output / "catalog.jsonl")
    return Collection(spool, catalog, funnel, distributions, described, scratch)


def _parts_folder(work: Path, config: CollectionConfig) -> Path:
    """The folder for the parts of this source and these options; parts of others are removed."""
    options = {key: value for key, value in asdict(config).items() if key in _EXTRACT_OPTIONS}
    key = json.dumps([_PARTS_VERSION, source_fingerprint(config.source), options], sort_keys=True)
    folder = work / f"parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    for stale in work.glob("parts-*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _client(base_url: str, config: CollectionConfig, work: Path) -> CivitaiClient:
    try:
        return CivitaiClient(base_url, cache_dir=work / "api-pages", token=os.environ.get(config.api_token_env))
    except ValueError as error:
        raise ConfigError(
            f"`source` or `lookup_url` {base_url} with the token in {config.api_token_env}: {error}"
        ) from error


def _opener(config: CollectionConfig, work: Path) -> Opener:
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


def _nothing_left(config: CollectionConfig, funnel: Funnel) -> str:
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
    paths: list[Path], usage: dict[int, assemble.Usage], config: CollectionConfig, work: Path
) -> tuple[Catalog, Counter[str]]:
    drafts = list(assemble.catalogue_drafts(read_parts(paths), assemble.catalogue_versions(usage)))
    names = assemble.unique_names(drafts)
    cards = (assemble.model_card(d, names[d["version_id"]], usage.get(d["version_id"])) for d in drafts)
    entries, sources = [], Counter[str]()
    for draft, description in zip(drafts, _describe(cards, config, work), strict=True):
        entries.append(assemble.catalogue_entry(draft, names, usage.get(draft["version_id"]), description))
        sources[description.source] += 1
    return Catalog(sorted(entries, key=lambda entry: entry.version_id)), sources


def _describe(cards: Iterator[Any], config: CollectionConfig, work: Path) -> Iterator[Description]:
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
