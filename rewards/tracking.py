"""Weights & Biases for commands."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rewards.commandline import ConfigError

PROJECT = "t2i-align"


def check_wandb() -> None:
    """Say before long work that W&B has no key; its own error is a traceback.

    Raises:
        ConfigError: With the way out.
    """
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    import wandb

    way_out = "Run `wandb login`, set WANDB_MODE=offline, or pass `--report_to none`."
    try:
        if not wandb.login(prompt=False):
            raise ConfigError(f"W&B has no API key. {way_out}")
    except wandb.Error as error:
        raise ConfigError(f"W&B does not let us in: {error} {way_out}") from error


@contextmanager
def wandb_run(report_to: str, *, name: str | None, config: dict[str, Any], job_type: str) -> Generator[Any]:
    """A W&B run, or None if `report_to` is `none`. The project is $WANDB_PROJECT, or `t2i-align`.

    Raises:
        ConfigError: W&B has no key.
    """
    if report_to == "none":
        yield None
        return
    check_wandb()
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with wandb.init(project=project, name=name, config=config, job_type=job_type) as run:
        yield run
