"""What FID compares a method's pictures with: the demonstrations' own, or what the ground truth draws."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from align.evaluation.picture_features import compute_features, features_folder
from align.evaluation.plan_results import PlanResults
from rewards.commandline import ConfigError
from rewards.inception import FeatureExtractor
from rollouts.run import RunConfig
from rollouts.store import ImageStore

logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def folder_references(folder: Path, chats: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """The demonstrations' pictures by chat, as far as a folder has them.

    Args:
        folder: With `<image id>.png` and so on. It is listed, so that an id of the data never becomes a path.
        chats: A row of `plan_results` of each.

    Raises:
        ConfigError: No such folder, or none of the pictures is in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"`references` {folder} is no folder.")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES}
    found = {name: files[row["image_id"]] for name, row in chats.items() if row["image_id"] in files}
    if not found:
        raise ConfigError(f"`references` {folder} has no picture that is named by an image id of the rows, as 123.png.")
    return found


def with_references(
    results: PlanResults, references: Mapping[str, Any], kind: str, extractor: FeatureExtractor, output: Path,
    config: RunConfig,
) -> PlanResults:  # fmt: skip
    """The same rows with `references`; features of all pictures are computed and kept in `output`.

    Args:
        results: With pictures.
        references: By chat: keys of the store, or a file. Chats without any are left out of FID, for all methods.
        kind: `render` or `folder`.
        extractor: Whose features are compared.
        output: Folder of the run.
        config: Whose store has the pictures.

    Raises:
        StoreError: A picture is gone or broken.
    """
    keys: dict[str, list[str]] = {}
    with ImageStore(config.store_path(), index=config.store_index) as store:
        sources: dict[str, Callable[[], Any]] = {}
        for name, found in references.items():
            if isinstance(found, Path):
                keys[name] = [f"file:{hashlib.sha256(found.read_bytes()).hexdigest()}"]
                sources[keys[name][0]] = partial(Path, found)
            else:
                keys[name] = list(found)
        drawn = [key for row in results.rows for key in row["pictures"]]
        stored = [*drawn, *(key for of in keys.values() for key in of if key not in sources)]
        sources |= {key: partial(store.load, key) for key in stored}
        folder = features_folder(output, extractor)
        features = compute_features(sources, extractor, folder)
    keys = {name: of for name, of in keys.items() if all(key in features for key in of)}
    if missing := len({row["row_id"] for row in results.rows if row["pictures"]} - keys.keys()):
        logger.warning("%d chats have no reference picture and are left out of FID", missing)
    rows = [{**row, "references": keys.get(row["row_id"], []) if row["pictures"] else []} for row in results.rows]
    about = {"name": extractor.name, "sha256": extractor.sha256, "folder": str(folder.relative_to(output))}
    return PlanResults(replace(results.about, references=kind, features=about), rows)
