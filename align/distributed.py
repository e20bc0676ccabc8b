"""Small adjustments for running on several processes, and for trying that on a machine without GPUs."""

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


def prepare_cpu_deepspeed(training: TrainingArguments) -> None:
    """On CPU let DeepSpeed communicate by gloo alone.

    Its shared-memory extension is compiled at first use; a run that is killed meanwhile leaves a lock behind, and every
    later run waits for it for ever. gloo gives the same losses.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" and training.deepspeed_plugin is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def without_deepspeed(training: TrainingArguments) -> Generator[None]:
    """Load models whole in here, although DeepSpeed is configured: under ZeRO-3 transformers would load pieces."""
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(training.hf_deepspeed_config)


def on_first_process(training: TrainingArguments, done: Path, work: Callable[[], None]) -> None:
    """Do hours of work on one process while the others wait, without a collective that would time out.

    Args:
        training: Says which process this is.
        done: A file that `work` writes last, on storage that all processes see. If it is there, nothing is done.
        work: Called on the first process only.

    Raises:
        RuntimeError: On the other processes, if the first one has failed.
    """
    failed = done.with_name(done.name + ".failed")
    if training.process_index == 0:
        failed.unlink(missing_ok=True)
        if done.is_file():
            return
        try:
            work()
        except BaseException as error:
            done.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise
        return
    started = time.time()
    while not done.is_file():
        # A file of an earlier run is removed by the first process, which may be a little late.
        if failed.is_file() and time.time() - started > 30:
            raise RuntimeError(f"The first process has failed: {failed.read_text(encoding='utf-8')}")
        time.sleep(_POLL_SECONDS)
