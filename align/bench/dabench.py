"""Build DABench: instruction-call pairs and a catalogue of callable models from Civitai records (DiffAgent Sec. 3.1).

    python -m align.bench.dabench --source models.jsonl.gz --output data/dabench
    python -m align.bench.dabench --source https://civitai.com/api/v1 --output data/dabench --api_max_models 1000

Writes `catalog.jsonl`, one `datasets.DatasetDict` per architecture (`sd15/`, `sdxl/`; splits sft, rrhf, eval),
`funnel.json`, `config.yaml` and a data card. A build that was killed goes on where it was when started again.
"""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from align.bench import assemble
from align.bench.cached_http import RequestError
from align.bench.collect import collect
from align.bench.config import DABenchConfig
from align.bench.datacard import draw_distributions, row_distributions, write_data_card
from align.bench.llm_client import LLMEndpointError
from align.bench.sources import SourceError
from rewards.commandline import ConfigError, run_command, save_config
from rewards.files import write_atomically
from rollouts.api import ARCHITECTURES
from rollouts.catalog import Catalog

logger = logging.getLogger(__name__)

SPLITS = ("sft", "rrhf", "eval")


def build(config: DABenchConfig) -> dict[str, Any]:
    """Run all steps; returns the summary that is also in `funnel.json`.

    Raises:
        SourceError, ConfigError, RequestError, LLMEndpointError: See `collect`.
    """
    found = collect(config)
    output, scratch = Path(config.output), found.scratch
    summary = _write_data_sets(found.rows, found.catalog, config, output, scratch)
    summary |= {"catalog": len(found.catalog), "descriptions": dict(found.described)}

    distributions = found.distributions | row_distributions(assemble.read_rows(found.rows))
    if config.plots:
        draw_distributions(distributions, output / "figures" / "distributions.png")
    report = {"summary": summary, "funnel": found.funnel.to_dict(), "distributions": distributions}
    write_atomically(output / "funnel.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    save_config(output / "config.yaml", config)
    write_data_card(output, config, found.funnel, summary, config.plots)
    shutil.rmtree(scratch)
    return summary


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
