"""Weights from a file or the Hugging Face Hub: nothing is unpickled, and every key has to fit."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

CONFIG_FILE = "scorer.json"
WEIGHTS_FILE = "model.safetensors"
OPEN_CLIP_WEIGHTS_FILE = "open_clip_model.safetensors"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?@(?P<revision>[\w./-]+)")


class CheckpointError(ValueError):
    """Weights that can't be used; the message names the file and what is wrong with it.

    Attributes:
        missing, unexpected, mismatched: All keys concerned (the message lists the first 50 of each).
    """

    def __init__(
        self, message: str, missing: list[str] | None = None, unexpected: list[str] | None = None,
        mismatched: list[str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = missing or [], unexpected or [], mismatched or []


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, and what was saved beside them by `python -m rewards.convert`.

    Attributes:
        path: The weight file, or a folder that a library reads itself.
        source: What the user asked for.
        revision: Commit on the Hub, if it came from there.
        settings: Content of scorer.json beside the weights; empty if there is none.
    """

    path: Path
    source: str
    revision: str | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        folder = self.path if self.path.is_dir() else self.path.parent
        return read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}

    @cached_property
    def sha256(self) -> str:
        """Digest of the weight file (of all safetensors files, by name, for a folder); read once."""
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        digests = []
        for path in files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a result has to say about the weights it came from."""
        return {"checkpoint": self.source, "revision": self.revision, "sha256": self.sha256}


def find_checkpoint(source: str | Path, *, folder_of: str | None = None) -> Checkpoint:
    """Weights at a local path, or on the Hub as `org/repo/file@revision` (`org/repo@revision` for a folder).

    Args:
        source: A file, a folder written by `python -m rewards.convert` or by open_clip, a folder for a library, or a
            Hub id. On the Hub the revision is required; `main` is taken with a warning that names the commit.
        folder_of: Name of a library that reads whole folders (transformers); otherwise the folder's weight file is
            meant.

    Raises:
        CheckpointError: Nothing there.
    """
    path = Path(source)
    if path.exists():
        if path.is_dir() and folder_of is None:
            names = [name for name in (WEIGHTS_FILE, OPEN_CLIP_WEIGHTS_FILE) if (path / name).is_file()]
            if not names:
                raise CheckpointError(f"{path} has no {WEIGHTS_FILE}; give the weight file itself.")
            path = path / names[0]
        return Checkpoint(path, str(source))
    match = _HUB_FILE.fullmatch(str(source))
    if match is None:
        raise CheckpointError(
            f"There is no checkpoint at {source}. Give a file that exists, or `org/repo/file@revision` on the Hub "
            "(the revision is a commit, so that scores stay the same)."
        )
    return _from_hub(str(source), match["repo"], match["file"], match["revision"])


def load_state_dict(path: str | Path) -> "dict[str, torch.Tensor]":
    """Tensors of a .safetensors file or of a legacy PyTorch file, memory-mapped where the format allows it.

    A wrapping {"state_dict": ...} is opened and the prefix `module.` of data-parallel training is removed.

    Raises:
        CheckpointError: Truncated or not such a file, objects other than tensors, or NaN.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        elif path.suffix in PICKLED:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        else:
            raise CheckpointError(f"{path}: weights must be .safetensors or one of {', '.join(PICKLED)}.")
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or no weight file: {error}") from error
    except Exception as error:  # weights_only unpickling raises pickle.UnpicklingError and more
        raise CheckpointError(f"{path} can't be read without running its code, which is refused: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise CheckpointError(f"{path} holds no plain mapping of names to tensors.")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values.")
    return dict(state)


def load_strictly(model: "nn.Module", state: "Mapping[str, torch.Tensor]", where: str | Path) -> None:
    """Give a model its weights; names and shapes must agree exactly.

    The tensors are taken over, not copied, so a model built without memory (`accelerate`'s `init_empty_weights`) gets
    its first weights here. Only those of another precision than the model's, such as weights saved in float16, are
    converted.

    Raises:
        CheckpointError: Lists keys that are missing, left over or of another shape.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    mismatched = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or mismatched:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:50])}{' …' if len(keys) > 50 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
            if keys
        ]
        raise CheckpointError(
            f"{where} does not fit the model; keys {'; '.join(parts)}. Is `config` that of this checkpoint?",
            missing, unexpected, mismatched,
        )  # fmt: skip
    # `assign` would give the model the precision of the file, and a mixture of both fails in the middle of a model
    converted = {
        name: value.to(expected[name].dtype) if value.is_floating_point() else value for name, value in state.items()
    }
    model.load_state_dict(converted, strict=True, assign=True)


def read_config(config: Mapping[str, Any] | str | Path | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """A model configuration given as mapping, as path of a JSON file, or not at all.

    Raises:
        CheckpointError: The file can't be read or holds no JSON object.
    """
    if config is None:
        return dict(default)
    return dict(config) if isinstance(config, Mapping) else read_json(config)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file can't be read or holds no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Can't read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds {type(content).__name__}.")
    return content


def _is_zip(path: Path) -> bool:
    """Whether torch.load can map the file; the format before torch 1.6 can't be mapped."""
    import zipfile

    return zipfile.is_zipfile(path)


def _from_hub(source: str, repo: str, file: str | None, revision: str) -> Checkpoint:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if file is None:
            patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            commit = path.name
        else:
            path = Path(hf_hub_download(repo, file, revision=revision))
            commit = path.relative_to(next(p for p in path.parents if p.name == "snapshots")).parts[0]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"Can't get {source} from the Hub ({type(error).__name__}). Download it on a machine that can and give "
            "the path as `checkpoint`."
        ) from error
    if revision != commit:
        logger.warning("%s is at commit %s today; write @%s to keep the scores as they are.", source, commit, commit)
    return Checkpoint(path, source, commit)
