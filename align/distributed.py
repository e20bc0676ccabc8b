"""Small adjustments for running on several processes, and for trying that on a machine without GPUs."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from rollouts.candidate_files import Processes


def prepare_cpu_deepspeed(training: TrainingArguments) -> None:
    """On CPU let DeepSpeed communicate by gloo alone.

    Its shared-memory extension is compiled at first use; a run that is killed meanwhile leaves a lock behind, and every
    later run waits for it for ever. gloo gives the same losses.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" and training.deepspeed_plugin is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def without_deepspeed() -> Generator[None]:
    """Load models whole in here, although DeepSpeed is configured: under ZeRO-3 transformers would load pieces."""
    from transformers.integrations import deepspeed

    # Whoever configured it, a launcher or the options: there is no function that tells.
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured


def on_first_process(work: Callable[[], None]) -> None:
    """Do hours of work on one process while the others wait for it, without the usual time limit of a collective.

    Every process must call this. If the first one fails, the launcher ends the others.
    """
    processes = Processes.here()
    if processes.rank == 0:
        work()
    processes.wait()


def leave_process_group() -> None:
    """Wait for the other processes, then leave their group; the last thing that a training run does.

    An interpreter that ends inside of it can abort in one of the group's threads (exit code -6): the launcher then says
    that a run has failed whose results are all there.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
