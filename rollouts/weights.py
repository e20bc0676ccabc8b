"""Weight files of catalogued models: where they are, and whether they are what the catalogue says.

    python -m rollouts.weights --source model.ckpt --output model.safetensors

turns a pickled checkpoint into safetensors without running the code in it.
"""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rewards.checkpoints import PICKLED, CheckpointError, load_state_dict
from rewards.commandline import ConfigError, run_command
from rewards.files import write_atomically
from rollouts.catalog import CatalogEntry, CatalogFile

logger = logging.getLogger(__name__)

Reason = Literal["no_file", "missing_file", "outside_folder", "pickle", "wrong_hash", "corrupt"]


class WeightsError(ValueError):
    """Weights that can't be used; the message names the model, the file and the way out.

    Attributes:
        reason: One word for counting.
    """

    def __init__(self, message: str, reason: Reason):
        super().__init__(message)
        self.reason = reason


class WeightFolder:
    """A folder of weights, named as the catalogue's `files` say or by their SHA-256.

    A file's `uri` is a path inside the folder: a safetensors file, or a folder in diffusers' layout, whose SHA-256 is
    that of the digests of its safetensors files in order of their paths. For anything that is downloaded
    (`https://…`) the file is expected as `<sha256>.safetensors`. A catalogue comes from the internet, so a path that
    leads out of the folder is refused.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True):
        """Nothing is read yet.

        Args:
            folder: Where the weights are.
            verify: Compare SHA-256 with the catalogue's, once per file and process.
        """
        self.folder, self.verify = Path(folder), verify
        self._digests: dict[tuple[str, int, int], str] = {}

    def find(self, entry: CatalogEntry) -> Path:
        """The first file of a model that is there.

        Raises:
            WeightsError: None is there or can be used; the reason of the last one tried.
        """
        if not entry.files:
            raise WeightsError(f"{entry.name}: the catalogue lists no file.", "no_file")
        error = None
        for file in entry.files:
            try:
                return self._check(entry.name, file, self._locate(entry.name, file))
            except WeightsError as problem:
                error = problem
        assert error is not None
        raise error

    def _locate(self, name: str, file: CatalogFile) -> Path:
        if "://" in file.uri:
            path = self.folder / f"{file.sha256.lower()}.safetensors"
            if not path.exists():
                raise WeightsError(f"{name}: download {file.uri} to {path}.", "missing_file")
            return path
        path = self.folder / file.uri
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise WeightsError(f"{name}: {file.uri!r} leads out of {self.folder}.", "outside_folder")
        if not path.exists():
            raise WeightsError(f"{name}: there is no {path}.", "missing_file")
        return path

    def _check(self, name: str, file: CatalogFile, path: Path) -> Path:
        if path.suffix in PICKLED:
            raise WeightsError(
                f"{name}: {path} is a pickle, which can run code. Convert it: python -m rollouts.weights --source "
                f"{path} --output {path.with_suffix('.safetensors')}",
                "pickle",
            )
        parts = weights_parts(path)
        if path.is_dir() and not (parts and (path / "model_index.json").is_file()):
            raise WeightsError(
                f"{name}: {path} is no diffusers folder with safetensors weights (model_index.json).", "missing_file"
            )
        for part in parts:
            check_safetensors(part, name)
        if self.verify and (found := self._sha256(parts)) != file.sha256.lower():
            raise WeightsError(
                f"{name}: {path} has SHA-256 {found}, but the catalogue says {file.sha256.lower()}; download it again.",
                "wrong_hash",
            )
        return path

    def _sha256(self, parts: list[Path]) -> str:
        digests = []
        for path in parts:
            status = path.stat()
            key = (str(path), status.st_size, status.st_mtime_ns)
            if key not in self._digests:
                self._digests[key] = _file_sha256(path)
            digests.append(self._digests[key])
        return _combined(digests)


def weights_parts(path: str | Path) -> list[Path]:
    """The files of some weights: all safetensors files of a folder in the order of their paths, or the file itself."""
    path = Path(path)
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of a file or folder of weights as catalogues have it: upper-case hex, see `WeightFolder`."""
    return _combined([_file_sha256(part) for part in weights_parts(path)]).upper()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combined(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def check_safetensors(path: Path, name: str) -> None:
    """Raise WeightsError unless a file has a safetensors header that agrees with its size; tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{name}: {path} is truncated or no safetensors file: {error}.", "corrupt") from error


@dataclass
class ConvertWeightsConfig:
    """Options of `python -m rollouts.weights`."""

    source: str = field(metadata={"help": "Pickled checkpoint (.ckpt, .pt, .pth, .bin)."})
    output: str = field(metadata={"help": "File to write (.safetensors)."})

    def __post_init__(self):
        if Path(self.source).suffix not in PICKLED:
            raise ValueError(f"`source` must end in one of {', '.join(PICKLED)}, but is {self.source}.")
        if Path(self.output).suffix != ".safetensors":
            raise ValueError(f"`output` must end in .safetensors, but is {self.output}.")


def main(config: ConvertWeightsConfig) -> None:
    """Write the tensors of a pickled checkpoint as safetensors."""
    from safetensors.torch import save

    if not Path(config.source).is_file():
        raise ConfigError(f"`source`: there is no file {config.source}.")
    state = {name: value.contiguous().clone() for name, value in load_state_dict(config.source).items()}
    write_atomically(config.output, save(state, metadata={"format": "pt"}))
    logger.info("%s: %d tensors", config.output, len(state))


if __name__ == "__main__":
    run_command(main, ConvertWeightsConfig, errors=(CheckpointError, OSError))
