"""Small adjustments for running on several processes, and for trying that on a machine without GPUs."""

import os

from transformers import TrainingArguments


def prepare_cpu_deepspeed(training: TrainingArguments) -> None:
    """On CPU let DeepSpeed communicate by gloo alone.

    Its shared-memory extension is compiled at first use; a run that is killed meanwhile leaves a lock behind, and every
    later run waits for it for ever. gloo gives the same losses.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" and training.deepspeed_plugin is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
