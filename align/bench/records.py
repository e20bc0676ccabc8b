"""Civitai's REST v1 objects, as far as we use them. Fields we use are checked, all others are ignored."""

import html
import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from rollouts.names import clean_name

# Together, with " - " between them, they fit into `rollouts.names.MAX_NAME_LENGTH`.
MAX_MODEL_NAME_CHARS, MAX_VERSION_NAME_CHARS = 100, 50
_GOOD_SCANS = (None, "Success")
_SHA256 = re.compile(r"[0-9A-F]{64}")
_ENTITY = re.compile(r"&#?\w{1,31};")
# Arrow's and SQLite's integers have 64 bits.
Identifier = Annotated[int, Field(ge=0, lt=2**63)]

# The API writes null where it has nothing to list.
_NoneIsEmpty = BeforeValidator(lambda value: [] if value is None else value)
_NoneIsUnknown = BeforeValidator(lambda value: {} if value is None else value)


class _Lenient(BaseModel):
    """Fields we use are checked, all others are ignored: the API grows new ones every month."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class FileRecord(_Lenient):
    """A file of a model version, as Civitai describes it."""

    type: str = "Model"
    downloadUrl: str | None = None
    name: str = ""
    metadata: dict[str, Any] | None = None
    pickleScanResult: str | None = None
    virusScanResult: str | None = None
    hashes: dict[str, str | None] | None = None
    primary: bool | None = None
    sizeKB: Any = None  # only for estimates: no reason to drop a file

    @property
    def size(self) -> int | None:
        """Bytes, if that is known."""
        known = isinstance(self.sizeKB, int | float) and 0 < self.sizeKB < 1e9
        return round(self.sizeKB * 1024) if known else None

    @property
    def format(self) -> str:
        """`SafeTensor`, `PickleTensor`, `Other` or ''."""
        return str((self.metadata or {}).get("format") or "")

    def hash_of(self, kind: str) -> str | None:
        """Upper-case hash of this kind (AutoV1, AutoV2, SHA256, ...), if there is one."""
        value = (self.hashes or {}).get(kind)
        return value.upper() if value else None

    @property
    def is_weights(self) -> bool:
        """Whether this is the model itself, not a VAE, a training set or a config."""
        return self.type in ("Model", "Pruned Model")


class Stats(_Lenient):
    """Counters of a model or version; hidden or unknown ones are `None`."""

    downloadCount: float | None = None
    ratingCount: float | None = None
    rating: float | None = None
    favoriteCount: float | None = None
    thumbsUpCount: float | None = None

    @field_validator("*")
    @classmethod
    def _no_number_is_unknown(cls, value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    @property
    def likes(self) -> float | None:
        """Favourites (until 2024) or thumbs-up (since)."""
        return self.favoriteCount if self.favoriteCount is not None else self.thumbsUpCount


class VersionRecord(_Lenient):
    """A model version. `images` stay raw: each is checked on its own, so that one bad image costs only itself."""

    id: Identifier
    name: str = ""
    status: str | None = None
    baseModel: str | None = None
    trainedWords: Annotated[list[str], _NoneIsEmpty] = []
    description: str | None = None
    stats: Annotated[Stats, _NoneIsUnknown] = Stats()
    files: Annotated[list[FileRecord], _NoneIsEmpty] = []
    images: Annotated[list[Any], _NoneIsEmpty] = []

    @property
    def title(self) -> str:
        """The name as part of a catalogue name: clean and not too long, perhaps empty."""
        return _cut_name(self.name, MAX_VERSION_NAME_CHARS)

    def best_file(self) -> FileRecord | None:
        """The weights to call: safetensors, hashed, downloadable, scans not failed; the primary one first."""
        usable = [f for f in self.files if not file_problems(f)]
        return max(usable, key=lambda f: (bool(f.primary), f.type == "Model"), default=None)


class ModelRecord(_Lenient):
    """An object of Civitai's `/models`. `modelVersions` stay raw, as the images of a version do."""

    id: Identifier
    name: str
    type: str
    nsfw: bool = False
    poi: bool = False
    mode: str | None = None
    availability: str | None = None
    tags: Annotated[list[Any], _NoneIsEmpty] = []
    description: str | None = None
    stats: Annotated[Stats, _NoneIsUnknown] = Stats()
    modelVersions: Annotated[list[Any], _NoneIsEmpty] = []
    allowCommercialUse: Any = None
    allowDerivatives: bool | None = None

    @property
    def title(self) -> str:
        """The name as part of a catalogue name: clean and not too long, perhaps empty."""
        return _cut_name(self.name, MAX_MODEL_NAME_CHARS)

    @property
    def tag_names(self) -> tuple[str, ...]:
        """Tags as text; some routes give objects with a `name`."""
        names = (tag.get("name") if isinstance(tag, dict) else tag for tag in self.tags)
        return tuple(name for name in names if isinstance(name, str))


def _cut_name(name: str, max_chars: int) -> str:
    unescaped = _ENTITY.sub(lambda entity: html.unescape(entity[0]), name)  # some titles are stored as HTML
    return clean_name(unescaped)[:max_chars].strip()


def file_problems(file: FileRecord) -> list[str]:
    """Why these weights can't be fetched and loaded safely; the file rules of `filters.availability_rules`."""
    problems = []
    if not file.is_weights or not file.downloadUrl:
        problems.append("file_missing")
    if file.format != "SafeTensor":
        problems.append("file_not_safetensors")
    if not _SHA256.fullmatch(file.hash_of("SHA256") or ""):
        problems.append("file_without_hash")
    if file.pickleScanResult not in _GOOD_SCANS or file.virusScanResult not in _GOOD_SCANS:
        problems.append("file_scan_failed")
    return problems
