"""What each method draws for the same prompts: a picture from the tables of `align.evaluation.diffagent`.

    python -m pocket.choices --tables runs/demo/tables --output choices.png

One drawn prompt of DABench for each style, the first by id, whatever came out; the first picture of each call.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from align.evaluation.comparison import NOBODY
from pocket.contact_sheet import Cell, contact_sheet
from pocket.drawing import STYLES
from rewards.commandline import ConfigError, run_command

logger = logging.getLogger(__name__)


@dataclass
class ChoicesConfig:
    """Options of `python -m pocket.choices`."""

    tables: str = field(metadata={"help": "Folder of `align.evaluation.diffagent`."})
    output: str = field(metadata={"help": "The .png file to write."})
    methods: list[str] = field(
        default_factory=lambda: ["most popular model", "Baseline", "SFT", "RRHF"], metadata={"help": "Rows."}
    )
    prompts_per_style: int = field(default=1, metadata={"help": "Columns of each style."})
    scale: int = field(default=2, metadata={"help": "Pixels of the sheet per pixel of a picture."})


def main(config: ChoicesConfig) -> None:
    """Write the sheet."""
    import pyarrow.parquet as pq

    path = Path(config.tables) / "per_prompt.parquet"
    if not path.is_file():
        raise ConfigError(f"There is no {path}; make it with python -m align.evaluation.diffagent.")
    rows = [row for row in pq.read_table(path).to_pylist() if row["prompt_set"] == "DABench"]
    rows = [row for row in rows if row["drawn_from"] != NOBODY]
    by_key = {(row["method"], row["prompt_id"]): row for row in rows}
    known = {row["method"] for row in rows}
    if unknown := [method for method in config.methods if method not in known]:
        raise ConfigError(f"`methods`: {unknown} are not in {path}, which has {sorted(known)}.")
    prompts = dict(sorted({row["prompt_id"]: row["prompt"] for row in rows}.items()))
    chosen = [key for style in STYLES for key in _of_style(prompts, style)[: config.prompts_per_style]]
    if not chosen:
        raise ConfigError(f"{path} has no prompt of DABench that names a style of the pocket world.")
    cells = [[_picture(by_key[method, key]) for key in chosen] for method in config.methods]
    sheet = contact_sheet(cells, config.methods, [prompts[key] for key in chosen], scale=config.scale)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(config.output)
    logger.info("%s: %d prompts, %d methods", config.output, len(chosen), len(config.methods))


def _of_style(prompts: dict[str, str], style: str) -> list[str]:
    return [key for key, prompt in prompts.items() if STYLES[style] in prompt]


def _picture(row: dict[str, Any]) -> Cell:
    uri = row["images"][0] if row["images"] else None
    if uri is None or not Path(uri).is_file():
        return "no picture"
    with Image.open(uri) as picture:
        return picture.convert("RGB")


if __name__ == "__main__":
    run_command(main, ChoicesConfig, errors=(OSError,))
