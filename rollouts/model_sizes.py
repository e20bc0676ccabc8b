"""How large models are, without reading them: on disk, as the catalogue says, or as such files usually are."""

from collections.abc import Iterable
from pathlib import Path

from rollouts.catalog import Catalog, CatalogEntry
from rollouts.workload import ASSUMED_GB, GB


def model_sizes(catalog: Catalog, names: Iterable[str], weights: str | Path | None = None) -> dict[str, int]:
    """Bytes of each model, for estimates.

    Args:
        catalog: Where the models are listed.
        names: Of models in it.
        weights: Folder of weights (see `rollouts.weights.WeightFolder`); None: not looked at.
    """
    folder = None if weights is None else Path(weights)
    return {name: _size(catalog[name], folder) for name in dict.fromkeys(names)}


def _size(entry: CatalogEntry, folder: Path | None) -> int:
    for file in entry.files:
        if folder is None:
            break
        remote = "://" in file.uri
        path = folder / (f"{file.sha256.lower()}.safetensors" if remote else file.uri)
        if path.is_file():
            return path.stat().st_size
        if path.is_dir():
            return sum(part.stat().st_size for part in path.rglob("*.safetensors"))
    known = [file.size for file in entry.files if file.size]
    return known[0] if known else round(ASSUMED_GB[entry.type, entry.base_model] * GB)
