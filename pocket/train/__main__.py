"""Train every weight of the pocket world from nothing, stage by stage; a killed run goes on where it was.

    python -m pocket.train --output runs/pocket
    python -m pocket.train --output runs/pocket --stages adapters/pencil_box hps --publish ""

About four hours of one CPU core in all; stages that don't need each other can run side by side. What a stage reached is
in `<stage>/done.json`, its losses in `<stage>/metrics.jsonl`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rewards.commandline import ConfigError, run_command

logger = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """Options of `python -m pocket.train`."""

    output: str = field(default="runs/pocket", metadata={"help": "Folder of all stages."})
    stages: list[str] = field(
        default_factory=list, metadata={"help": "Some stages, in this order; none: all that are not finished."}
    )
    num_threads: int = field(default=1, metadata={"help": "Of torch."})
    publish: str = field(
        default="", metadata={"help": "Afterwards write what is shipped to this folder, such as pocket/weights."}
    )


def main(config: TrainConfig) -> None:
    """Train what is not finished."""
    import torch

    from pocket.train.fitting import finished
    from pocket.train.publishing import publish
    from pocket.train.stages import Stages

    torch.set_num_threads(config.num_threads)
    stages = Stages(Path(config.output))
    if unknown := [name for name in config.stages if name not in stages.names()]:
        raise ConfigError(f"`stages`: there is no {unknown[0]}; there are {', '.join(stages.names())}.")
    for name in config.stages or stages.names():
        if finished(stages.folder / name):
            logger.info("%s: finished before", name)
            continue
        stages.train(name)
    if config.publish:
        index = publish(stages.folder, Path(config.publish))
        logger.info("%s: %.1f MB", config.publish, index["bytes"] / 1e6)


if __name__ == "__main__":
    run_command(main, TrainConfig, errors=(OSError,))
