"""Turn an official checkpoint into safetensors with its configuration beside it.

    python -m rewards.convert --scorer image_reward --checkpoint ImageReward.pt --output weights/image_reward
    python -m rewards.score --scorer image_reward --checkpoint weights/image_reward …

Weights that are unpickled are checked on the way: tensors only, every key where the model has it, no NaN. The folder
loads faster, needs no `config` argument, and can be given to people who don't open pickles.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    find_checkpoint,
    load_state_dict,
    read_config,
)
from rewards.commandline import ConfigError, run_command
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ConvertConfig:
    """Options of `python -m rewards.convert`."""

    scorer: str = field(metadata={"help": "image_reward, hps_v2, clip_score."})
    checkpoint: str = field(metadata={"help": "Weights: local file, or `org/repo/file@revision` on the Hub."})
    output: str = field(metadata={"help": "Folder to write."})
    model_config: str | None = field(default=None, metadata={"help": "JSON file of the model's sizes; none: official."})
    tokenizer: str | None = field(default=None, metadata={"help": "image_reward: folder whose vocab.txt is copied."})
    dtype: str = field(default="float32", metadata={"help": "Precision on disk: float32, bfloat16 or float16."})

    def __post_init__(self):
        if self.scorer not in ("image_reward", "hps_v2", "clip_score"):
            raise ValueError(f"`scorer` must be image_reward, hps_v2 or clip_score, but got {self.scorer!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but got {self.dtype!r}.")


def main(config: ConvertConfig) -> None:
    """Check, convert and write the weights."""
    import torch
    from safetensors.torch import save

    vocabulary = Path(config.tokenizer) / "vocab.txt" if config.tokenizer else None
    if vocabulary and not vocabulary.is_file():
        raise ConfigError(f"`tokenizer`: {config.tokenizer} has no vocab.txt.")
    source = find_checkpoint(config.checkpoint)
    sizes = _sizes(config)
    state = load_state_dict(source.path)
    _check(config.scorer, sizes, state, source.path)
    dtype = getattr(torch, config.dtype)
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous() for name, value in state.items()
    }
    output = Path(config.output)
    settings = {
        "scorer": config.scorer,
        "config": sizes,
        "dtype": config.dtype,
        "converted_from": {"checkpoint": Path(config.checkpoint).name, "revision": source.revision,
                           "sha256": source.sha256},
    }  # fmt: skip
    write_atomically(output / WEIGHTS_FILE, save(state, metadata={"format": "pt"}))
    if vocabulary:
        shutil.copyfile(vocabulary, output / "vocab.txt")
    write_atomically(output / CONFIG_FILE, json.dumps(settings, indent=2).encode())  # last: it says all is there
    logger.info("%s: %d tensors from %s", output, len(state), source.path)


def _sizes(config: ConvertConfig) -> Any:
    if config.scorer == "image_reward":
        from rewards.image_reward import official_config

        return read_config(config.model_config, official_config())
    from rewards import clip_score, hps
    from rewards.open_clip_towers import open_clip_config

    official = hps.ARCHITECTURE if config.scorer == "hps_v2" else clip_score.ARCHITECTURE
    return open_clip_config(config.model_config or official)


def _check(scorer: str, sizes: Any, state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError if the weights don't fit the model."""
    if scorer == "image_reward":
        from rewards.image_reward import build_model

        build_model(sizes, state, path)
    else:
        from rewards.open_clip_towers import build_model as build_open_clip

        build_open_clip(sizes, state, path)


if __name__ == "__main__":
    run_command(main, ConvertConfig, errors=(CheckpointError, OSError))
