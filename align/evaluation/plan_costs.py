"""What agents cost: parameters, and how long they were trained (ChatGen Table 5), from the files of their runs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.run_directory import read_metrics


def agent_costs(given: Mapping[str, Any]) -> dict[str, Any]:
    """`parameters` and `training_seconds` of an agent; None where its files don't say.

    The policy's own and its model tokens' parameters and seconds are added up. A policy that was not trained for this
    (`rewrite`) has 0 seconds; who has no policy (`verbatim`) costs nothing.

    Args:
        given: `policy`, and `tokens` or `rewrite`; or `verbatim`.
    """
    files = {"policy": "*.safetensors", "tokens": "model_tokens.safetensors"}  # beside which checkpoints may lie
    folders = {Path(str(given[part])): pattern for part, pattern in reversed(files.items()) if part in given}
    # Of both stages in one run there is one folder, which counts once, with all of its files.
    seconds = [0.0 if given.get("rewrite") else training_seconds(folder) for folder in folders]
    numbers = [num_parameters(folder, pattern) for folder, pattern in folders.items()]
    return {"parameters": _sum(numbers), "training_seconds": _sum(seconds)}


def num_parameters(folder: str | Path, files: str = "*.safetensors") -> int | None:
    """Numbers in a folder's files, which are not read; None if there are none (a name on a hub, GGUF).

    Args:
        folder: Of a policy, or of model tokens.
        files: Pattern of their names.
    """
    from safetensors import safe_open

    total = 0
    paths = sorted(Path(folder).glob(files))
    for path in paths:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total if paths else None


def training_seconds(folder: str | Path) -> float | None:
    """Wall time of training, from metrics.jsonl; None if nothing is there.

    The trainer's own `train_runtime` (of the last process, if training was resumed), or for model tokens the seconds
    of their epochs, without the policy's one pass over the chats.
    """
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    runtimes = [float(line["train_runtime"]) for line in lines if "train_runtime" in line]
    if runtimes:
        return runtimes[-1]
    epochs = [float(line["seconds"]) for line in lines if "seconds" in line]
    return sum(epochs) if epochs else None


def _sum(values: Any) -> Any:
    """None if one of them is."""
    values = list(values)
    return None if None in values else sum(values)
